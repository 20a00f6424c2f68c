// Decode attention over a paged cache: only what a row sees is read, and the heads of a group read it together.

#include "attention.h"

namespace omni {
namespace {

template <class T>
struct GroupedHeads {  // one KV head and the query heads that share it
  const PagedAttention& problem;

  static constexpr int64_t kSpan = 512;
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

  void look_ahead(const Pages& pages, int64_t first_unit, int64_t last_unit, int64_t token, int64_t count,
                  BlockAhead& ahead) const {
    const int64_t units = last_unit - first_unit;
    ahead.count = count;
    pages.rows<T>(problem.key, first_unit, token, count, ahead.parts[0].tokens);
    pages.rows<T>(problem.value, first_unit, token, count, ahead.parts[1].tokens);
    ahead.parts[0].lines = (units * problem.dim * sizeof(T) + kLineBytes - 1) / kLineBytes;
    ahead.parts[1].lines = (units * problem.value_dim * sizeof(T) + kLineBytes - 1) / kLineBytes;
    ahead.spread(units * 2 * kTilesOfBlock);
  }

  void scores(const Pages& pages, int64_t unit, int64_t token, int64_t count, const Staged<T>* query, int64_t heads,
              float* to, BlockAhead& ahead) const {
    const T* rows[kBlock];
    pages.rows<T>(problem.key, unit, token, count, rows);
    dot_rows<T>(rows, count, query, query_size(), heads, problem.dim, to, ahead);
  }

  void add_values(const Pages& pages, int64_t unit, int64_t token, int64_t count, const float* weights, int64_t heads,
                  float* to, int64_t to_stride) const {
    const T* rows[kBlock];
    pages.rows<T>(problem.value, unit, token, count, rows);
    weighted_sums<T>(rows, count, problem.value_dim, weights, kBlock, heads, to, to_stride);
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
