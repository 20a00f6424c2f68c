// Mixture-of-experts feed-forward for few tokens: of all experts, only those that a token chose are read.
//
// Tokens are grouped by expert; then come two passes over tasks of (expert, output features) and of output features.
// Every thread adds an expert's result to its own features, expert by expert, so each sum runs in the order of expert
// ids whatever the number of threads. Roundings to the element type stand where the plain body has them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "tiles.h"

namespace omni {
namespace {

constexpr int64_t kLeastInnerPerTask = 32;
constexpr int64_t kMostPerTask = 128;   // inner features, or output features
constexpr int64_t kTasksPerThread = 4;  // or fewer: long streams of weights are faster than short ones
constexpr int64_t kStagedRows = 1024;   // (token, choice) pairs that are staged at a time, or one expert's

struct Chosen {  // an expert that some token chose, and where its rows lie among all (token, choice) pairs
  int64_t expert, begin, end;
};

template <class T>
T swiglu(float gate, float up) {
  gate = to_float(narrow<T>(gate));
  const float silu = to_float(narrow<T>(gate / (1.0f + std::exp(-gate))));
  return narrow<T>(silu * to_float(narrow<T>(up)));
}

// Adds what some neighbouring experts give to sums [tokens, dim].
template <class T>
void add_experts(const RoutedExperts& problem, const Chosen* chosen, int64_t experts, const int64_t* order,
                 float* sums) {
  static thread_local Scratch hidden_scratch, inner_scratch;
  const int64_t choices = problem.experts_per_token, dim = problem.dim, inner = problem.inner;
  const int64_t first = chosen[0].begin, rows = chosen[experts - 1].end - first;

  // staged row by row in the order of experts, so that an expert's rows are one matrix
  const int64_t hidden_stride = staged_size<T>(dim), inner_stride = staged_size<T>(inner);
  auto* hidden = hidden_scratch.reserve<Staged<T>>(rows * hidden_stride);
  auto* middle = inner_scratch.reserve<Staged<T>>(rows * inner_stride);
  const auto* from = static_cast<const T*>(problem.hidden);
  constexpr int64_t kRowsPerTask = 16;
  for_each_task((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    for (int64_t row = task * kRowsPerTask; row < std::min(rows, (task + 1) * kRowsPerTask); ++row) {
      stage<T>(from + order[first + row] / choices * problem.hidden_stride, dim, hidden + row * hidden_stride);
      Staged<T>* end = middle + (row + 1) * inner_stride;
      std::fill(end - Staging<T>::kStep, end, Staged<T>{});  // the tail behind `inner`
    }
  });

  const int64_t inner_share = experts * inner / (thread_count() * kTasksPerThread) / kTileRows * kTileRows;
  const int64_t inner_per_task = std::clamp<int64_t>(inner_share, kLeastInnerPerTask, kMostPerTask);
  const int64_t parts = (inner + inner_per_task - 1) / inner_per_task;
  for_each_task(experts * parts, [&](int64_t task) {
    const Chosen& one = chosen[task / parts];
    const int64_t begin = task % parts * inner_per_task, width = std::min(inner_per_task, inner - begin);
    const T* gate = static_cast<const T*>(problem.gate_up) + one.expert * problem.gate_up_expert_stride +
                    begin * problem.gate_up_stride;
    const T* up = gate + inner * problem.gate_up_stride;
    constexpr int64_t kStride = kMostPerTask + kSpare;
    float gates[kColumnsAtOnce * kStride], ups[kColumnsAtOnce * kStride];
    for (int64_t row = one.begin - first; row < one.end - first; row += kColumnsAtOnce) {
      const int64_t count = std::min(kColumnsAtOnce, one.end - first - row);
      const Staged<T>* x = hidden + row * hidden_stride;
      dot_matrix<T>(gate, problem.gate_up_stride, width, x, hidden_stride, count, dim, gates, kStride, 0);
      dot_matrix<T>(up, problem.gate_up_stride, width, x, hidden_stride, count, dim, ups, kStride, 0);
      for (int64_t column = 0; column < count; ++column) {
        Staged<T>* to = middle + (row + column) * inner_stride;
        for (int64_t n = 0; n < width; ++n) {
          const T value = swiglu<T>(gates[column * kStride + n], ups[column * kStride + n]);
          if constexpr (std::is_same_v<Staged<T>, T>) {
            to[begin + n] = value;
          } else {
            to[Staging<T>::position(begin + n)] = to_float(value);
          }
        }
      }
    }
  });

  const int64_t share = dim / (thread_count() * kTasksPerThread) / kTileRows * kTileRows;
  const int64_t dims_per_task = std::clamp<int64_t>(share, kTileRows, kMostPerTask);
  for_each_task((dim + dims_per_task - 1) / dims_per_task, [&](int64_t task) {
    const int64_t begin = task * dims_per_task, width = std::min(dims_per_task, dim - begin);
    constexpr int64_t kStride = kMostPerTask + kSpare;
    float results[kColumnsAtOnce * kStride];
    for (int64_t index = 0; index < experts; ++index) {
      const Chosen& one = chosen[index];
      const T* down = static_cast<const T*>(problem.down) + one.expert * problem.down_expert_stride +
                      begin * problem.down_stride;
      for (int64_t row = one.begin - first; row < one.end - first; row += kColumnsAtOnce) {
        const int64_t count = std::min(kColumnsAtOnce, one.end - first - row);
        dot_matrix<T>(down, problem.down_stride, width, middle + row * inner_stride, inner_stride, count, inner,
                      results, kStride, 0);
        for (int64_t column = 0; column < count; ++column) {
          const int64_t pair = order[first + row + column];
          const float weight = problem.weights[pair];
          float* to = sums + pair / choices * dim + begin;
          for (int64_t n = 0; n < width; ++n) to[n] += to_float(narrow<T>(results[column * kStride + n])) * weight;
        }
      }
    }
  });
}

template <class T>
void experts_of(const RoutedExperts& problem) {
  static thread_local Scratch output_scratch;
  const int64_t pairs = problem.tokens * problem.experts_per_token, dim = problem.dim;

  std::vector<int64_t> starts(problem.experts + 1);
  for (int64_t pair = 0; pair < pairs; ++pair) ++starts[problem.expert_ids[pair] + 1];
  std::vector<Chosen> chosen;
  for (int64_t expert = 0; expert < problem.experts; ++expert) {
    const int64_t begin = starts[expert], end = begin + starts[expert + 1];
    if (end > begin) chosen.push_back({expert, begin, end});
    starts[expert + 1] = end;
  }
  std::vector<int64_t> order(pairs);  // pairs by expert, then by token
  for (int64_t pair = 0; pair < pairs; ++pair) order[starts[problem.expert_ids[pair]]++] = pair;

  float* sums = output_scratch.reserve<float>(problem.tokens * dim);
  std::memset(sums, 0, problem.tokens * dim * sizeof(float));
  for (size_t first = 0, last; first < chosen.size(); first = last) {
    for (last = first + 1; last < chosen.size(); ++last)
      if (chosen[last].end - chosen[first].begin > kStagedRows) break;
    add_experts<T>(problem, chosen.data() + first, int64_t(last - first), order.data(), sums);
  }
  auto* output = static_cast<T*>(problem.output);
  for (int64_t at = 0; at < problem.tokens * dim; ++at) output[at] = narrow<T>(sums[at]);
}

}  // namespace

void routed_experts(const RoutedExperts& problem) {
  with_element(problem.element, [&](auto element) { experts_of<decltype(element)>(problem); });
}

}  // namespace omni
