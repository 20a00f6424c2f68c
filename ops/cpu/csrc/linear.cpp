// Matrix products with few rows: every weight is read once, in the order it lies in memory.
//
// A product is cut into tasks of output features and, where there are many, of rows of x. Within a task, a few weight
// rows at a time meet some rows of x as dot products. The sum of one output runs over the inputs in one fixed order, so
// it does not depend on how many rows x has, nor on how many threads there are.

#include <algorithm>
#include <limits>

#include "tiles.h"

namespace omni {
namespace {

constexpr int64_t kStagedBytes = 8 << 20;  // of x that are staged at a time
constexpr int64_t kManyRows = 16;          // from which on threads share the staging, and tasks are smaller
constexpr int64_t kTasksPerThread = 4, kTasksOfManyPerThread = 16;
constexpr int64_t kRowsPerTask = 256;  // of x,
constexpr int64_t kBlockRows = 24;     // and whole blocks of output features,
constexpr int64_t kMostBlocks = 16;    // at most so many
constexpr int64_t kSums = kColumnsAtOnce * (kRowsAtOnce + kSpare);

static_assert(kSums >= std::max(kTileColumns, kWideColumns) * (kMostBlocks * kBlockRows + kSpare));

template <class T>
void multiply(const Linear& problem, const Staged<T>* x, int64_t x_stride, int64_t first, int64_t count) {
  const auto* weight = static_cast<const T*>(problem.weight);
  const auto* bias = static_cast<const T*>(problem.bias);
  auto* output = static_cast<T*>(problem.output) + first * problem.output_stride;
  const int64_t inputs = problem.inputs, outputs = problem.outputs;
  const int64_t blocks = (outputs + kBlockRows - 1) / kBlockRows;
  const int64_t tasks = thread_count() * (count < kManyRows ? kTasksPerThread : kTasksOfManyPerThread);
  const int64_t blocks_per_task = std::clamp<int64_t>(blocks / tasks, 1, kMostBlocks);
  const int64_t between_tasks = blocks_per_task * kBlockRows * thread_count();  // of one thread, in rows of the weight
  const int64_t parts = (blocks + blocks_per_task - 1) / blocks_per_task;
  for_each_task((count + kRowsPerTask - 1) / kRowsPerTask * parts, [&](int64_t task) {
    const int64_t begin = task % parts * blocks_per_task * kBlockRows;
    const int64_t end = std::min(begin + blocks_per_task * kBlockRows, outputs);
    const int64_t first_row = task / parts * kRowsPerTask, last_row = std::min(first_row + kRowsPerTask, count);
    float sums[kSums];
    for (int64_t row = first_row; row < last_row; row += kColumnsAtOnce) {
      const int64_t rows = std::min(kColumnsAtOnce, last_row - row);
      const int64_t at_once = rows <= kTileOfColumns<T> ? kMostBlocks * kBlockRows : kRowsAtOnce;
      const int64_t sums_stride = at_once + kSpare;
      for (int64_t n = begin; n < end; n += at_once) {
        const int64_t width = std::min(at_once, end - n);
        const T* from = weight + n * problem.weight_stride;
        const int64_t next = n + width < end ? n + width : begin + between_tasks;
        dot_matrix<T>(from, problem.weight_stride, width, x + row * x_stride, x_stride, rows, inputs, sums, sums_stride,
                      next + width <= outputs ? next - n : 0);
        for (int64_t m = 0; m < rows; ++m) {
          T* to = output + (row + m) * problem.output_stride + n;
          float* from = sums + m * sums_stride;
          if (bias)
            for (int64_t r = 0; r < width; ++r) from[r] += to_float(bias[n + r]);
          int64_t r = 0;
          for (; r + kLanes <= width; r += kLanes) store_rounded(to + r, rounded<T>(load<Floats>(from + r)));
          for (; r < width; ++r) to[r] = narrow<T>(from[r]);
        }
      }
    }
  });
}

template <class T>
void linear_of(const Linear& problem) {
  const auto* x = static_cast<const T*>(problem.x);
  if constexpr (Staging<T>::kSame) {
    if (problem.inputs % Staging<T>::kStep == 0)
      return multiply<T>(problem, reinterpret_cast<const Staged<T>*>(x), problem.x_stride, 0, problem.rows);
  }
  static thread_local Scratch scratch;
  const int64_t stride = staged_size<T>(problem.inputs);
  const int64_t fitting = kStagedBytes / (stride * int64_t(sizeof(Staged<T>))) / kRowsPerTask * kRowsPerTask;
  const int64_t at_once = std::min(std::max(fitting, kRowsPerTask), problem.rows);
  auto* staged = scratch.reserve<Staged<T>>(at_once * stride);
  for (int64_t row = 0; row < problem.rows; row += at_once) {
    const int64_t count = std::min(at_once, problem.rows - row);
    const auto stage_row = [&](int64_t m) {
      stage<T>(x + (row + m) * problem.x_stride, problem.inputs, staged + m * stride);
    };
    if (count < kManyRows) {
      for (int64_t m = 0; m < count; ++m) stage_row(m);
    } else {
      for_each_task(count, stage_row);
    }
    multiply<T>(problem, staged, stride, row, count);
  }
}

// One head's share of the outputs, few enough that batches of one row keep all threads busy.
constexpr int64_t kHeadOutputs = 128;

template <class T>
void head_linear_of(const HeadLinear& problem) {
  const auto* x = static_cast<const T*>(problem.x);
  const auto* weight = static_cast<const T*>(problem.weight);
  auto* output = static_cast<T*>(problem.output);
  const int64_t rows = problem.rows, heads = problem.heads, inputs = problem.inputs, outputs = problem.outputs;
  const int64_t parts = (outputs + kHeadOutputs - 1) / kHeadOutputs;
  for_each_task(heads * parts, [&](int64_t task) {
    static thread_local Scratch x_scratch, sums_scratch, pointers_scratch;
    const int64_t head = task / parts, begin = task % parts * kHeadOutputs;
    const int64_t width = std::min(kHeadOutputs, outputs - begin);
    const T* head_weight = weight + head * problem.weight_head_stride;
    const int64_t sums_stride = width + kSpare;
    float* sums = sums_scratch.reserve<float>(rows * sums_stride);
    const T* head_x = x + head * problem.x_head_stride;
    if (problem.transposed) {  // a weight row is scaled by one input and added to the outputs
      float* scales = x_scratch.reserve<float>(rows * inputs);
      const T** pointers = pointers_scratch.reserve<const T*>(inputs);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < inputs; ++k)
          scales[row * inputs + k] = to_float(head_x[row * problem.x_row_stride + k]);
      for (int64_t k = 0; k < inputs; ++k) pointers[k] = head_weight + k * problem.weight_stride + begin;
      std::fill_n(sums, rows * sums_stride, 0.0f);
      weighted_sums<T>(pointers, inputs, width, scales, inputs, rows, sums, sums_stride);
    } else {
      const int64_t stride = staged_size<T>(inputs);
      Staged<T>* staged = x_scratch.reserve<Staged<T>>(rows * stride);
      for (int64_t row = 0; row < rows; ++row)
        stage<T>(head_x + row * problem.x_row_stride, inputs, staged + row * stride);
      for (int64_t row = 0; row < rows; row += kColumnsAtOnce)
        dot_matrix<T>(head_weight + begin * problem.weight_stride, problem.weight_stride, width, staged + row * stride,
                      stride, std::min(kColumnsAtOnce, rows - row), inputs, sums + row * sums_stride, sums_stride, 0);
    }
    for (int64_t row = 0; row < rows; ++row) {
      T* to = output + (row * heads + head) * outputs + begin;
      for (int64_t n = 0; n < width; ++n) to[n] = narrow<T>(sums[row * sums_stride + n]);
    }
  });
}

}  // namespace

void linear(const Linear& problem) {
  with_element(problem.element, [&](auto element) { linear_of<decltype(element)>(problem); });
}

int64_t most_rows(Element element) {
  if (element == Element::kBFloat16 && kHasBFloat16Dot) return 64;
  return element == Element::kFloat32 ? 64 : std::numeric_limits<int64_t>::max();
}

void head_linear(const HeadLinear& problem) {
  with_element(problem.element, [&](auto element) { head_linear_of<decltype(element)>(problem); });
}

}  // namespace omni
