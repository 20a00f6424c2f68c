// Softmax over spans of a paged context, shared by the kernels that differ in what a key and a value are.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "tiles.h"

namespace omni {

constexpr int64_t kBlock = 64;  // tokens whose scores are held at a time
constexpr int64_t kValueLanes = 2 * kLanes;

// One request's row of the block table.
struct Pages {
  const int32_t* blocks;
  int64_t block_size;

  // The addresses of `count` tokens from `token` on.
  template <class T>
  void rows(const PagedCache& cache, int64_t head, int64_t token, int64_t count, const T** to) const {
    const T* base = static_cast<const T*>(cache.data) + head * cache.head_stride;
    int64_t page = token / block_size, offset = token % block_size;
    for (int64_t index = 0; index < count; ++page, offset = 0) {
      const T* from = base + blocks[page] * cache.block_stride;
      for (; offset < block_size && index < count; ++offset, ++index) to[index] = from + offset * cache.token_stride;
    }
  }
};

// Where the two parts of a block's tokens begin: keys and values, or latents and rope keys.
template <class T>
struct BlockRows {
  const T* parts[2][kBlock];
  int64_t count;

  // Calls function(token, apart, std::integral_constant<int, height>) for tokens `token`, `token` + `apart` and so on,
  // kHeight or one: so that all is read in a few long streams (see TiledProduct::by_streams).
  template <int kHeight, class Function>
  OMNI_INLINE void for_each_spread(const Function& function) const {
    const int64_t apart = count / kHeight;
    for (int64_t token = 0; token < apart; ++token) function(token, apart, std::integral_constant<int, kHeight>{});
    for (int64_t token = apart * kHeight; token < count; ++token) function(token, 1, std::integral_constant<int, 1>{});
  }
};

// Turns one head's scores into weights relative to the running maximum; returns by how much earlier sums shrink.
// What stands behind the first `count` scores is overwritten; it counts for nothing.
OMNI_INLINE float soften(float* scores, int64_t count, float scale, float& maximum, float& total) {
  constexpr int kVectors = kBlock / kLanes;
  for (int64_t token = count; token < kBlock; ++token) scores[token] = -std::numeric_limits<float>::max();
  Floats values[kVectors], largest = splat(maximum);  // all scores, in registers
  OMNI_UNROLL
  for (int at = 0; at < kVectors; ++at) {
    values[at] = load<Floats>(scores + at * kLanes) * scale;
    largest = larger(values[at], largest);
  }
  const float reached = largest_of(largest);
  Floats sum = {};
  OMNI_UNROLL
  for (int at = 0; at < kVectors; ++at) {
    const Floats weights = exponential(values[at] - reached);
    store(scores + at * kLanes, weights);
    sum += weights;
  }
  const float shrink = maximum == reached ? 1.0f : std::exp(maximum - reached);
  total = total * shrink + sum_of(sum);
  maximum = reached;
  return shrink;
}

// Attention of every request, for a `Shape` that says what the keys and values of a unit of heads are: a KV head and
// the query heads that share it, or some heads that read the same latents.
//
// A row's context is cut into spans of shape.span() tokens, whatever the number of rows or threads, so that its result
// depends on the row alone. A task is one span of one request for some units; it goes through the span once, all units
// block by block, because the memory of neighbouring heads lies together. The task that ends last joins a row's spans.
template <class T, class Shape, class Problem>
void attend(const Shape& shape, const Problem& problem) {
  struct Task {
    int64_t request, part, span;
  };
  static thread_local std::vector<Task> task_list;
  static thread_local std::vector<int64_t> first_task;  // of each request
  static thread_local Scratch partial_scratch, unfinished_scratch;
  const int64_t requests = problem.requests, units = shape.units(), heads_of_unit = shape.heads_of_unit();
  const int64_t span_size = shape.span();
  const auto spans_of = [&](int64_t request) {
    const int64_t seen = problem.context_lens[request] - shape.begin(request);
    return std::max<int64_t>((seen + span_size - 1) / span_size, 1);
  };
  int64_t spans = 0;
  for (int64_t request = 0; request < requests; ++request) spans += spans_of(request);
  // With fewer spans than threads, units are given to different tasks, which then read pieces of every token.
  const int64_t parts = std::clamp<int64_t>((thread_count() + spans - 1) / spans, 1, units);
  task_list.clear();
  first_task.clear();
  for (int64_t request = 0; request < requests; ++request) {
    first_task.push_back(int64_t(task_list.size()));
    for (int64_t span = 0; span < spans_of(request); ++span)
      for (int64_t part = 0; part < parts; ++part) task_list.push_back({request, part, span});
  }
  const auto begin_of_part = [&](int64_t part) { return units * part / parts; };
  // per task and head: the weighted sum up to a whole number of vectors, and at the end maximum and total
  const int64_t value_size = shape.value_size();
  const int64_t padded = (value_size + kValueLanes - 1) / kValueLanes * kValueLanes, head_size = padded + kLanes;
  const int64_t task_size = (units + parts - 1) / parts * heads_of_unit * head_size;
  float* partials = partial_scratch.reserve<float>(int64_t(task_list.size()) * task_size);
  auto* unfinished = unfinished_scratch.reserve<std::atomic<int64_t>>(requests * parts);
  for (int64_t request = 0; request < requests; ++request)
    for (int64_t part = 0; part < parts; ++part)
      new (&unfinished[request * parts + part]) std::atomic<int64_t>(spans_of(request));
  const Task* tasks = task_list.data();
  const int64_t* first = first_task.data();

  for_each_task(int64_t(task_list.size()), [&](int64_t index) {
    static thread_local Scratch query_scratch, score_scratch;
    const Task task = tasks[index];
    const int64_t first_unit = begin_of_part(task.part), last_unit = begin_of_part(task.part + 1);
    const int64_t first_head = first_unit * heads_of_unit;
    const int64_t heads = std::min(last_unit * heads_of_unit, problem.heads) - first_head;
    const Pages pages{problem.block_table + task.request * problem.block_table_stride, problem.block_size};
    const int64_t begin = shape.begin(task.request) + task.span * span_size;
    const int64_t end = std::min<int64_t>(begin + span_size, problem.context_lens[task.request]);
    Staged<T>* query = query_scratch.reserve<Staged<T>>(shape.query_room(heads));
    shape.stage_queries(task.request, first_head, heads, query);
    float* scores = score_scratch.reserve<float>(heads * kBlock);
    float* sums = partials + index * task_size;
    std::fill_n(sums, heads * head_size, 0.0f);
    for (int64_t head = 0; head < heads; ++head) sums[head * head_size + padded] = -std::numeric_limits<float>::max();
    for (int64_t token = begin; token < end; token += kBlock) {
      BlockRows<T> block;
      block.count = std::min(kBlock, end - token);
      shape.locate(pages, first_unit, token, block);
      shape.scores(block, query, heads, scores);
      for (int64_t head = 0; head < heads; ++head) {
        float* of_head = sums + head * head_size;
        const float shrink =
            soften(scores + head * kBlock, block.count, problem.scale, of_head[padded], of_head[padded + 1]);
        if (shrink != 1.0f)
          for (int64_t at = 0; at < padded; ++at) of_head[at] *= shrink;
      }
      shape.add_values(block, scores, heads, sums, head_size);
    }
    if (unfinished[task.request * parts + task.part].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int64_t head = 0; head < heads; ++head) {  // the last task of this row and part joins all spans, in order
      const auto span_sums = [&](int64_t span) {
        return partials + (first[task.request] + span * parts + task.part) * task_size + head * head_size;
      };
      const int64_t row_spans = spans_of(task.request);
      float maximum = -std::numeric_limits<float>::max(), total = 0.0f;
      for (int64_t span = 0; span < row_spans; ++span) maximum = std::max(maximum, span_sums(span)[padded]);
      float* joined = span_sums(0);
      for (int64_t span = 0; span < row_spans; ++span) {
        const float* part = span_sums(span);
        const float share = std::exp(part[padded] - maximum);
        total += part[padded + 1] * share;
        for (int64_t at = 0; at < padded; ++at) joined[at] = (span == 0 ? 0.0f : joined[at]) + part[at] * share;
      }
      const float scale = total > 0.0f ? 1.0f / total : 0.0f;  // a row that sees nothing becomes zero
      T* to = static_cast<T*>(problem.output) + (task.request * problem.heads + first_head + head) * value_size;
      for (int64_t at = 0; at < value_size; ++at) to[at] = narrow<T>(joined[at] * scale);
    }
  });
}

}  // namespace omni
