// The two register-blocked inner loops that every kernel is made of: dot products of rows, and weighted sums of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "vector.h"

namespace omni {

#if defined(__AVX512BF16__)
constexpr bool kHasBFloat16Dot = true;
#else
constexpr bool kHasBFloat16Dot = false;
#endif

// How a row is kept while it is multiplied with many others, and how many elements one step of a dot product takes.
// Rows are staged with zeros up to a whole step.
template <class T>
struct Staging {  // float32, float16: floats in order
  using Type = float;
  static constexpr int kStep = kLanes;
  static constexpr bool kSame = sizeof(T) == sizeof(float);
  static constexpr int64_t position(int64_t index) { return index; }
};

#if defined(__AVX512BF16__)
template <>
struct Staging<BFloat16> {
  using Type = BFloat16;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kSame = true;
  static constexpr int64_t position(int64_t index) { return index; }
};
#else
// Two bfloat16 share a 32-bit word, and a shift and a mask take them apart: so floats are staged with the even elements
// of a step first, then the odd ones.
template <>
struct Staging<BFloat16> {
  using Type = float;
  static constexpr int kStep = 2 * kLanes;
  static constexpr bool kSame = false;
  static constexpr int64_t position(int64_t index) {
    return index / kStep * kStep + index % 2 * kLanes + index % kStep / 2;
  }
};
#endif

template <class T>
using Staged = typename Staging<T>::Type;

template <class T>
constexpr int64_t staged_size(int64_t size) {
  return (size + Staging<T>::kStep - 1) / Staging<T>::kStep * Staging<T>::kStep;
}

template <class T>
OMNI_INLINE void stage(const T* from, int64_t size, Staged<T>* to) {
  if constexpr (Staging<T>::kSame) {
    std::memcpy(to, from, size * sizeof(T));
    std::memset(to + size, 0, (staged_size<T>(size) - size) * sizeof(T));
  } else {
    int64_t index = 0;
    if constexpr (Staging<T>::kStep == kLanes) {
      for (; index + kLanes <= size; index += kLanes) store(to + index, widen(from + index));
    } else {
      for (; index + 2 * kLanes <= size; index += 2 * kLanes) {
        const Words pairs = load<Words>(from + index);
        store(to + index, bits_as<Floats>(pairs << 16));
        store(to + index + kLanes, bits_as<Floats>(pairs & 0xffff0000u));
      }
    }
    if (index < size) std::memset(to + index, 0, Staging<T>::kStep * sizeof(float));
    for (; index < size; ++index) to[Staging<T>::position(index)] = to_float(from[index]);
  }
}

constexpr int kTileRows = 4;
constexpr int kTileColumns = kRegisters == 32 ? 6 : 3;  // kTileRows * columns sums, the columns, one row: all registers

template <class T, int kRows, int kColumns>
OMNI_INLINE void dot_step(Floats (&sums)[kRows][kColumns], const T* const (&rows)[kRows], int64_t at,
                          const Staged<T>* x, int64_t x_stride) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    __m512i columns[kColumns];
    OMNI_UNROLL
    for (int c = 0; c < kColumns; ++c) columns[c] = _mm512_loadu_si512(x + c * x_stride + at);
    OMNI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const __m512i row = _mm512_loadu_si512(rows[r] + at);
      OMNI_UNROLL
      for (int c = 0; c < kColumns; ++c)
        sums[r][c] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][c], (__m512bh)row, (__m512bh)columns[c]);
    }
    return;
  }
#endif
  constexpr int kParts = Staging<T>::kStep / kLanes;
  OMNI_UNROLL
  for (int part = 0; part < kParts; ++part) {
    Floats columns[kColumns];
    OMNI_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      Floats column = load<Floats>(x + c * x_stride + at + part * kLanes);
      OMNI_IN_REGISTER(column);
      columns[c] = column;
    }
    OMNI_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Floats row;
      if constexpr (kParts == 2) {
        Words pairs = load<Words>(rows[r] + at);
        if constexpr (kColumns < kTileColumns) {
          row = bits_as<Floats>(part == 0 ? pairs << 16 : pairs & 0xffff0000u);
        } else {  // a mask would take the register of a sum
          if (part == 1) {
            pairs >>= 16;
            OMNI_IN_REGISTER(pairs);
          }
          row = bits_as<Floats>(pairs << 16);
        }
      } else {
        row = widen(rows[r] + at);
      }
      OMNI_IN_REGISTER(row);
      OMNI_UNROLL
      for (int c = 0; c < kColumns; ++c) sums[r][c] += row * columns[c];
    }
  }
}

