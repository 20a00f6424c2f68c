// The one file that knows torch: checks of tensors, operators `omni::…`, C entries for compiled graphs, and threads.
//
// Everything that a wrong tensor could turn into a wrong address is checked here, before a kernel runs.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

#include "kernels.h"

#if AT_PARALLEL_OPENMP
// The entry that compilers emit for `#pragma omp parallel`; libgomp, libomp and libiomp5 all have it. Called by name,
// it is found in the runtime that torch has loaded, whatever its file is called, and no second one is linked.
extern "C" void GOMP_parallel(void (*body)(void*), void* context, unsigned threads, unsigned flags);
#endif

namespace omni {

int64_t thread_count() { return at::get_num_threads(); }

void run_tasks(int64_t tasks, void* context, void (*body)(void* context, int64_t task)) {
  struct Run {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    void* context;
    void (*body)(void*, int64_t);

    static void work(void* self) {
      auto* run = static_cast<Run*>(self);
      for (int64_t task; (task = run->next.fetch_add(1, std::memory_order_relaxed)) < run->tasks;)
        run->body(run->context, task);
    }
  };
  Run run{{}, tasks, context, body};
  if (tasks < 2 || at::get_num_threads() < 2 || at::in_parallel_region()) {
    Run::work(&run);
    return;
  }
#if AT_PARALLEL_OPENMP
  GOMP_parallel(&Run::work, &run, 0, 0);  // 0: as many threads as torch set; another number would rebuild the team
#else
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { Run::work(&run); });
#endif
}

namespace {

using at::Tensor;

Element element_of(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU: ", tensor.device());
  switch (tensor.scalar_type()) {
    case at::kFloat: return Element::kFloat32;
    case at::kBFloat16: return Element::kBFloat16;
    case at::kHalf: return Element::kFloat16;
    default: TORCH_CHECK_VALUE(false, name, " must be float32, bfloat16 or float16: ", tensor.scalar_type());
  }
}

void check_like(const Tensor& tensor, const char* name, const Tensor& other, int64_t dims) {
  TORCH_CHECK_VALUE(tensor.dim() == dims, name, " must have ", dims, " dimensions: ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == other.scalar_type() && tensor.device().is_cpu(), name,
                    " must be on the CPU and of dtype ", other.scalar_type(), ": ", tensor.scalar_type());
}

void check_sizes(const Tensor& tensor, const char* name, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " must be of shape ", sizes, ": ", tensor.sizes());
}

// Kernels take any strides, but the elements of the last dimension lie side by side.
Tensor with_whole_rows(const Tensor& tensor) {
  return tensor.dim() == 0 || tensor.size(-1) < 2 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

Tensor linear_op(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Element element = element_of(x, "x");
  check_like(weight, "weight", x, 2);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == weight.size(1), "the last dimension of x must be ", weight.size(1),
                    ", the columns of the weight: ", x.sizes());
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  if (bias) {
    check_like(*bias, "bias", x, 1);
    check_sizes(*bias, "bias", {outputs});
  }
  int64_t rows = 1;
  for (const int64_t size : x.sizes().slice(0, x.dim() - 1)) rows *= size;
  if (rows > most_rows(element)) return at::linear(x, weight, bias);
  const Tensor whole = x.dim() == 2 ? with_whole_rows(x) : x.contiguous();
  const Tensor whole_weight = with_whole_rows(weight);
  const Tensor whole_bias = bias ? bias->contiguous() : Tensor();
  at::DimVector sizes(x.sizes());
  sizes.back() = outputs;
  Tensor output = at::empty(sizes, x.options());
  if (output.numel() == 0) return output;
  linear({element, rows, inputs, outputs, whole.const_data_ptr(), whole_weight.const_data_ptr(),
          bias ? whole_bias.const_data_ptr() : nullptr, x.dim() == 2 ? whole.stride(0) : inputs, whole_weight.stride(0),
          output.data_ptr(), outputs});
  return output;
}

