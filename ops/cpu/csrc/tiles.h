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

#if defined(__AVX2__) && !defined(__AVX512F__)
// Rows that are widened while they are multiplied have a tile of their own, written in assembler: 12 sums, 3 rows and a
// column are all 16 registers there are, and compilers keep some of the sums in memory then.
constexpr int kWideRows = 3, kWideColumns = 4;
template <class T>
constexpr bool kHasWideTile = std::is_same_v<T, BFloat16>;

// What the loop below reads: it has more operands than an assembler statement may.
struct WideSteps {
  const BFloat16 *rows[kWideRows], *asked[2];  // their ends
  const float* x;
  int64_t stride, at;  // of x, and from the ends, in bytes
};

#define OMNI_COLUMN(address, a, b, c)             \
  "vmovups " address ", %%ymm15\n\t"              \
  "vfmadd231ps %%ymm15, %%ymm12, %[" #a "]\n\t" \
  "vfmadd231ps %%ymm15, %%ymm13, %[" #b "]\n\t" \
  "vfmadd231ps %%ymm15, %%ymm14, %[" #c "]\n\t"
#define OMNI_COLUMNS(offset)                           \
  OMNI_COLUMN(offset "(%%rsi)", a0, b0, c0)            \
  OMNI_COLUMN(offset "(%%rsi, %%rdi)", a1, b1, c1)     \
  OMNI_COLUMN(offset "(%%rsi, %%rdi, 2)", a2, b2, c2)  \
  OMNI_COLUMN(offset "(%%rsi, %%rcx)", a3, b3, c3)
// The even elements of three rows with those of four columns, then the odd ones: where the even ones have zeros, the
// blend puts the odd ones of the same word. The loop is part of it, so that no sum is moved on the way.
#define OMNI_STEPS(asks)                                                                                              \
  __asm__ volatile(                                                                                                   \
      "mov (%[steps]), %%r8\n\t"                                                                                      \
      "mov 8(%[steps]), %%r9\n\t"                                                                                     \
      "mov 16(%[steps]), %%r10\n\t"                                                                                   \
      "mov 24(%[steps]), %%r11\n\t"                                                                                   \
      "mov 32(%[steps]), %%rdx\n\t"                                                                                   \
      "mov 40(%[steps]), %%rsi\n\t"                                                                                   \
      "mov 48(%[steps]), %%rdi\n\t"                                                                                   \
      "mov 56(%[steps]), %%rax\n\t"                                                                                   \
      "lea (%%rdi, %%rdi, 2), %%rcx\n\t"                                                                              \
      ".p2align 5\n"                                                                                                  \
      "1:\n\t" asks                                                                                                   \
      "vmovdqu (%%r8, %%rax), %%ymm12\n\t"                                                                            \
      "vmovdqu (%%r9, %%rax), %%ymm13\n\t"                                                                            \
      "vmovdqu (%%r10, %%rax), %%ymm14\n\t"                                                                           \
      "vpslld $16, %%ymm12, %%ymm12\n\t"                                                                              \
      "vpslld $16, %%ymm13, %%ymm13\n\t"                                                                              \
      "vpslld $16, %%ymm14, %%ymm14\n\t"                                                                              \
      OMNI_COLUMNS("")                                                                                                \
      "vpblendw $0xaa, (%%r8, %%rax), %%ymm12, %%ymm12\n\t"                                                           \
      "vpblendw $0xaa, (%%r9, %%rax), %%ymm13, %%ymm13\n\t"                                                           \
      "vpblendw $0xaa, (%%r10, %%rax), %%ymm14, %%ymm14\n\t"                                                          \
      OMNI_COLUMNS("32")                                                                                              \
      "add $64, %%rsi\n\t"                                                                                            \
      "add $32, %%rax\n\t"                                                                                            \
      "jnz 1b\n\t"                                                                                                    \
      : [a0] "+x"(sums[0][0]), [a1] "+x"(sums[0][1]), [a2] "+x"(sums[0][2]), [a3] "+x"(sums[0][3]),                   \
        [b0] "+x"(sums[1][0]), [b1] "+x"(sums[1][1]), [b2] "+x"(sums[1][2]), [b3] "+x"(sums[1][3]),                   \
        [c0] "+x"(sums[2][0]), [c1] "+x"(sums[2][1]), [c2] "+x"(sums[2][2]), [c3] "+x"(sums[2][3])                    \
      : [steps] "r"(&steps)                                                                                           \
      : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "xmm12", "xmm13", "xmm14", "xmm15", "cc",        \
        "memory")

