// Matrix products with few rows: every weight is read once, in the order it lies in memory.
//
// A product is cut into tasks of output features and, where there are many, of rows of x. Within a task, a few weight
// rows at a time meet some rows of x as dot products. The sum of one output runs over the inputs in one fixed order, so
// it does not depend on how many rows x has, nor on how many threads there are.

#include <algorithm>
#include <limits>

#include "product.h"

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

#if defined(__AMX_BF16__)
constexpr int64_t kUnitBlock = 2 * kUnitRows;    // output features
constexpr int64_t kUnitChunkBytes = 768 << 10;   // of staged x that one task meets: less than the second-level cache
constexpr int64_t kOwnChunkRows = 128;           // of x, from which on each thread stages what it multiplies

// Products by the matrix unit. What comes out of it is rounded at once.
struct UnitLinear {
  const Linear& problem;
  int64_t stride = staged_size<BFloat16>(problem.inputs);  // of staged columns

  void run() const {
    const int64_t threads = thread_count();
    const int64_t fitting = kUnitChunkBytes / (stride * int64_t(sizeof(BFloat16)));
    const int64_t share = (problem.rows + threads - 1) / threads;
    const auto chunk_of = [&](int64_t most) {
      return (std::clamp<int64_t>(most, 1, kUnitColumns) + kUnitBlock - 1) / kUnitBlock * kUnitBlock;
    };
    share >= kOwnChunkRows ? by_rows(chunk_of(std::min(fitting, share))) : by_features(chunk_of(fitting));
  }

  // What another thread has staged must be fetched from its cache, so with many rows each thread takes all features of
  // its own.
  void by_rows(int64_t chunk) const {
    for_each_task((problem.rows + chunk - 1) / chunk, [&](int64_t task) {
      static thread_local Scratch scratch;
      const int64_t first = task * chunk, count = std::min(chunk, problem.rows - first);
      auto* staged = scratch.reserve<BFloat16>(Columns<BFloat16>::room(count) * stride);
      for (int64_t row = 0; row < count; row += kUnitRows) stage_rows(first + row, count - row, staged + row * stride);
      multiply(staged, first, count, 0, problem.outputs, 0);
    });
  }

  void by_features(int64_t chunk) const {
    static thread_local Scratch scratch;
    const int64_t rows = problem.rows, groups = (rows + kUnitRows - 1) / kUnitRows;
    auto* staged = scratch.reserve<BFloat16>(groups * kUnitRows * stride);
    const auto stage_group = [&](int64_t group) {
      const int64_t row = group * kUnitRows;
      stage_rows(row, rows - row, staged + row * stride);
    };
    if (groups == 1) {
      stage_group(0);
    } else {
      for_each_task(groups, stage_group);
    }
    const int64_t blocks = (problem.outputs + kUnitBlock - 1) / kUnitBlock;
    const int64_t tasks = thread_count() * (rows < kManyRows ? kTasksPerThread : kTasksOfManyPerThread);
    const int64_t features = std::clamp<int64_t>(blocks / tasks, 1, kMostBlocks) * kUnitBlock;
    const int64_t parts = (problem.outputs + features - 1) / features, between_tasks = features * thread_count();
    for_each_task((rows + chunk - 1) / chunk * parts, [&](int64_t task) {
      const int64_t begin = task % parts * features, end = std::min(begin + features, problem.outputs);
      const int64_t first = task / parts * chunk;
      multiply(staged + first * stride, first, std::min(chunk, rows - first), begin, end,
               begin + between_tasks < problem.outputs ? between_tasks : 0);
    });
  }

  // At most 16 of `left` rows of x.
  void stage_rows(int64_t first, int64_t left, BFloat16* to) const {
    const auto* x = static_cast<const BFloat16*>(problem.x) + first * problem.x_stride;
    Columns<BFloat16>::stage_group([&](int64_t row) OMNI_LAMBDA { return x + row * problem.x_stride; },
                                   std::min(left, kUnitRows), problem.inputs, to);
  }

  // `count` rows of x with the output features [begin, end); `next`: see dot_matrix.
  void multiply(const BFloat16* staged, int64_t first, int64_t count, int64_t begin, int64_t end, int64_t next) const {
    const MatrixUnit unit;
    const auto* weight = static_cast<const BFloat16*>(problem.weight) + begin * problem.weight_stride;
    const auto* bias = problem.bias ? static_cast<const BFloat16*>(problem.bias) + begin : nullptr;
    auto* output = static_cast<BFloat16*>(problem.output) + first * problem.output_stride + begin;
    unit_product(weight, problem.weight_stride, end - begin, staged, stride, count, problem.inputs, next,
                 [&](int64_t row, int64_t feature, Floats sums, int64_t height) OMNI_LAMBDA {
                   BFloat16* to = output + row * problem.output_stride + feature;
                   if (height == kLanes) {
                     if (bias) sums += widen(bias + feature);
                     store_unit(to, sums);
                   } else {
                     for (int64_t each = 0; each < height; ++each)
                       to[each] = narrow<BFloat16>(sums[each] + (bias ? to_float(bias[feature + each]) : 0.0f));
                   }
                 });
  }
};
#endif

