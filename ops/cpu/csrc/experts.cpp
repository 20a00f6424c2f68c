// Mixture-of-experts feed-forward for few tokens: of all experts, only those that a token chose are read.
//
// Tokens are grouped by expert; then come two passes over tasks of (expert, output features) and of output features.
// Every thread adds an expert's result to its own features, expert by expert, so each sum runs in the order of expert
// ids whatever the number of threads. Roundings to the element type stand where the plain body has them.

#include <algorithm>
#include <vector>

#include "product.h"

namespace omni {
namespace {

constexpr int64_t kLeastInnerPerTask = 32;
constexpr int64_t kMostPerTask = 128;   // inner features, or output features
constexpr int64_t kTasksPerThread = 4;  // or fewer: long streams of weights are faster than short ones
constexpr int64_t kRowsPerPiece = 16;   // that one task stages
constexpr int64_t kStagedRows = 1024;   // (token, choice) pairs that are staged at a time, or one expert's

// Tasks take whole tiles.
template <class T>
constexpr int64_t kLeastShare = kByMatrixUnit<T> ? kLeastInnerPerTask : kTileRows;

struct Chosen {  // an expert that some token chose, where its rows lie among all (token, choice) pairs, and staged
  int64_t expert, begin, end, column;
};

// silu(gate), rounded, * up, rounded, of sums that are rounded first.
template <class T>
OMNI_INLINE Floats swiglu(Floats gate, Floats up) {
  gate = rounded<T>(gate);
  return rounded<T>(rounded<T>(gate / (exponential(-gate) + 1.0f)) * rounded<T>(up));
}

#if defined(__AMX_BF16__)
// Whether tiles of weights never overlap, nor those of gates and ups.
inline bool fits_unit(const RoutedExperts& problem) {
  return problem.inner % kUnitRows == 0 && problem.dim % kUnitRows == 0;
}

// How many rows apart experts lie, where that is a number of rows.
inline int64_t expert_rows(int64_t expert_stride, int64_t row_stride) {
  return expert_stride % row_stride == 0 ? expert_stride / row_stride : 0;
}

// `width` inner features of tokens that are staged in `x`, staged in `middle` from feature `begin` on. The sums of
// gates and ups hold 16 tokens to a vector, which is how the next product takes its columns. `next`: see dot_matrix.
inline void unit_inner(const RoutedExperts& problem, const BFloat16* gate, int64_t width, const BFloat16* x,
                       int64_t x_stride, int64_t columns, int64_t next, BFloat16* middle, int64_t middle_stride,
                       int64_t begin) {
  const MatrixUnit unit;
  const int64_t stride = problem.gate_up_stride, apart = problem.inner * stride;
  for (int64_t first = 0; first < columns; first += kUnitColumns) {
    const int64_t count = std::min(kUnitColumns, columns - first);
    for (int64_t row = 0; row < width; row += kUnitRows) {
      const BFloat16* after = gate + (row + kUnitRows < width ? row + kUnitRows : next) * stride;
      const FollowingBoth following{{after, stride, problem.dim}, {after + apart, stride, problem.dim}};
      const UnitRows rows{gate + row * stride, stride, apart};
      const auto put = [&](int64_t column, int64_t, auto widths, const UnitSums* sums) OMNI_LAMBDA {
        for (int64_t group = 0; group < widths.value; ++group) {
          const int64_t staged = unit_position(first + column + group * kUnitRows, begin + row, middle_stride);
          for (int64_t line = 0; line < kUnitRows; line += 2) {
            const auto inner_of = [&](int64_t each) OMNI_LAMBDA {
              const int64_t at = (line + each) * kUnitRows;
              return swiglu<BFloat16>(load<Floats>(sums[2 * group] + at), load<Floats>(sums[2 * group + 1] + at));
            };
            store_unit_pairs(middle + staged + line * kUnitRows, inner_of(0), inner_of(1));
          }
        }
      };
      unit_columns<2>(rows, x + first * x_stride, x_stride, count, problem.dim, following, put);
    }
  }
}
#endif

// Adds what some neighbouring experts give to sums [tokens, dim].
template <class T>
void add_experts(const RoutedExperts& problem, const Chosen* chosen, int64_t experts, const int64_t* order,
                 float* sums) {
  static thread_local Scratch hidden_scratch, inner_scratch;
  const int64_t choices = problem.experts_per_token, dim = problem.dim, inner = problem.inner;
  const auto column_of = [&](const Chosen& one) { return one.column - chosen[0].column; };
  const Chosen& last = chosen[experts - 1];
  const int64_t columns = column_of(last) + Columns<T>::room(last.end - last.begin);

  // staged row by row in the order of experts, so that an expert's rows are one matrix
  const int64_t hidden_stride = staged_size<T>(dim), inner_stride = staged_size<T>(inner);
  auto* hidden = hidden_scratch.reserve<Staged<T>>(columns * hidden_stride);
  auto* middle = inner_scratch.reserve<Staged<T>>(columns * inner_stride);
  const auto* from = static_cast<const T*>(problem.hidden);
  struct Piece {
    int64_t pair, count, column;
  };
  constexpr int64_t kTogether = Columns<T>::kTogether;
  static thread_local std::vector<Piece> piece_list;
  piece_list.clear();
  for (int64_t index = 0; index < experts; ++index)
    for (int64_t pair = chosen[index].begin; pair < chosen[index].end; pair += kRowsPerPiece)
      piece_list.push_back({pair, std::min(kRowsPerPiece, chosen[index].end - pair),
                            column_of(chosen[index]) + pair - chosen[index].begin});
  const Piece* pieces = piece_list.data();
  for_each_task(int64_t(piece_list.size()), [&](int64_t task) {
    const Piece& piece = pieces[task];
    for (int64_t done = 0; done < piece.count; done += kTogether) {
      const int64_t pair = piece.pair + done, column = piece.column + done;
      Columns<T>::stage_group(
          [&](int64_t each) OMNI_LAMBDA { return from + order[pair + each] / choices * problem.hidden_stride; },
          std::min(kTogether, piece.count - done), dim, hidden + column * hidden_stride);
      Staged<T>* end = middle + (column + kTogether) * inner_stride;
      std::fill(end - kTogether * Staging<T>::kStep, end, Staged<T>{});  // the tail behind `inner`
    }
  });

  const int64_t inner_share = experts * inner / (thread_count() * kTasksPerThread) / kLeastShare<T> * kLeastShare<T>;
  const int64_t inner_per_task = std::clamp<int64_t>(inner_share, kLeastInnerPerTask, kMostPerTask);
  const int64_t parts = (inner + inner_per_task - 1) / inner_per_task;
  for_each_task(experts * parts, [&](int64_t task) {
    const Chosen& one = chosen[task / parts];
    const int64_t begin = task % parts * inner_per_task, width = std::min(inner_per_task, inner - begin);
    const T* gate = static_cast<const T*>(problem.gate_up) + one.expert * problem.gate_up_expert_stride +
                    begin * problem.gate_up_stride;
#if defined(__AMX_BF16__)
    if constexpr (kByMatrixUnit<T>) {
      if (fits_unit(problem)) {
        const int64_t following = std::min(task + thread_count(), experts * parts - 1);
        const int64_t next = expert_rows(problem.gate_up_expert_stride, problem.gate_up_stride) *
                                 (chosen[following / parts].expert - one.expert) +
                             following % parts * inner_per_task - begin;
        return unit_inner(problem, gate, width, hidden + column_of(one) * hidden_stride, hidden_stride,
                          one.end - one.begin, next, middle + column_of(one) * inner_stride, inner_stride, begin);
      }
    }
#endif
    const T* up = gate + inner * problem.gate_up_stride;
    constexpr int64_t kStride = kMostPerTask + kSpare;
    float gates[kColumnsAtOnce * kStride], ups[kColumnsAtOnce * kStride];
    for (int64_t row = 0; row < one.end - one.begin; row += kColumnsAtOnce) {
      const int64_t count = std::min(kColumnsAtOnce, one.end - one.begin - row);
      const int64_t staged = column_of(one) + row;
      const Staged<T>* x = hidden + staged * hidden_stride;
      dot_matrix<T>(gate, problem.gate_up_stride, width, x, hidden_stride, count, dim, gates, kStride, 0);
      dot_matrix<T>(up, problem.gate_up_stride, width, x, hidden_stride, count, dim, ups, kStride, 0);
      for (int64_t column = 0; column < count; ++column) {
        const auto put = [&](int64_t n, float value) OMNI_LAMBDA {
          Staged<T>& to = middle[Columns<T>::position(staged + column, begin + n, inner_stride)];
          if constexpr (std::is_same_v<Staged<T>, T>) {
            to = narrow<T>(value);
          } else {
            to = value;
          }
        };
        for (int64_t n = 0; n < width; n += kLanes) {  // behind `width` stands what nobody reads
          float values[kLanes];
          const int64_t at = column * kStride + n;
          store(values, swiglu<T>(load<Floats>(gates + at), load<Floats>(ups + at)));
          for (int64_t each = 0; each < std::min<int64_t>(kLanes, width - n); ++each) put(n + each, values[each]);
        }
      }
    }
  });

  const int64_t share = dim / (thread_count() * kTasksPerThread) / kLeastShare<T> * kLeastShare<T>;
  const int64_t dims_per_task = std::clamp<int64_t>(share, kLeastShare<T>, kMostPerTask);
  for_each_task((dim + dims_per_task - 1) / dims_per_task, [&](int64_t task) {
    const int64_t begin = task * dims_per_task, width = std::min(dims_per_task, dim - begin);
    constexpr int64_t kStride = kMostPerTask + kSpare;
    float results[kColumnsAtOnce * kStride];
    for (int64_t index = 0; index < experts; ++index) {
      const Chosen& one = chosen[index];
      const T* down = static_cast<const T*>(problem.down) + one.expert * problem.down_expert_stride +
                      begin * problem.down_stride;
#if defined(__AMX_BF16__)
      if constexpr (kByMatrixUnit<T>) {
        if (fits_unit(problem)) {
          const int64_t next = expert_rows(problem.down_expert_stride, problem.down_stride) *
                               (chosen[std::min(index + 1, experts - 1)].expert - one.expert);
          const MatrixUnit unit;
          for (int64_t first = 0; first < one.end - one.begin; first += kUnitColumns)
            unit_product(down, problem.down_stride, width, middle + (column_of(one) + first) * inner_stride,
                         inner_stride, std::min(kUnitColumns, one.end - one.begin - first), inner, next,
                         [&](int64_t column, int64_t row, Floats of_rows, int64_t) OMNI_LAMBDA {
                           const int64_t pair = order[one.begin + first + column];
                           float* to = sums + pair / choices * dim + begin + row;
                           store(to, load<Floats>(to) + rounded<T>(of_rows) * problem.weights[pair]);
                         });
          continue;
        }
      }
#endif
      for (int64_t row = 0; row < one.end - one.begin; row += kColumnsAtOnce) {
        const int64_t count = std::min(kColumnsAtOnce, one.end - one.begin - row);
        dot_matrix<T>(down, problem.down_stride, width, middle + (column_of(one) + row) * inner_stride, inner_stride,
                      count, inner, results, kStride, 0);
        for (int64_t column = 0; column < count; ++column) {
          const int64_t pair = order[one.begin + row + column];
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
  for (int64_t expert = 0, column = 0; expert < problem.experts; ++expert) {
    const int64_t begin = starts[expert], end = begin + starts[expert + 1];
    if (end > begin) chosen.push_back({expert, begin, end, column});
    column += Columns<T>::room(end - begin);
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