// sums += rows . x over `size` elements, more than none and whole steps; of each row in `asked` as much is asked for.
template <int kAsked>
OMNI_INLINE void dot_wide(Floats (&sums)[kWideRows][kWideColumns], const BFloat16* const (&rows)[kWideRows],
                          const float* x, int64_t x_stride, int64_t size, const BFloat16* const* asked) {
  static_assert(kAsked <= 2 && sizeof(WideSteps) == 8 * sizeof(int64_t));
  WideSteps steps{{rows[0] + size, rows[1] + size, rows[2] + size}, {}, x, x_stride * int64_t(sizeof(float)),
                  -size * int64_t(sizeof(BFloat16))};
  for (int each = 0; each < kAsked; ++each) steps.asked[each] = asked[each] + size;
  if constexpr (kAsked == 0) OMNI_STEPS("");
  if constexpr (kAsked == 1) OMNI_STEPS("prefetcht1 (%%r11, %%rax)\n\t");
  if constexpr (kAsked == 2) OMNI_STEPS("prefetcht1 (%%r11, %%rax)\n\tprefetcht1 (%%rdx, %%rax)\n\t");
}
#undef OMNI_STEPS
#undef OMNI_COLUMNS
#undef OMNI_COLUMN
#else
constexpr int kWideRows = kTileRows, kWideColumns = kTileColumns;
template <class T>
constexpr bool kHasWideTile = false;
#endif

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
        if constexpr (kRows * kColumns < kTileRows * kTileColumns) {
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

// Rows that are read next, asked for while others are multiplied, as much of each.
template <class T, int kCount>
struct Asked {
  const T* rows[kCount == 0 ? 1 : kCount] = {};
};

// partial += rows . x, lane by lane, over `end` elements, whole steps.
template <class T, int kRows, int kColumns, int kAsked>
OMNI_INLINE void dot_steps(Floats (&partial)[kRows][kColumns], const T* const (&rows)[kRows], const Staged<T>* x,
                           int64_t x_stride, int64_t end, const Asked<T, kAsked>& asked) {
  if constexpr (kHasWideTile<T> && kRows == kWideRows && kColumns == kWideColumns) {
    if (end > 0) dot_wide<kAsked>(partial, rows, x, x_stride, end, asked.rows);
  } else {
    for (int64_t at = 0; at < end; at += Staging<T>::kStep) {
      OMNI_UNROLL
      for (int each = 0; each < kAsked; ++each) __builtin_prefetch(asked.rows[each] + at, 0, 2);
      dot_step<T, kRows, kColumns>(partial, rows, at, x, x_stride);
    }
  }
}

// The same over `size` elements, behind which x has zeros up to a whole step.
template <class T, int kRows, int kColumns, int kAsked = 0>
OMNI_INLINE void accumulate(Floats (&partial)[kRows][kColumns], const T* const (&rows)[kRows], const Staged<T>* x,
                            int64_t x_stride, int64_t size, const Asked<T, kAsked>& asked = {}) {
  constexpr int kStep = Staging<T>::kStep;
  const int64_t whole = size / kStep * kStep;
  dot_steps<T>(partial, rows, x, x_stride, whole, asked);
  if (whole < size) {
    T rests[kRows][kStep] = {};
    const T* rest_rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      std::memcpy(rests[r], rows[r] + whole, (size - whole) * sizeof(T));
      rest_rows[r] = rests[r];
    }
    dot_steps<T>(partial, rest_rows, x + whole, x_stride, kStep, Asked<T, 0>{});
  }
}

constexpr int64_t kSpare = 1;  // floats behind the sums of a column that a tile of three rows writes on

// sums[column * stride + row]: every one is added up in the same order, whatever the tile.
template <int kRows, int kColumns>
OMNI_INLINE void store_tile(const Floats (&partial)[kRows][kColumns], float* sums, int64_t stride) {
  constexpr int kLast = kRows - 1;
  OMNI_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    float four[4];
    float* to = kRows + kSpare < 4 ? four : sums + c * stride;
    store_sums(to, partial[0][c], partial[std::min(1, kLast)][c], partial[std::min(2, kLast)][c], partial[kLast][c]);
    if (kRows + kSpare < 4) std::memcpy(sums + c * stride, four, kRows * sizeof(float));
  }
}