// Memory that will be read next, asked for a little at a time while there is something to compute.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;

  template <int kLines>
  OMNI_INLINE void ask() {
    if (kLines == 0 || next >= end) return;
    OMNI_UNROLL
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(next + line * kLineBytes, 0, 2);
    next += kLines * kLineBytes;
  }
};

// partial += rows . x, lane by lane, over `size` elements that begin at a whole step.
template <class T, int kRows, int kColumns, int kLines>
OMNI_INLINE void accumulate(Floats (&partial)[kRows][kColumns], const T* const (&rows)[kRows], const Staged<T>* x,
                            int64_t x_stride, int64_t size, Ahead& ahead) {
  constexpr int kStep = Staging<T>::kStep;
  int64_t at = 0;
  Ahead asking = ahead;  // in registers
  for (; at + kStep <= size; at += kStep) {
    asking.ask<kLines>();
    dot_step<T, kRows, kColumns>(partial, rows, at, x, x_stride);
  }
  ahead = asking;
  if (at < size) {
    T rests[kRows][kStep] = {};
    const T* rest_rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(rests[r], rows[r] + at, (size - at) * sizeof(T));
      rest_rows[r] = rests[r];
    }
    dot_step<T, kRows, kColumns>(partial, rest_rows, 0, x + at, x_stride);
  }
}

template <int kRows, int kColumns>
OMNI_INLINE void store_tile(const Floats (&partial)[kRows][kColumns], float* sums, int64_t stride) {
  OMNI_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    if constexpr (kRows == 4) {
      store_sums(sums + c * stride, partial[0][c], partial[1][c], partial[2][c], partial[3][c]);
    } else {
      OMNI_UNROLL
      for (int r = 0; r < kRows; ++r) sums[c * stride + r] = sum_of(partial[r][c]);
    }
  }
}

// Calls function(first, std::integral_constant<int, width>) for groups of at most kTileColumns columns, all of nearly
// the same size: 8 columns are 4 + 4, not 6 + 2.
template <class Function>
OMNI_INLINE void for_each_column_group(int64_t columns, const Function& function) {
  const int64_t groups = (columns + kTileColumns - 1) / kTileColumns;
  for (int64_t group = 0, column = 0; group < groups; ++group) {
    const int64_t width = columns * (group + 1) / groups - column;
    switch (width) {
      case 1: function(column, std::integral_constant<int, 1>{}); break;
      case 2: function(column, std::integral_constant<int, 2>{}); break;
      case 3: function(column, std::integral_constant<int, 3>{}); break;
      default:
        if constexpr (kTileColumns > 3) {
          switch (width) {
            case 4: function(column, std::integral_constant<int, 4>{}); break;
            case 5: function(column, std::integral_constant<int, 5>{}); break;
            default: function(column, std::integral_constant<int, 6>{}); break;
          }
        }
    }
    column += width;
  }
}

// sums[column * stride + row] = rows[row] . x[column] for a few rows (kRows) and any number of staged columns, every
// one added up in the same order whatever the tile.
template <class T, int kRows>
inline void dot_columns(const T* const (&rows)[kRows], const Staged<T>* x, int64_t x_stride, int64_t columns,
                        int64_t size, float* sums, int64_t stride, Ahead& ahead) {
  constexpr int kLines = (kRows * Staging<T>::kStep * sizeof(T) + kLineBytes - 1) / kLineBytes;
  for_each_column_group(columns, [&](int64_t column, auto width) OMNI_LAMBDA {
    Floats partial[kRows][width.value] = {};
    accumulate<T, kRows, width.value, kLines>(partial, rows, x + column * x_stride, x_stride, size, ahead);
    store_tile(partial, sums + column * stride, stride);
  });
}

template <int kRows, int kColumns, class Function>
OMNI_INLINE void for_each_sum(Floats (&partial)[kRows][kColumns], const Function& function) {
  OMNI_UNROLL
  for (int r = 0; r < kRows; ++r) {
    OMNI_UNROLL
    for (int c = 0; c < kColumns; ++c) function(partial[r][c], r * kColumns + c);
  }
}

constexpr int64_t kBlockRows = 8;
constexpr int64_t kInputsAtOnce = 768;  // elements of a row that stay in the first-level cache with kBlockRows rows,
constexpr int64_t kFewInputsAtOnce = 512;  // and with the same of few columns, which are read again before others come
constexpr int64_t kFewColumns = 16;
constexpr int64_t kRowsAtOnce = 32;     // rows that dot_matrix takes at most,
constexpr int64_t kColumnsAtOnce = 96;  // and staged columns
constexpr int64_t kColumnBytes = 256 << 10;  // of columns that stay in the second-level cache with all their inputs
constexpr int64_t kColumnsToStage = 2 * kTileColumns + 1;  // from which on staging rows is repaid
constexpr int64_t kPad = 32 / sizeof(float);  // between rows: two loads of a cycle lie in different halves of a line