Tensor head_linear_op(const Tensor& x, const Tensor& weight, bool transposed) {
  const Element element = element_of(x, "x");
  check_like(x, "x", x, 3);
  check_like(weight, "weight", x, 3);
  const int64_t rows = x.size(0), heads = x.size(1), inputs = x.size(2);
  TORCH_CHECK_VALUE(weight.size(0) == heads && weight.size(transposed ? 1 : 2) == inputs, "weight must have ", heads,
                    " heads and ", inputs, transposed ? " rows" : " columns", " per head: ", weight.sizes());
  const int64_t outputs = weight.size(transposed ? 2 : 1);
  const Tensor whole = with_whole_rows(x), whole_weight = with_whole_rows(weight);
  Tensor output = at::empty({rows, heads, outputs}, x.options());
  if (output.numel() == 0) return output;
  head_linear({element, transposed, rows, heads, inputs, outputs, whole.const_data_ptr(), whole_weight.const_data_ptr(),
               whole.stride(0), whole.stride(1), whole_weight.stride(0), whole_weight.stride(1), output.data_ptr()});
  return output;
}

PagedCache paged(const Tensor& cache) {
  return {cache.const_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

Tensor as_int32(const Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && (tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong),
                    name, " must be int32 or int64 on the CPU: ", tensor.scalar_type());
  const Tensor whole = tensor.dim() == 1 ? tensor.contiguous() : with_whole_rows(tensor);
  return whole.scalar_type() == at::kInt ? whole : whole.to(at::kInt);
}

// Every block that a row reads must be one of the cache.
void check_pages(const Tensor& block_table, const Tensor& context_lens, int64_t requests, int64_t blocks,
                 int64_t block_size) {
  TORCH_CHECK_VALUE(block_table.dim() == 2 && block_table.size(0) == requests, "block_table must have ", requests,
                    " rows: ", block_table.sizes());
  check_sizes(context_lens, "context_lens", {requests});
  const auto* table = block_table.const_data_ptr<int32_t>();
  const auto* lens = context_lens.const_data_ptr<int32_t>();
  for (int64_t request = 0; request < requests; ++request) {
    const int64_t used = (lens[request] + block_size - 1) / block_size;
    TORCH_CHECK_VALUE(lens[request] >= 0 && used <= block_table.size(1), "context_lens must be in [0, ",
                      block_table.size(1) * block_size, "]: ", lens[request]);
    for (int64_t page = 0; page < used; ++page) {
      const int64_t block = table[request * block_table.stride(0) + page];
      TORCH_CHECK_INDEX(block >= 0 && block < blocks, "block_table must hold blocks of [0, ", blocks, "): ", block);
    }
  }
}

Tensor paged_decode_attention_op(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                 const Tensor& block_table, const Tensor& context_lens, double scale, int64_t window) {
  const Element element = element_of(query, "query");
  check_like(query, "query", query, 3);
  check_like(key_cache, "key_cache", query, 4);
  check_like(value_cache, "value_cache", query, 4);
  const int64_t requests = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t blocks = key_cache.size(0), block_size = key_cache.size(1), kv_heads = key_cache.size(2);
  const int64_t value_dim = value_cache.size(3);
  TORCH_CHECK_VALUE(key_cache.size(3) == dim, "key_cache must hold keys of size ", dim, ": ", key_cache.sizes());
  check_sizes(value_cache, "value_cache", {blocks, block_size, kv_heads, value_dim});
  TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of ", kv_heads, ": ", heads);
  const Tensor table = as_int32(block_table, "block_table"), lens = as_int32(context_lens, "context_lens");
  check_pages(table, lens, requests, blocks, block_size);
  const Tensor whole = with_whole_rows(query), keys = with_whole_rows(key_cache), values = with_whole_rows(value_cache);
  Tensor output = at::empty({requests, heads, value_dim}, query.options());
  if (output.numel() == 0) return output;
  paged_decode_attention({element, requests, heads, kv_heads, dim, value_dim, block_size, whole.const_data_ptr(),
                          whole.stride(0), whole.stride(1), paged(keys), paged(values), table.const_data_ptr<int32_t>(),
                          table.stride(0), lens.const_data_ptr<int32_t>(), static_cast<float>(scale), window,
                          output.data_ptr()});
  return output;
}

Tensor causal_attention_op(const Tensor& query, const Tensor& key, const Tensor& value, double scale, int64_t window) {
  const Element element = element_of(query, "query");
  check_like(query, "query", query, 3);
  check_like(key, "key", query, 3);
  check_like(value, "value", query, 3);
  const int64_t queries = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t context = key.size(0), kv_heads = key.size(1), value_dim = value.size(2);
  TORCH_CHECK_VALUE(context >= queries, "the context must hold the ", queries, " tokens of the query: ", context);
  TORCH_CHECK_VALUE(key.size(2) == dim, "key must hold keys of size ", dim, ": ", key.sizes());
  check_sizes(value, "value", {context, kv_heads, value_dim});
  TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of ", kv_heads, ": ", heads);
  TORCH_CHECK_VALUE(window == -1 || window > 0, "window must be positive, or -1 for none: ", window);
  const Tensor whole = with_whole_rows(query), keys = with_whole_rows(key), values = with_whole_rows(value);
  Tensor output = at::empty({queries, heads, value_dim}, query.options());
  if (output.numel() == 0) return output;
  causal_attention({element, queries, context, heads, kv_heads, dim, value_dim, whole.const_data_ptr(), whole.stride(0),
                    whole.stride(1), keys.const_data_ptr(), keys.stride(0), keys.stride(1), values.const_data_ptr(),
                    values.stride(0), values.stride(1), static_cast<float>(scale), window, output.data_ptr()});
  return output;
}

Tensor mla_decode_attention_op(const Tensor& query_latent, const Tensor& query_rope, const Tensor& latent_cache,
                               const Tensor& rope_key_cache, const Tensor& block_table, const Tensor& context_lens,
                               double scale) {
  const Element element = element_of(query_latent, "query_latent");
  check_like(query_latent, "query_latent", query_latent, 3);
  check_like(query_rope, "query_rope", query_latent, 3);
  check_like(latent_cache, "latent_cache", query_latent, 4);
  check_like(rope_key_cache, "rope_key_cache", query_latent, 4);
  const int64_t requests = query_latent.size(0), heads = query_latent.size(1), rank = query_latent.size(2);
  const int64_t rope_dim = query_rope.size(2), blocks = latent_cache.size(0), block_size = latent_cache.size(1);
  check_sizes(query_rope, "query_rope", {requests, heads, rope_dim});
  check_sizes(latent_cache, "latent_cache", {blocks, block_size, 1, rank});
  check_sizes(rope_key_cache, "rope_key_cache", {blocks, block_size, 1, rope_dim});
  const Tensor table = as_int32(block_table, "block_table"), lens = as_int32(context_lens, "context_lens");
  check_pages(table, lens, requests, blocks, block_size);
  const Tensor latent = with_whole_rows(query_latent), rope = with_whole_rows(query_rope);
  const Tensor latents = with_whole_rows(latent_cache), rope_keys = with_whole_rows(rope_key_cache);
  Tensor output = at::empty({requests, heads, rank}, query_latent.options());
  if (output.numel() == 0) return output;
  mla_decode_attention({element, requests, heads, rank, rope_dim, block_size, latent.const_data_ptr(), latent.stride(0),
                        latent.stride(1), rope.const_data_ptr(), rope.stride(0), rope.stride(1), paged(latents),
                        paged(rope_keys), table.const_data_ptr<int32_t>(), table.stride(0),
                        lens.const_data_ptr<int32_t>(), static_cast<float>(scale), output.data_ptr()});
  return output;
}

Tensor routed_experts_op(const Tensor& hidden, const Tensor& weights, const Tensor& expert_ids, const Tensor& gate_up,
                         const Tensor& down) {
  const Element element = element_of(hidden, "hidden");
  check_like(hidden, "hidden", hidden, 2);
  check_like(gate_up, "gate_up", hidden, 3);
  check_like(down, "down", hidden, 3);
  const int64_t tokens = hidden.size(0), dim = hidden.size(1), experts = gate_up.size(0), inner = down.size(2);
  check_sizes(gate_up, "gate_up", {experts, 2 * inner, dim});
  check_sizes(down, "down", {experts, dim, inner});
  TORCH_CHECK_VALUE(expert_ids.dim() == 2 && expert_ids.size(0) == tokens && expert_ids.scalar_type() == at::kLong,
                    "expert_ids must be int64 with ", tokens, " rows: ", expert_ids.sizes());
  check_sizes(weights, "weights", expert_ids.sizes());
  TORCH_CHECK_VALUE(weights.scalar_type() == at::kFloat, "weights must be float32: ", weights.scalar_type());
  const Tensor ids = expert_ids.contiguous(), scales = weights.contiguous();
  const auto* id = ids.const_data_ptr<int64_t>();
  for (int64_t pair = 0; pair < ids.numel(); ++pair)
    TORCH_CHECK_INDEX(id[pair] >= 0 && id[pair] < experts, "expert_ids must be in [0, ", experts, "): ", id[pair]);
  const Tensor rows = with_whole_rows(hidden), first = with_whole_rows(gate_up), second = with_whole_rows(down);
  Tensor output = at::empty({tokens, dim}, hidden.options());
  if (output.numel() == 0) return output;
  routed_experts({element, tokens, ids.size(1), experts, dim, inner, rows.const_data_ptr(), rows.stride(0),
                  scales.const_data_ptr<float>(), id, first.const_data_ptr(), first.stride(0), first.stride(1),
                  second.const_data_ptr(), second.stride(0), second.stride(1), output.data_ptr()});
  return output;
}

// Tensors of two dimensions have one head; of others than two and three, all before the last are tokens.
struct HeadView {
  Tensor whole;
  int64_t tokens, heads, dim, stride, head_stride;

  explicit HeadView(const Tensor& tensor) {
    const bool keeps_strides = tensor.dim() == 2 || tensor.dim() == 3;
    whole = keeps_strides ? with_whole_rows(tensor) : tensor.contiguous();
    dim = whole.size(-1);
    heads = whole.dim() == 3 ? whole.size(1) : 1;
    tokens = heads * dim == 0 ? 0 : whole.numel() / (heads * dim);
    stride = keeps_strides ? whole.stride(0) : dim;
    head_stride = whole.dim() == 3 ? whole.stride(1) : dim;
  }
};

void check_norm(const Tensor& hidden, const Tensor& weight) {
  check_like(weight, "weight", hidden, 1);
  TORCH_CHECK_VALUE(hidden.dim() >= 1 && hidden.size(-1) == weight.size(0), "the last dimension of hidden must be ",
                    weight.size(0), ", the size of the weight: ", hidden.sizes());
}

Tensor rms_norm_op(const Tensor& hidden, const Tensor& weight, double epsilon) {
  const Element element = element_of(hidden, "hidden");
  check_norm(hidden, weight);
  Tensor output = at::empty(hidden.sizes(), hidden.options());
  const HeadView view(hidden);
  const Tensor whole_weight = weight.contiguous();
  rms_norm({element, view.tokens, view.heads, view.dim, view.whole.const_data_ptr(), view.stride, view.head_stride,
            nullptr, 0, whole_weight.const_data_ptr(), static_cast<float>(epsilon), nullptr, output.data_ptr()});
  return output;
}

std::tuple<Tensor, Tensor> add_rms_norm_op(const Tensor& hidden, const Tensor& residual, const Tensor& weight,
                                           double epsilon) {
  const Element element = element_of(hidden, "hidden");
  check_like(hidden, "hidden", hidden, 2);
  check_like(residual, "residual", hidden, 2);
  check_sizes(residual, "residual", hidden.sizes());
  check_norm(hidden, weight);
  Tensor output = at::empty(hidden.sizes(), hidden.options()), sum = at::empty(hidden.sizes(), hidden.options());
  const HeadView view(hidden);
  const Tensor rows = with_whole_rows(residual), whole_weight = weight.contiguous();
  rms_norm({element, view.tokens, 1, view.dim, view.whole.const_data_ptr(), view.stride, view.head_stride,
            rows.const_data_ptr(), rows.stride(0), whole_weight.const_data_ptr(), static_cast<float>(epsilon),
            sum.data_ptr(), output.data_ptr()});
  return {output, sum};
}

Tensor swiglu_op(const Tensor& gate_up) {
  const Element element = element_of(gate_up, "gate_up");
  TORCH_CHECK_VALUE(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "the last dimension of gate_up must be even: ",
                    gate_up.sizes());
  at::DimVector sizes(gate_up.sizes());
  sizes.back() /= 2;
  Tensor output = at::empty(sizes, gate_up.options());
  const Tensor whole = gate_up.dim() == 2 ? with_whole_rows(gate_up) : gate_up.contiguous();
  if (output.numel() > 0)
    swiglu({element, output.numel() / sizes.back(), sizes.back(), whole.const_data_ptr(),
            whole.dim() == 2 ? whole.stride(0) : whole.size(-1), output.data_ptr()});
  return output;
}

Tensor rotate_op(const Tensor& heads, const Tensor& cos, const Tensor& sin, bool interleaved) {
  const Element element = element_of(heads, "heads");
  check_like(heads, "heads", heads, 3);
  TORCH_CHECK_VALUE(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat && cos.dim() == 2,
                    "cos and sin must be float32 of two dimensions: ", cos.sizes());
  check_sizes(cos, "cos", {heads.size(0), cos.size(1)});
  check_sizes(sin, "sin", cos.sizes());
  TORCH_CHECK_VALUE(2 * cos.size(1) <= heads.size(2), "heads must have at least ", 2 * cos.size(1), " elements: ",
                    heads.sizes());
  Tensor output = at::empty(heads.sizes(), heads.options());
  const HeadView view(heads);
  const Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  rotate({element, interleaved, view.tokens, view.heads, view.dim, cos.size(1), view.whole.const_data_ptr(),
          view.stride, view.head_stride, cosines.const_data_ptr<float>(), sines.const_data_ptr<float>(), cos.size(1),
          output.data_ptr()});
  return output;
}

void write_cache_op(const Tensor& rows, Tensor cache, const Tensor& slots) {
  const Element element = element_of(rows, "rows");
  check_like(rows, "rows", rows, 3);
  check_like(cache, "cache", rows, 4);
  check_sizes(cache, "cache", {cache.size(0), cache.size(1), rows.size(1), rows.size(2)});
  TORCH_CHECK_VALUE(cache.size(3) < 2 || cache.stride(3) == 1, "the last dimension of cache must be contiguous");
  TORCH_CHECK_VALUE(slots.scalar_type() == at::kLong && slots.device().is_cpu(), "slots must be int64 on the CPU");
  check_sizes(slots, "slots", {rows.size(0)});
  const Tensor whole_slots = slots.contiguous();
  const auto* slot = whole_slots.const_data_ptr<int64_t>();
  const int64_t most = cache.size(0) * cache.size(1);
  for (int64_t token = 0; token < rows.size(0); ++token)
    TORCH_CHECK_INDEX(slot[token] >= 0 && slot[token] < most, "slots must be in [0, ", most, "): ", slot[token]);
  const HeadView view(rows);
  write_cache({element, view.tokens, view.heads, view.dim, cache.size(1), view.whole.const_data_ptr(), view.stride,
               view.head_stride, slot, {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)}});
}

}  // namespace
}  // namespace omni

