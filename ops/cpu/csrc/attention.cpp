// Decode attention over a paged cache: only what a row sees is read, and the heads of a group read it together.

#include "attention.h"

namespace omni {
namespace {

template <class T>
struct GroupedHeads {  // one KV head and the query heads that share it
  const PagedAttention& problem;

  static constexpr int64_t kSpan = 512;
  static constexpr int64_t kTokens = 4;  // whose values are added up at a time
  int64_t units() const { return problem.kv_heads; }
  int64_t heads_of_unit() const { return problem.heads / problem.kv_heads; }
  int64_t query_size() const { return staged_size<T>(problem.dim); }
  int64_t value_size() const { return problem.value_dim; }
  int64_t begin(int64_t request) const {
    const int64_t context_len = problem.context_lens[request];
    return problem.window < 0 ? 0 : std::max<int64_t>(context_len - problem.window, 0);
  }

  void stage_query(int64_t request, int64_t head, Staged<T>* to) const {
    const auto* query = static_cast<const T*>(problem.query);
    stage<T>(query + request * problem.query_stride + head * problem.query_head_stride, problem.dim, to);
  }

  void locate(const Pages& pages, int64_t first_unit, int64_t token, BlockRows<T>& rows) const {
    pages.rows<T>(problem.key, first_unit, token, rows.count, rows.parts[0]);
    pages.rows<T>(problem.value, first_unit, token, rows.count, rows.parts[1]);
  }

  // The heads of a token lie side by side.
  BlockAhead<T> ahead(const BlockRows<T>& rows, int64_t units) const {
    return {rows, units * problem.dim, units * problem.value_dim};
  }

  // All heads with a few tokens, then with the next ones.
  void scores(const BlockRows<T>& block, const Staged<T>* query, int64_t heads, float* to, BlockAhead<T>& ahead) const {
    const int64_t group = heads_of_unit(), size = problem.dim, stride = query_size();
    auto& keys = ahead.parts[0];
    const int64_t tiles = block.count / kTileRows + block.count % kTileRows, asked = keys.share(tiles * heads / group);
    for_each_column_group<kTileColumns>(group, [&](int64_t of_group, auto width) OMNI_LAMBDA {
      const auto tile = [&](int64_t token, auto height) OMNI_LAMBDA {
        const T* rows[height.value];
        for (int row = 0; row < height.value; ++row) rows[row] = block.parts[0][token + row];
        for (int64_t head = of_group; head < heads; head += group) {
          if (of_group == 0) keys.ask(asked);
          Floats partial[height.value][width.value] = {};
          accumulate<T>(partial, rows, query + head * stride, stride, size, [](int64_t) OMNI_LAMBDA {});
          store_tile(partial, to + head * kBlock + token, kBlock);
          for (int row = 0; row < height.value; ++row) rows[row] += problem.key.head_stride;
        }
      };
      int64_t token = 0;
      for (; token + kTileRows <= block.count; token += kTileRows) tile(token, std::integral_constant<int, kTileRows>{});
      for (; token < block.count; ++token) tile(token, std::integral_constant<int, 1>{});
    });
  }

  void add_values(const BlockRows<T>& block, const float* weights, int64_t heads, float* to, int64_t to_stride,
                  BlockAhead<T>& ahead) const {
    const int64_t group = heads_of_unit();
    auto& values = ahead.parts[1];
    const int64_t asked = values.share((block.count + kTokens - 1) / kTokens * heads / group);
    for (int64_t token = 0; token < block.count; token += kTokens) {
      const int64_t count = std::min(kTokens, block.count - token);
      for (int64_t head = 0, offset = 0; head < heads; head += group, offset += problem.value.head_stride) {
        values.ask(asked);
        const T* rows[kTokens];
        for (int64_t row = 0; row < count; ++row) rows[row] = block.parts[1][token + row] + offset;
        weighted_sums<T>(rows, count, problem.value_dim, weights + head * kBlock + token, kBlock, group,
                         to + head * to_stride, to_stride);
      }
    }
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