// How many rows dot_matrix should be given: more than a block where the columns would not stay in the cache otherwise,
// no more where they do, because rows are read from memory faster as a whole.
template <class T>
inline int64_t rows_at_once(int64_t columns, int64_t size) {
  const bool stays = columns * size * int64_t(sizeof(Staged<T>)) <= kColumnBytes;
  return stays || Staging<T>::kSame ? kBlockRows : kRowsAtOnce;
}

// sums[column * stride + row] of `count` rows that lie `row_stride` apart, at most kRowsAtOnce, for at most
// kColumnsAtOnce staged columns. `following`: how many rows behind them will be read next; memory is asked for them.
//
// Where there are more columns than some tiles have, a block of rows and inputs that fits into the first-level cache is
// staged too, so that it is widened once, and meets all columns before the next block does; all rows meet some inputs
// of the columns before any meets the next. The lanes of unfinished sums are kept in between, so the order of addition
// is that of one pass.
template <class T>
inline void dot_matrix(const T* matrix, int64_t row_stride, int64_t count, const Staged<T>* x, int64_t x_stride,
                       int64_t columns, int64_t size, float* sums, int64_t stride, int64_t following) {
  const int64_t whole = count / kTileRows * kTileRows;
  const auto address = [&](int64_t row) { return reinterpret_cast<const char*>(matrix + row * row_stride); };
  Ahead ahead;
  if (columns < kColumnsToStage) {
    if (following > 0) ahead = {address(kTileRows), address(count + std::min<int64_t>(following, kTileRows))};
    for (int64_t row = 0; row < whole; row += kTileRows) {
      const T* from = matrix + row * row_stride;
      const T* const rows[kTileRows] = {from, from + row_stride, from + 2 * row_stride, from + 3 * row_stride};
      dot_columns<T, kTileRows>(rows, x, x_stride, columns, size, sums + row, stride, ahead);
    }
  } else {
    constexpr int64_t kBlockStride = kInputsAtOnce + kPad;
    alignas(kVectorBytes) Staged<T> block[Staging<T>::kSame ? 1 : kBlockRows * kBlockStride];
    Floats unfinished[kColumnsAtOnce * kRowsAtOnce];
    if (following > 0 && count <= kBlockRows)
      ahead = {address(count), address(count + std::min(following, kBlockRows))};
    const int64_t inputs_at_once = columns > kFewColumns ? kInputsAtOnce : kFewInputsAtOnce;
    for (int64_t at = 0; at < size; at += inputs_at_once) {
      const int64_t inputs = std::min(inputs_at_once, size - at);
      Floats* kept = unfinished;
      for (int64_t first = 0; first < whole; first += kBlockRows) {
        const int64_t last = std::min(first + kBlockRows, whole);
        const Staged<T>* staged = block;
        int64_t staged_stride = kBlockStride, staged_inputs = staged_size<T>(inputs);
        if constexpr (Staging<T>::kSame) {
          staged = matrix + first * row_stride + at;
          staged_stride = row_stride, staged_inputs = inputs;
        } else {
          constexpr int64_t kLine = kLineBytes / sizeof(T);  // what comes next is asked for as fast as this is read
          for (int64_t row = first; row < last; ++row) {
            if (count > kBlockRows) {
              int64_t next = row + kBlockRows, next_at = at;
              if (next >= whole && at + inputs < size) {
                next -= whole, next_at += inputs;
              } else if (next >= whole) {
                next_at = 0;
              }
              const char* begin = address(next) + next_at * sizeof(T);
              ahead = {begin, next < count + following ? begin + inputs * sizeof(T) : begin};
            }
            for (int64_t from = 0; from < inputs; from += kLine) {
              ahead.ask<1>();
              stage<T>(matrix + row * row_stride + at + from, std::min(kLine, inputs - from),
                       block + (row - first) * kBlockStride + from);
            }
          }
        }
        const int64_t groups = (columns + kTileColumns - 1) / kTileColumns;
        const int64_t lines = Staging<T>::kSame ? (last - first) * inputs * int64_t(sizeof(T)) / kLineBytes : 0;
        for_each_column_group(columns, [&](int64_t column, auto width) OMNI_LAMBDA {
          for (int64_t line = 0; line < lines; line += groups) ahead.ask<1>();
          for (int64_t row = first; row < last; row += kTileRows, kept += kTileRows * width.value) {
            const Staged<T>* from = staged + (row - first) * staged_stride;
            const Staged<T>* const rows[kTileRows] = {from, from + staged_stride, from + 2 * staged_stride,
                                                      from + 3 * staged_stride};
            Floats partial[kTileRows][width.value] = {};
            if (at > 0) for_each_sum(partial, [&](Floats& sum, int index) OMNI_LAMBDA { sum = kept[index]; });
            const Staged<T>* from_x = x + column * x_stride + at;
            accumulate<Staged<T>, kTileRows, width.value, 0>(partial, rows, from_x, x_stride, staged_inputs, ahead);
            if (at + inputs < size) {
              for_each_sum(partial, [&](Floats& sum, int index) OMNI_LAMBDA { kept[index] = sum; });
            } else {
              store_tile(partial, sums + column * stride + row, stride);
            }
          }
        });
      }
    }
  }
  for (int64_t row = whole; row < count; ++row) {
    const T* const single[1] = {matrix + row * row_stride};
    dot_columns<T, 1>(single, x, x_stride, columns, size, sums + row, stride, ahead);
  }
}