TORCH_LIBRARY(omni, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def("head_linear(Tensor x, Tensor weight, bool transposed) -> Tensor");
  library.def(
      "paged_decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, "
      "Tensor context_lens, float scale, int window) -> Tensor");
  library.def("causal_attention(Tensor query, Tensor key, Tensor value, float scale, int window) -> Tensor");
  library.def(
      "mla_decode_attention(Tensor query_latent, Tensor query_rope, Tensor latent_cache, Tensor rope_key_cache, "
      "Tensor block_table, Tensor context_lens, float scale) -> Tensor");
  library.def(
      "routed_experts(Tensor hidden, Tensor weights, Tensor expert_ids, Tensor gate_up, Tensor down) -> Tensor");
  library.def("rms_norm(Tensor hidden, Tensor weight, float epsilon) -> Tensor");
  library.def("add_rms_norm(Tensor hidden, Tensor residual, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  library.def("swiglu(Tensor gate_up) -> Tensor");
  library.def("rotate(Tensor heads, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
  library.def("write_cache(Tensor rows, Tensor(a!) cache, Tensor slots) -> ()");
}

TORCH_LIBRARY_IMPL(omni, CPU, library) {
  library.impl("linear", &omni::linear_op);
  library.impl("head_linear", &omni::head_linear_op);
  library.impl("paged_decode_attention", &omni::paged_decode_attention_op);
  library.impl("causal_attention", &omni::causal_attention_op);
  library.impl("mla_decode_attention", &omni::mla_decode_attention_op);
  library.impl("routed_experts", &omni::routed_experts_op);
  library.impl("rms_norm", &omni::rms_norm_op);
  library.impl("add_rms_norm", &omni::add_rms_norm_op);
  library.impl("swiglu", &omni::swiglu_op);
  library.impl("rotate", &omni::rotate_op);
  library.impl("write_cache", &omni::write_cache_op);
}

// What a compiled graph calls; ops/cpu/shims.py declares the same functions to the graph compiler.
namespace {

const at::Tensor& tensor(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

void give(at::Tensor&& result, AtenTensorHandle* to) {
  *to = torch::aot_inductor::new_tensor_handle(std::move(result));
}

}  // namespace

#define OMNI_EXPORT extern "C" __attribute__((visibility("default")))

OMNI_EXPORT AOTITorchError omni_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                           AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    give(omni::linear_op(tensor(x), tensor(weight), bias ? std::make_optional(tensor(*bias)) : std::nullopt), result);
  });
}

