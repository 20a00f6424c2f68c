// Decode attention over a paged cache: only what a row sees is read, and the heads of a group read it together.

#include "attention.h"

namespace omni {
namespace {

template <class T>
struct GroupedHeads {  // one KV head and the query heads that share it
  const PagedAttention& problem;

  static constexpr int64_t kHeads = 8;  // whose values are added up at a time
  // What a span leaves behind is written and read again, the more the larger the group.
  int64_t span() const { return kBlock * std::clamp<int64_t>(heads_of_unit(), 2, 8); }
  int64_t units() const { return problem.kv_heads; }
  int64_t heads_of_unit() const { return problem.heads / problem.kv_heads; }
  int64_t query_size() const { return staged_size<T>(problem.dim); }
  int64_t value_size() const { return problem.value_dim; }
  int64_t begin(int64_t request) const {
    const int64_t context_len = problem.context_lens[request];
    return problem.window < 0 ? 0 : std::max<int64_t>(context_len - problem.window, 0);
  }

  int64_t query_room(int64_t heads) const { return heads * query_size(); }
  void stage_queries(int64_t request, int64_t first_head, int64_t heads, Staged<T>* to) const {
    const auto* query = static_cast<const T*>(problem.query) + request * problem.query_stride;
    for (int64_t head = 0; head < heads; ++head)
      stage<T>(query + (first_head + head) * problem.query_head_stride, problem.dim, to + head * query_size());
  }

  void locate(const Pages& pages, int64_t first_unit, int64_t token, BlockRows<T>& rows) const {
    pages.rows<T>(problem.key, first_unit, token, rows.count, rows.parts[0]);
    pages.rows<T>(problem.value, first_unit, token, rows.count, rows.parts[1]);
  }

  // All heads with tokens that lie far apart, then with their neighbours.
  void scores(const BlockRows<T>& block, const Staged<T>* query, int64_t heads, float* to) const {
    const int64_t group = heads_of_unit(), size = problem.dim, stride = query_size();
    const auto for_each_tile = [&](const auto& function) OMNI_LAMBDA {
      block.template for_each_spread<kTileRows>([&](int64_t token, int64_t apart, auto height) OMNI_LAMBDA {
        const T* rows[height.value];
        for (int row = 0; row < height.value; ++row) rows[row] = block.parts[0][token + row * apart];
        for (int64_t head = 0; head < heads; head += group) {
          function(rows, head, token, apart);
          for (int row = 0; row < height.value; ++row) rows[row] += problem.key.head_stride;
        }
      });
    };
    const auto multiply = [&](const auto& rows, int64_t head, int64_t token, int64_t apart, auto width) OMNI_LAMBDA {
      Floats partial[std::extent_v<std::remove_reference_t<decltype(rows)>>][width.value] = {};
      accumulate<T>(partial, rows, query + head * stride, stride, size);
      scatter_tile(partial, to + head * kBlock + token, kBlock, apart);
    };
    if (group > kTileColumns) {
      for_each_tile([&](const auto& rows, int64_t head, int64_t token, int64_t apart) OMNI_LAMBDA {
        for_each_column_group<kTileColumns>(group, [&](int64_t of_group, auto width) OMNI_LAMBDA {
          multiply(rows, head + of_group, token, apart, width);
        });
      });
    } else {  // the width is chosen once
      for_each_column_group<kTileColumns>(group, [&](int64_t, auto width) OMNI_LAMBDA {
        for_each_tile([&](const auto& rows, int64_t head, int64_t token, int64_t apart) OMNI_LAMBDA {
          multiply(rows, head, token, apart, width);
        });
      });
    }
  }

  void add_values(const BlockRows<T>& block, const float* weights, int64_t heads, float* to, int64_t to_stride) const {
    const int64_t group = heads_of_unit();
    const auto add = [&](auto tokens) OMNI_LAMBDA {  // whose values are added up at a time
      block.template for_each_spread<tokens.value>([&](int64_t token, int64_t apart, auto height) OMNI_LAMBDA {
        const T* rows[height.value];
        for (int row = 0; row < height.value; ++row) rows[row] = block.parts[1][token + row * apart];
        for (int64_t head = 0; head < heads; head += group) {
          for (int64_t first = head; first < head + group; first += kHeads) {
            const int64_t count = std::min(kHeads, head + group - first);
            float shares[kHeads * height.value];
            for (int64_t each = 0; each < count; ++each)
              for (int row = 0; row < height.value; ++row)
                shares[each * height.value + row] = weights[(first + each) * kBlock + token + row * apart];
            weighted_sums<T>(rows, height.value, problem.value_dim, shares, height.value, count, to + first * to_stride,
                             to_stride);
          }
          for (int row = 0; row < height.value; ++row) rows[row] += problem.value.head_stride;
        }
      });
    };
    if (group == 1) return add(std::integral_constant<int, 4>{});
    add(std::integral_constant<int, 8>{});
  }
};

}  // namespace

void paged_decode_attention(const PagedAttention& problem) {
  with_element(problem.element, [&](auto element) {
    using T = decltype(element);
    attend<T>(GroupedHeads<T>{problem}, problem);
  });
}

}  // namespace omni