// to[head][index] += sum over rows of weights[head][row] * rows[row][index], for a few heads and indices at a time.
// `row_at(row)`: where the row's share begins.
template <int kHeads, int kVectors, class RowAt>
OMNI_INLINE void weighted_tile(const RowAt& row_at, int64_t count, const float* weights, int64_t weights_stride,
                               float* to, int64_t to_stride) {
  Floats sums[kHeads][kVectors];
  OMNI_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    OMNI_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[h][v] = load<Floats>(to + h * to_stride + v * kLanes);
  }
  for (int64_t row = 0; row < count; ++row) {
    const auto* from = row_at(row);
    Floats values[kVectors];
    OMNI_UNROLL
    for (int v = 0; v < kVectors; ++v) values[v] = widen(from + v * kLanes);
    OMNI_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      const Floats weight = splat(weights[h * weights_stride + row]);
      OMNI_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[h][v] += weight * values[v];
    }
  }
  OMNI_UNROLL
  for (int h = 0; h < kHeads; ++h) {
    OMNI_UNROLL
    for (int v = 0; v < kVectors; ++v) store(to + h * to_stride + v * kLanes, sums[h][v]);
  }
}

template <class T, int kHeads>
inline void weighted_heads(const T* const* rows, int64_t count, int64_t size, const float* weights,
                           int64_t weights_stride, float* to, int64_t to_stride) {
  constexpr int kVectors = (kRegisters == 32 ? 16 : 8) / kHeads;
  int64_t at = 0;
  const auto row_at = [&](int64_t row) __attribute__((always_inline)) { return rows[row] + at; };
  for (; at + kVectors * kLanes <= size; at += kVectors * kLanes)
    weighted_tile<kHeads, kVectors>(row_at, count, weights, weights_stride, to + at, to_stride);
  for (; at + kLanes <= size; at += kLanes)
    weighted_tile<kHeads, 1>(row_at, count, weights, weights_stride, to + at, to_stride);
  for (; at < size; ++at) {
    for (int h = 0; h < kHeads; ++h) {
      float sum = to[h * to_stride + at];
      for (int64_t row = 0; row < count; ++row) sum += weights[h * weights_stride + row] * to_float(rows[row][at]);
      to[h * to_stride + at] = sum;
    }
  }
}

// The same for any number of heads, weights [heads, weights_stride] and to [heads, to_stride].
template <class T>
inline void weighted_sums(const T* const* rows, int64_t count, int64_t size, const float* weights,
                          int64_t weights_stride, int64_t heads, float* to, int64_t to_stride) {
  int64_t head = 0;
  for (; head + 4 <= heads; head += 4)
    weighted_heads<T, 4>(rows, count, size, weights + head * weights_stride, weights_stride, to + head * to_stride,
                         to_stride);
  for (; head + 2 <= heads; head += 2)
    weighted_heads<T, 2>(rows, count, size, weights + head * weights_stride, weights_stride, to + head * to_stride,
                         to_stride);
  for (; head < heads; ++head)
    weighted_heads<T, 1>(rows, count, size, weights + head * weights_stride, weights_stride, to + head * to_stride,
                         to_stride);
}

// Memory of one thread that is kept from call to call, because fresh pages cost more than the kernels that use them.
class Scratch {
 public:
  // Aligned for vectors; valid until the next call on this object, contents undefined.
  template <class T>
  T* reserve(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 2 * kLineBytes) / kLineBytes * kLineBytes;
    if (bytes > size_) {
      memory_.reset(std::aligned_alloc(kLineBytes, bytes));
      size_ = memory_ ? bytes : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// Calls function(T{}) with the C++ type of an element.
template <class Function>
void with_element(Element element, const Function& function) {
  switch (element) {
    case Element::kFloat32: return function(float{});
    case Element::kBFloat16: return function(BFloat16{});
    case Element::kFloat16: return function(Float16{});
  }
}

}  // namespace omni