// The same of rows that lie apart: sums[column * stride + row * apart].
template <int kRows, int kColumns>
OMNI_INLINE void scatter_tile(const Floats (&partial)[kRows][kColumns], float* sums, int64_t stride, int64_t apart) {
  constexpr int kTogether = kRows + kSpare;
  float together[kColumns * kTogether];
  store_tile(partial, together, kTogether);
  OMNI_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    OMNI_UNROLL
    for (int r = 0; r < kRows; ++r) sums[c * stride + r * apart] = together[c * kTogether + r];
  }
}

// Calls function(first, std::integral_constant<int, width>) for groups of at most kMost columns, all of nearly the same
// size: 8 columns are 4 + 4, not 6 + 2.
template <int kMost, class Function>
OMNI_INLINE void for_each_column_group(int64_t columns, const Function& function) {
  const int64_t groups = (columns + kMost - 1) / kMost, least = columns / std::max<int64_t>(groups, 1);
  const int64_t wider = columns - groups * least;  // groups, by one column
  for (int64_t group = 0, column = 0; group < groups; ++group) {
    const int64_t width = least + (group < wider);
    switch (width) {
      case 1: function(column, std::integral_constant<int, 1>{}); break;
      case 2: function(column, std::integral_constant<int, 2>{}); break;
      case 3: function(column, std::integral_constant<int, 3>{}); break;
      default:
        if constexpr (kMost > 3) {
          switch (width) {
            case 4: function(column, std::integral_constant<int, 4>{}); break;
            default:
              if constexpr (kMost > 4) {
                switch (width) {
                  case 5: function(column, std::integral_constant<int, 5>{}); break;
                  default: function(column, std::integral_constant<int, 6>{}); break;
                }
              }
          }
        }
    }
    column += width;
  }
}

// sums[column * stride + row * apart] = rows[row] . x[column] for a few rows (kRows) and any number of staged columns,
// every one added up in the same order whatever the tile.
template <class T, int kRows>
inline void dot_columns(const T* const (&rows)[kRows], const Staged<T>* x, int64_t x_stride, int64_t columns,
                        int64_t size, float* sums, int64_t stride, int64_t apart) {
  for_each_column_group<kTileColumns>(columns, [&](int64_t column, auto width) OMNI_LAMBDA {
    Floats partial[kRows][width.value] = {};
    accumulate<T>(partial, rows, x + column * x_stride, x_stride, size);
    scatter_tile(partial, sums + column * stride, stride, apart);
  });
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

// The same for one head and kPairs * 2 * kLanes bfloat16 indices: words of two are taken apart, and their sums put
// together at the end.
template <int kPairs>
OMNI_INLINE void weighted_pairs(const BFloat16* const* rows, int64_t at, int64_t count, const float* weights,
                                float* to) {
  Floats even[kPairs] = {}, odd[kPairs] = {};
  for (int64_t row = 0; row < count; ++row) {
    const Floats weight = splat(weights[row]);
    OMNI_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) {
      const Words words = load<Words>(rows[row] + at + pair * 2 * kLanes);
      even[pair] += weight * bits_as<Floats>(words << 16);
      odd[pair] += weight * bits_as<Floats>(words & 0xffff0000u);
    }
  }
  OMNI_UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    Floats lower, upper;
    interleave(even[pair], odd[pair], lower, upper);
    float* target = to + at + pair * 2 * kLanes;
    store(target, load<Floats>(target) + lower);
    store(target + kLanes, load<Floats>(target + kLanes) + upper);
  }
}

template <class T, int kHeads>
inline void weighted_heads(const T* const* rows, int64_t count, int64_t size, const float* weights,
                           int64_t weights_stride, float* to, int64_t to_stride) {
  constexpr int kVectors = (kRegisters == 32 ? 16 : 8) / kHeads;
  int64_t at = 0;
  if constexpr (std::is_same_v<T, BFloat16> && kHeads == 1) {
    constexpr int kPairs = 4;
    for (; at + kPairs * 2 * kLanes <= size; at += kPairs * 2 * kLanes)
      weighted_pairs<kPairs>(rows, at, count, weights, to);
  }
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