OMNI_EXPORT AOTITorchError omni_cpu_head_linear(AtenTensorHandle x, AtenTensorHandle weight, int32_t transposed,
                                                AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE(
      { give(omni::head_linear_op(tensor(x), tensor(weight), transposed != 0), result); });
}

OMNI_EXPORT AOTITorchError omni_cpu_paged_decode_attention(AtenTensorHandle query, AtenTensorHandle key_cache,
                                                           AtenTensorHandle value_cache, AtenTensorHandle block_table,
                                                           AtenTensorHandle context_lens, double scale, int64_t window,
                                                           AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    give(omni::paged_decode_attention_op(tensor(query), tensor(key_cache), tensor(value_cache), tensor(block_table),
                                         tensor(context_lens), scale, window),
         result);
  });
}

OMNI_EXPORT AOTITorchError omni_cpu_mla_decode_attention(AtenTensorHandle query_latent, AtenTensorHandle query_rope,
                                                         AtenTensorHandle latent_cache, AtenTensorHandle rope_key_cache,
                                                         AtenTensorHandle block_table, AtenTensorHandle context_lens,
                                                         double scale, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    give(omni::mla_decode_attention_op(tensor(query_latent), tensor(query_rope), tensor(latent_cache),
                                       tensor(rope_key_cache), tensor(block_table), tensor(context_lens), scale),
         result);
  });
}

OMNI_EXPORT AOTITorchError omni_cpu_routed_experts(AtenTensorHandle hidden, AtenTensorHandle weights,
                                                   AtenTensorHandle expert_ids, AtenTensorHandle gate_up,
                                                   AtenTensorHandle down, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    give(omni::routed_experts_op(tensor(hidden), tensor(weights), tensor(expert_ids), tensor(gate_up), tensor(down)),
         result);
  });
}
