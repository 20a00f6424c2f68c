// Causal attention of many tokens of one context: products of tiles in float32, the softmax between them kept running.
//
// A task is some neighbouring tokens with all query heads of one KV head. It goes through the keys in blocks that begin
// at multiples of kKeys of the context, so what comes out for a token does not depend on how a prompt is cut into
// chunks, nor on the number of threads. Keys are turned around first: then scores and outputs are both sums of rows.

#include <algorithm>
#include <cmath>
#include <limits>

#include "tiles.h"
#include "unit_attention.h"

namespace omni {
namespace {

constexpr int64_t kKeys = 64;      // of a block
constexpr int64_t kMostRows = 384;  // (token, head) pairs that meet a block together, so that it is widened once,
constexpr int64_t kTasksPerThread = 4;  // but no more than leave a few tasks for every thread
constexpr int kTileQueries = kRegisters == 32 ? 12 : 6, kTileVectors = 2;
constexpr int64_t kTileWidth = kTileVectors * kLanes;
constexpr float kLowest = -std::numeric_limits<float>::max();

constexpr int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// to[index * kKeys + key] = rows[key][index]; zeros stand for keys behind `count`.
template <class T>
void turn_around(const T* rows, int64_t row_stride, int64_t count, int64_t dim, float* to) {
  for (int64_t key = 0; key < kKeys; key += kLanes) {
    int64_t at = 0;
    if (key + kLanes <= count) {
      for (; at + kLanes <= dim; at += kLanes) {
        Floats square[kLanes];
        OMNI_UNROLL
        for (int row = 0; row < kLanes; ++row) square[row] = widen(rows + (key + row) * row_stride + at);
        transpose(square);
        OMNI_UNROLL
        for (int index = 0; index < kLanes; ++index) store(to + (at + index) * kKeys + key, square[index]);
      }
    }
    for (; at < dim; ++at)
      for (int64_t row = key; row < key + kLanes; ++row)
        to[at * kKeys + row] = row < count ? to_float(rows[row * row_stride + at]) : 0.0f;
  }
}

template <class T>
void widen_rows(const T* rows, int64_t row_stride, int64_t count, int64_t size, float* to, int64_t to_stride) {
  for (int64_t row = 0; row < count; ++row) {
    const T* from = rows + row * row_stride;
    float* target = to + row * to_stride;
    int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) store(target + at, widen(from + at));
    for (; at < size; ++at) target[at] = to_float(from[at]);
    std::fill(target + size, target + to_stride, 0.0f);
  }
}

// to[query][index] += sum over `count` rows of weights[query][row] * rows[row][index], for kTileQueries queries and
// `width` indices, a multiple of kTileWidth.
OMNI_INLINE void add_rows(const float* rows, int64_t row_stride, int64_t count, const float* weights,
                          int64_t weights_stride, float* to, int64_t to_stride, int64_t width) {
  for (int64_t at = 0; at < width; at += kTileWidth) {
    const auto row_at = [&](int64_t row) OMNI_LAMBDA { return rows + row * row_stride + at; };
    weighted_tile<kTileQueries, kTileVectors>(row_at, count, weights, weights_stride, to + at, to_stride);
  }
}

// Turns the scores of a block into weights relative to the running maximum of one query, which sees the keys of
// [first, last); others weigh nothing. Returns by how much earlier sums shrink. Between two passes over the lanes all
// scores of a block are in registers.
OMNI_INLINE float soften_block(float* scores, int64_t first, int64_t last, float scale, float& maximum, float& total) {
  constexpr int kVectors = kKeys / kLanes;
  std::fill(scores, scores + first, kLowest);
  std::fill(scores + last, scores + kKeys, kLowest);
  Floats values[kVectors], largest = splat(maximum);
  OMNI_UNROLL
  for (int at = 0; at < kVectors; ++at) {
    const Floats scaled = load<Floats>(scores + at * kLanes) * scale;
    values[at] = scaled < splat(kLowest) ? splat(kLowest) : scaled;
    largest = larger(values[at], largest);
  }
  const float reached = largest_of(largest);
  Floats sum = {};
  OMNI_UNROLL
  for (int at = 0; at < kVectors; ++at) {
    const Floats weight = exponential(values[at] - reached);
    store(scores + at * kLanes, weight);
    sum += weight;
  }
  if (first > 0 || last < kKeys) {
    std::fill(scores, scores + first, 0.0f);
    std::fill(scores + last, scores + kKeys, 0.0f);
    sum = Floats{};
    for (int64_t key = 0; key < kKeys; key += kLanes) sum += load<Floats>(scores + key);
  }
  const float shrink = maximum == reached ? 1.0f : std::exp(maximum - reached);
  total = total * shrink + sum_of(sum);
  maximum = reached;
  return shrink;
}

template <class T>
void attend_causally(const CausalAttention& problem) {
  const int64_t group = problem.heads / problem.kv_heads, dim = problem.dim, value_dim = problem.value_dim;
  const int64_t share = problem.queries * problem.heads / (thread_count() * kTasksPerThread);
  const int64_t tokens_per_task = std::max<int64_t>(std::min(kMostRows, share) / group, 1);
#if defined(__AMX_BF16__)
  if constexpr (kByMatrixUnit<T>) return UnitAttention(problem).run(tokens_per_task);
#endif
  const int64_t parts = (problem.queries + tokens_per_task - 1) / tokens_per_task;
  const int64_t most_rows = round_up(tokens_per_task * group, kTileQueries);
  const int64_t padded_values = round_up(value_dim, kTileWidth), before = problem.context - problem.queries;
  for_each_task(parts * problem.kv_heads, [&](int64_t task) {
    static thread_local Scratch scratch;
    // The last tokens see most, and are computed first: so the threads end together.
    const int64_t kv_head = task % problem.kv_heads, part = parts - 1 - task / problem.kv_heads;
    const int64_t first_token = part * tokens_per_task;
    const int64_t tokens = std::min(tokens_per_task, problem.queries - first_token), rows = tokens * group;
    const int64_t tiled_rows = round_up(rows, kTileQueries);
    float* query =
        scratch.reserve<float>(most_rows * (dim + kKeys + padded_values + 2) + kKeys * (dim + padded_values));
    float* keys = query + most_rows * dim;
    float* values = keys + kKeys * dim;
    float* scores = values + kKeys * padded_values;
    float* sums = scores + most_rows * kKeys;
    float* maxima = sums + most_rows * padded_values;
    float* totals = maxima + most_rows;
    for (int64_t token = 0; token < tokens; ++token)
      widen_rows(static_cast<const T*>(problem.query) + (first_token + token) * problem.query_stride +
                     kv_head * group * problem.query_head_stride,
                 problem.query_head_stride, group, dim, query + token * group * dim, dim);
    std::fill(query + rows * dim, query + tiled_rows * dim, 0.0f);
    std::fill_n(sums, tiled_rows * padded_values, 0.0f);
    std::fill_n(maxima, tiled_rows, kLowest);
    std::fill_n(totals, tiled_rows, 0.0f);
    const int64_t first_position = before + first_token, end = first_position + tokens;
    const auto sees_from = [&](int64_t position) {
      return problem.window < 0 ? int64_t(0) : std::max<int64_t>(position + 1 - problem.window, 0);
    };
    for (int64_t block = sees_from(first_position) / kKeys * kKeys; block < end; block += kKeys) {
      const int64_t count = std::min(kKeys, end - block);
      turn_around(static_cast<const T*>(problem.key) + block * problem.key_stride + kv_head * problem.key_head_stride,
                  problem.key_stride, count, dim, keys);
      widen_rows(static_cast<const T*>(problem.value) + block * problem.value_stride +
                     kv_head * problem.value_head_stride,
                 problem.value_stride, count, value_dim, values, padded_values);
      for (int64_t row = 0; row < tiled_rows; row += kTileQueries) {
        const auto position_of = [&](int64_t one) { return first_position + std::min(one, rows - 1) / group; };
        // the last token of a tile sees most; behind that nothing need be computed
        const int64_t seen = std::min(position_of(row + kTileQueries - 1) + 1 - block, count);
        if (seen <= 0) continue;
        float* of_tile = scores + row * kKeys;
        std::fill_n(of_tile, kTileQueries * kKeys, 0.0f);
        add_rows(keys, kKeys, dim, query + row * dim, dim, of_tile, kKeys, round_up(seen, kTileWidth));
        for (int64_t one = row; one < row + kTileQueries; ++one) {
          float* weights = scores + one * kKeys;
          const int64_t position = position_of(one);
          const int64_t first = std::clamp<int64_t>(sees_from(position) - block, 0, count);
          const int64_t last = std::clamp<int64_t>(position + 1 - block, 0, count);
          if (one >= rows || first >= last) {
            std::fill_n(weights, kKeys, 0.0f);
            continue;
          }
          const float shrink = soften_block(weights, first, last, problem.scale, maxima[one], totals[one]);
          if (shrink != 1.0f)
            for (int64_t at = 0; at < padded_values; ++at) sums[one * padded_values + at] *= shrink;
        }
        add_rows(values, padded_values, seen, of_tile, kKeys, sums + row * padded_values, padded_values, padded_values);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = first_token + row / group, head = kv_head * group + row % group;
      const float factor = 1.0f / totals[row];  // every token sees itself
      T* to = static_cast<T*>(problem.output) + (token * problem.heads + head) * value_dim;
      for (int64_t at = 0; at < value_dim; ++at) to[at] = narrow<T>(sums[row * padded_values + at] * factor);
    }
  });
}

}  // namespace

void causal_attention(const CausalAttention& problem) {
  with_element(problem.element, [&](auto element) { attend_causally<decltype(element)>(problem); });
}

}  // namespace omni