template <class T>
void linear_of(const Linear& problem) {
#if defined(__AMX_BF16__)
  if constexpr (kByMatrixUnit<T>) return UnitLinear{problem}.run();
#endif
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

#if defined(__AMX_BF16__)
// One head's share of a transposed product by the matrix unit: rows of x are a tile as they lie, and of each two weight
// rows the elements are put side by side.
struct UnitHead {
  static constexpr int64_t kWidth = 2 * kUnitRows;  // output features of two tiles, which are staged together
  static constexpr int64_t kAhead = 16;             // weight rows behind those that are staged, asked for

  const HeadLinear& problem;
  int64_t head, begin, end;  // output features
  int64_t steps = (problem.inputs + kUnitInputs - 1) / kUnitInputs, inputs = steps * kUnitInputs;
  int64_t row_groups = (problem.rows + kUnitRows - 1) / kUnitRows;
  int64_t widths = (end - begin + kWidth - 1) / kWidth;

  void run() const {
    static thread_local Scratch scratch;
    auto* rows = scratch.reserve<BFloat16>((row_groups * kUnitRows + widths * kWidth) * inputs);
    BFloat16* columns = rows + row_groups * kUnitRows * inputs;
    const auto* x = static_cast<const BFloat16*>(problem.x) + head * problem.x_head_stride;
    for (int64_t row = 0; row < row_groups * kUnitRows; ++row) {
      BFloat16* to = rows + row * inputs;
      std::fill(to + (row < problem.rows ? problem.inputs : 0), to + inputs, BFloat16{});
      if (row < problem.rows) std::memcpy(to, x + row * problem.x_row_stride, problem.inputs * sizeof(BFloat16));
    }
    for (int64_t input = 0; input < inputs; input += 2) stage_weights(input, columns);
    __asm__ volatile("" ::"r"(rows), "r"(columns) : "memory");
    const MatrixUnit unit(std::min(problem.rows, kUnitRows));
    for (int64_t width = 0; width < widths; ++width) {
      int64_t group = 0;
      for (; group + 2 <= row_groups; group += 2) multiply<2>(rows, group, columns, width);
      if (group < row_groups) multiply<1>(rows, group, columns, width);
    }
  }

 private:
  // Two rows of the weight: a line of each tile.
  void stage_weights(int64_t input, BFloat16* to) const {
    const auto* weight = static_cast<const BFloat16*>(problem.weight) + head * problem.weight_head_stride + begin;
    to += input / kUnitInputs * 2 * kUnitTile + input % kUnitInputs * kUnitRows;
    const BFloat16* ahead = weight + std::min(input + kAhead, problem.inputs - 2) * problem.weight_stride;
    for (int64_t at = 0; at < end - begin; at += kWidth, to += inputs * kWidth) {
      const auto part_of = [&](int64_t row) {
        return row < problem.inputs ? weight + row * problem.weight_stride + at : nullptr;
      };
      __builtin_prefetch(ahead + at);
      __builtin_prefetch(ahead + problem.weight_stride + at);
      stage_unit_pair(part_of(input), part_of(input + 1), std::min(kWidth, end - begin - at), to);
    }
  }

  template <int kGroups>
  void multiply(const BFloat16* rows, int64_t group, const BFloat16* columns, int64_t width) const {
    const int64_t row_bytes = inputs * int64_t(sizeof(BFloat16));
    rows += group * kUnitRows * inputs;
    columns += width * kWidth * inputs;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, rows + step * kUnitInputs, row_bytes);
      _tile_loadd(6, columns + step * 2 * kUnitTile, kUnitTileRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, columns + (step * 2 + 1) * kUnitTile, kUnitTileRow);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kGroups > 1) {
        _tile_loadd(5, rows + kUnitRows * inputs + step * kUnitInputs, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    alignas(kLineBytes) UnitSums sums[4];
    _tile_stored(0, sums[0], kUnitTileRow);
    _tile_stored(1, sums[1], kUnitTileRow);
    _tile_stored(2, sums[2], kUnitTileRow);
    _tile_stored(3, sums[3], kUnitTileRow);
    const int64_t first = group * kUnitRows, count = std::min(kGroups * kUnitRows, problem.rows - first);
    const int64_t at = begin + width * kWidth;
    auto* output = static_cast<BFloat16*>(problem.output) + (first * problem.heads + head) * problem.outputs + at;
    const bool whole = at + kWidth <= end;
    BFloat16 apart[kWidth];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t from = row / kUnitRows * 2, line = row % kUnitRows * kUnitRows;
      BFloat16* to = output + row * problem.heads * problem.outputs;
      BFloat16* rounded = whole ? to : apart;
      store_unit(rounded, load<Floats>(sums[from] + line));
      store_unit(rounded + kUnitRows, load<Floats>(sums[from + 1] + line));
      if (!whole) std::memcpy(to, apart, (end - at) * sizeof(BFloat16));
    }
  }
};
#endif

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
#if defined(__AMX_BF16__)
    if constexpr (kByMatrixUnit<T>) {
      if (problem.transposed) return UnitHead{problem, head, begin, begin + width}.run();
    }
#endif
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
      constexpr int64_t kTogether = Columns<T>::kTogether;
      Staged<T>* staged = x_scratch.reserve<Staged<T>>(Columns<T>::room(rows) * stride);
      for (int64_t row = 0; row < rows; row += kTogether) {
        const auto row_at = [&](int64_t m) OMNI_LAMBDA { return head_x + (row + m) * problem.x_row_stride; };
        Columns<T>::stage_group(row_at, std::min(kTogether, rows - row), inputs, staged + row * stride);
      }
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
  if (element == Element::kBFloat16 && kHasBFloat16Dot && !kByMatrixUnit<BFloat16>) return 64;
  return element == Element::kFloat32 ? 64 : std::numeric_limits<int64_t>::max();
}

void head_linear(const HeadLinear& problem) {
  with_element(problem.element, [&](auto element) { head_linear_of<decltype(element)>(problem); });
}

}  // namespace omni
