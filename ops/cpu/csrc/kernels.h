// The kernels' interface: plain pointers, sizes and strides in elements. No torch here, so that a kernel compiles fast.
#pragma once

#include <cstdint>

namespace omni {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Calls body(context, task) for every task in [0, tasks), on as many threads as torch uses, and returns when all are
// done. Tasks are taken in order, one at a time, so a thread that comes late takes fewer. A body must not throw.
void run_tasks(int64_t tasks, void* context, void (*body)(void* context, int64_t task));
int64_t thread_count();

template <class Body>
void for_each_task(int64_t tasks, const Body& body) {
  run_tasks(tasks, const_cast<Body*>(&body), [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); });
}

// x [rows, inputs] * weight [outputs, inputs]^T + bias [outputs] -> output [rows, outputs].
struct Linear {
  Element element;
  int64_t rows, inputs, outputs;
  const void *x, *weight, *bias;  // bias may be null
  int64_t x_stride, weight_stride;
  void* output;
  int64_t output_stride;
};
void linear(const Linear& problem);
// The largest number of rows for which `linear` is known to be ahead of the library's product.
int64_t most_rows(Element element);

// Per head: x [rows, heads, inputs] with weight [heads, outputs, inputs] -> output [rows, heads, outputs], contiguous.
// `transposed`: weight [heads, inputs, outputs] instead. The last dimension of every tensor is contiguous.
struct HeadLinear {
  Element element;
  bool transposed;
  int64_t rows, heads, inputs, outputs;
  const void *x, *weight;
  int64_t x_row_stride, x_head_stride, weight_head_stride, weight_stride;
  void* output;
};
void head_linear(const HeadLinear& problem);

// A cache [blocks, block_size, heads, dim], the last dimension contiguous.
struct PagedCache {
  const void* data;
  int64_t block_stride, token_stride, head_stride;
};

struct PagedAttention {
  Element element;
  int64_t requests, heads, kv_heads, dim, value_dim, block_size;
  const void* query;  // [requests, heads, dim]
  int64_t query_stride, query_head_stride;
  PagedCache key, value;
  const int32_t* block_table;  // [requests, …]
  int64_t block_table_stride;
  const int32_t* context_lens;  // [requests]
  float scale;
  int64_t window;  // -1: none
  void* output;    // [requests, heads, value_dim], contiguous
};
void paged_decode_attention(const PagedAttention& problem);

// The queries are the last tokens of the context. The last dimension of every tensor is contiguous.
struct CausalAttention {
  Element element;
  int64_t queries, context, heads, kv_heads, dim, value_dim;
  const void* query;  // [queries, heads, dim]
  int64_t query_stride, query_head_stride;
  const void* key;  // [context, kv_heads, dim]
  int64_t key_stride, key_head_stride;
  const void* value;  // [context, kv_heads, value_dim]
  int64_t value_stride, value_head_stride;
  float scale;
  int64_t window;  // -1: none
  void* output;    // [queries, heads, value_dim], contiguous
};
void causal_attention(const CausalAttention& problem);

struct LatentAttention {
  Element element;
  int64_t requests, heads, rank, rope_dim, block_size;
  const void* query_latent;  // [requests, heads, rank]
  int64_t query_latent_stride, query_latent_head_stride;
  const void* query_rope;  // [requests, heads, rope_dim]
  int64_t query_rope_stride, query_rope_head_stride;
  PagedCache latent, rope_key;  // one head each
  const int32_t* block_table;
  int64_t block_table_stride;
  const int32_t* context_lens;
  float scale;
  void* output;  // [requests, heads, rank], contiguous
};
void mla_decode_attention(const LatentAttention& problem);

struct RoutedExperts {
  Element element;
  int64_t tokens, experts_per_token, experts, dim, inner;
  const void* hidden;  // [tokens, dim]
  int64_t hidden_stride;
  const float* weights;       // [tokens, experts_per_token], contiguous
  const int64_t* expert_ids;  // the same; each in [0, experts)
  const void* gate_up;        // [experts, 2 * inner, dim]
  int64_t gate_up_expert_stride, gate_up_stride;
  const void* down;  // [experts, dim, inner]
  int64_t down_expert_stride, down_stride;
  void* output;  // [tokens, dim], contiguous
};
void routed_experts(const RoutedExperts& problem);

// Every head of every token over its root mean square, rounded, times the weight. With a residual, `sum` takes hidden +
// residual, rounded, and that is normalised; then there is one head.
struct RmsNorm {
  Element element;
  int64_t tokens, heads, dim;
  const void* hidden;  // [tokens, heads, dim]
  int64_t stride, head_stride;
  const void* residual;  // [tokens, dim], or null
  int64_t residual_stride;
  const void* weight;  // [dim], contiguous
  float epsilon;
  void* sum;     // [tokens, dim], contiguous; null without a residual
  void* output;  // [tokens, heads, dim], contiguous
};
void rms_norm(const RmsNorm& problem);

// silu(gate), rounded, * up of rows [gate, up].
struct SwiGlu {
  Element element;
  int64_t rows, size;
  const void* gate_up;  // [rows, 2 * size]
  int64_t stride;
  void* output;  // [rows, size], contiguous
};
void swiglu(const SwiGlu& problem);

// The first 2 * pairs elements of every head, turned by its token's angles; what comes out lies in halves.
struct Rotation {
  Element element;
  bool interleaved;
  int64_t tokens, heads, dim, pairs;
  const void* input;  // [tokens, heads, dim]
  int64_t stride, head_stride;
  const float *cos, *sin;  // [tokens, pairs]
  int64_t angle_stride;
  void* output;  // [tokens, heads, dim], contiguous
};
void rotate(const Rotation& problem);

// Token by token into the slots of a cache, which are block * block_size + offset.
struct CacheRows {
  Element element;
  int64_t tokens, heads, dim, block_size;
  const void* rows;  // [tokens, heads, dim]
  int64_t stride, head_stride;
  const int64_t* slots;  // [tokens]
  PagedCache cache;      // is written
};
void write_cache(const CacheRows& problem);

}  // namespace omni
