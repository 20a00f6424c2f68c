// Products by the matrix unit of x86-64 processors (AMX): 16 rows by 32 inputs of bfloat16 in one tile, with as many
// inputs of 16 columns in another, into 16 by 16 float32 sums.
//
// The rows of a weight are a tile as they lie in memory. Columns are staged for it, in groups of 16: of each two inputs
// one word per column, 16 words side by side. One instruction adds products in an order that is its own, the same for
// every row and column, so a sum depends on nothing but its own row and column here too.
#pragma once

#include "tiles.h"

namespace omni {

#if defined(__AMX_BF16__)
template <class T>
constexpr bool kByMatrixUnit = std::is_same_v<T, BFloat16>;

constexpr int64_t kUnitRows = 16;    // of a tile, and columns
constexpr int64_t kUnitInputs = 32;  // of a tile
constexpr int64_t kUnitTile = kUnitRows * kUnitInputs;
constexpr int64_t kUnitTileRow = kUnitInputs * int64_t(sizeof(BFloat16));  // bytes

// Sets the unit up for this thread and, at the end of its life, gives it back. There must be only one at a time. Tiles
// 6 and 7 are whole, the others have so many rows.
class MatrixUnit {
 public:
  explicit MatrixUnit(int64_t rows = kUnitRows) {
    struct alignas(kLineBytes) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile)
      shapes.row_bytes[tile] = kUnitTileRow, shapes.rows[tile] = uint8_t(tile < 6 ? rows : kUnitRows);
    __asm__ volatile("" ::"r"(&shapes) : "memory");  // the intrinsic does not say that it reads them all
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
};

// Where a column's element stands, of groups that take `stride` elements per column.
constexpr int64_t unit_position(int64_t column, int64_t index, int64_t stride) {
  return column / kUnitRows * kUnitRows * stride + index / kUnitInputs * kUnitTile +
         index % kUnitInputs / 2 * kUnitInputs + column % kUnitRows * 2 + index % 2;
}

// 32 inputs of 16 columns, each where `from` says, become one tile.
OMNI_INLINE void stage_unit_tile(const BFloat16* const (&from)[kUnitRows], int64_t at, BFloat16* to) {
  static_assert(kLanes == kUnitRows);
  Floats square[kLanes];
  OMNI_UNROLL
  for (int column = 0; column < kLanes; ++column) square[column] = load<Floats>(from[column] + at);
  transpose(square);
  OMNI_UNROLL
  for (int pair = 0; pair < kLanes; ++pair) std::memcpy(to + pair * kUnitInputs, &square[pair], sizeof(Floats));
}

// A group of at most 16 columns; zeros stand behind `size`, and one of the columns for those that are missing.
template <class RowAt>
inline void stage_for_unit(const RowAt& row_at, int64_t count, int64_t size, BFloat16* to) {
  const BFloat16* from[kUnitRows];
  for (int64_t column = 0; column < kUnitRows; ++column) from[column] = row_at(std::min(column, count - 1));
  const int64_t whole = size / kUnitInputs * kUnitInputs;
  for (int64_t at = 0; at < whole; at += kUnitInputs) stage_unit_tile(from, at, to + at * kUnitRows);
  if (whole == size) return;
  BFloat16 rest[kUnitRows][kUnitInputs] = {};
  for (int64_t column = 0; column < kUnitRows; ++column) {
    std::memcpy(rest[column], from[column] + whole, (size - whole) * sizeof(BFloat16));
    from[column] = rest[column];
  }
  stage_unit_tile(from, 0, to + whole * kUnitRows);
}

// Rounded to the nearest; as the unit itself it makes zeros of numbers below 2^-126.
OMNI_INLINE void store_unit(BFloat16* to, Floats sums) {
  const auto halves = _mm512_cvtneps_pbh((__m512)sums);
  static_assert(sizeof(halves) == kLanes * sizeof(BFloat16));
  std::memcpy(to, &halves, sizeof(halves));
}

// a0 b0 a1 b1 …, rounded: the words of two inputs of 16 columns.
OMNI_INLINE void store_unit_pairs(BFloat16* to, Floats a, Floats b) {
  alignas(kLineBytes) static constexpr uint16_t kOrder[2 * kLanes] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto halves = bits_as<__m512i>(_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(halves, _mm512_loadu_si512(kOrder), halves));
}

// a0 b0 a1 b1 … of two rows of 32, the words of two inputs: 16 columns for one tile, and 16 for the one behind it. Zeros
// for what is missing of shorter rows, and for a row that is null.
OMNI_INLINE void stage_unit_pair(const BFloat16* a, const BFloat16* b, int64_t width, BFloat16* to) {
  alignas(kLineBytes) static constexpr uint16_t kOrder[2][2 * kLanes] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const auto whole = [&](const BFloat16* row) OMNI_LAMBDA {
    if (row && width == 2 * kUnitRows) return _mm512_loadu_si512(row);
    BFloat16 padded[2 * kUnitRows] = {};
    if (row) std::memcpy(padded, row, width * sizeof(BFloat16));
    return _mm512_loadu_si512(padded);
  };
  const __m512i first = whole(a), second = whole(b);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, _mm512_loadu_si512(kOrder[0]), second));
  _mm512_storeu_si512(to + kUnitTile, _mm512_permutex2var_epi16(first, _mm512_loadu_si512(kOrder[1]), second));
}

// Lines of a matrix that is read next, in the order in which they lie, asked for a few at a time.
class Following {
 public:
  Following(const BFloat16* rows, int64_t row_stride, int64_t size)
      : at_(reinterpret_cast<const char*>(rows)),
        row_bytes_(size * int64_t(sizeof(BFloat16))),
        skip_((row_stride - size) * int64_t(sizeof(BFloat16))),
        left_(row_bytes_) {}

  OMNI_INLINE void ask(int64_t lines) {
    for (int64_t line = 0; line < lines; ++line) {
      __builtin_prefetch(at_, 0, 2);
      at_ += kLineBytes;
      left_ -= kLineBytes;
      if (left_ <= 0) {  // where the next row begins, less than a line away from here at most
        at_ += left_ + skip_;
        left_ += row_bytes_;
        left_ = left_ <= 0 ? row_bytes_ : left_;
      }
    }
  }

 private:
  const char* at_;
  int64_t row_bytes_, skip_, left_;
};

// Two such streams side by side.
struct FollowingBoth {
  Following first, second;

  OMNI_INLINE void ask(int64_t lines) {
    first.ask(lines / 2);
    second.ask((lines + 1) / 2);
  }
};

// One step of kHeights * 16 rows and kWidths * 16 columns. kOnce: the rows will not be read again, and are not to take
// the columns' place in the first-level cache.
template <int kHeights, int kWidths, bool kOnce>
OMNI_INLINE void unit_step(const BFloat16* rows, int64_t row_bytes, int64_t between_rows, const BFloat16* x,
                           int64_t between_columns) {
  if constexpr (kOnce) {
    _tile_stream_loadd(4, rows, row_bytes);
  } else {
    _tile_loadd(4, rows, row_bytes);
  }
  _tile_loadd(6, x, kUnitTileRow);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kHeights > 1) {
    if constexpr (kOnce) {
      _tile_stream_loadd(5, rows + between_rows, row_bytes);
    } else {
      _tile_loadd(5, rows + between_rows, row_bytes);
    }
    _tile_dpbf16ps(1, 5, 6);
  }
  if constexpr (kWidths > 1) {
    _tile_loadd(7, x + between_columns, kUnitTileRow);
    _tile_dpbf16ps(2, 4, 7);
    if constexpr (kHeights > 1) _tile_dpbf16ps(3, 5, 7);
  }
}

// Tiles of sums that wait for the inputs that are left.
typedef float UnitSums[kUnitRows * kUnitRows];

template <int kHeights, int kWidths>
OMNI_INLINE void store_unit_sums(UnitSums* to) {
  _tile_stored(0, to[0], kUnitTileRow);
  if constexpr (kHeights > 1) _tile_stored(1, to[1], kUnitTileRow);
  if constexpr (kWidths > 1) _tile_stored(2, to[kHeights], kUnitTileRow);
  if constexpr (kHeights > 1 && kWidths > 1) _tile_stored(3, to[3], kUnitTileRow);
}

template <int kHeights, int kWidths>
OMNI_INLINE void load_unit_sums(const UnitSums* from) {
  _tile_loadd(0, from[0], kUnitTileRow);
  if constexpr (kHeights > 1) _tile_loadd(1, from[1], kUnitTileRow);
  if constexpr (kWidths > 1) _tile_loadd(2, from[kHeights], kUnitTileRow);
  if constexpr (kHeights > 1 && kWidths > 1) _tile_loadd(3, from[3], kUnitTileRow);
}

// Rows of kHeights tiles, whose first rows lie `between` elements apart.
struct UnitRows {
  const BFloat16* first;
  int64_t stride, between;
};

// sums += kHeights * 16 rows . kWidths * 16 columns over inputs [from, from + size); those of earlier
// inputs wait in `sums`.
template <int kHeights, int kWidths, bool kOnce, class Ahead>
OMNI_INLINE void unit_tiles(const UnitRows& of, const BFloat16* x, int64_t x_stride, int64_t from, int64_t size,
                            Ahead& following, int64_t asked, UnitSums* sums) {
  const BFloat16* rows = of.first + from;
  const int64_t row_bytes = of.stride * int64_t(sizeof(BFloat16)), whole = size / kUnitInputs * kUnitInputs;
  const int64_t between_columns = kUnitRows * x_stride;
  x += from * kUnitRows;
  if (from == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    load_unit_sums<kHeights, kWidths>(sums);
  }
  for (int64_t at = 0; at < whole; at += kUnitInputs) {
    following.ask(asked);
    unit_step<kHeights, kWidths, kOnce>(rows + at, row_bytes, of.between, x + at * kUnitRows, between_columns);
  }
  if (whole < size) {
    alignas(kLineBytes) BFloat16 rest[kHeights * kUnitTile] = {};
    for (int64_t row = 0; row < kHeights * kUnitRows; ++row)
      std::memcpy(rest + row * kUnitInputs, rows + row / kUnitRows * of.between + row % kUnitRows * of.stride + whole,
                  (size - whole) * sizeof(BFloat16));
    __asm__ volatile("" ::"r"(rest) : "memory");
    unit_step<kHeights, kWidths, false>(rest, kUnitTileRow, kUnitTile, x + whole * kUnitRows, between_columns);
  }
  store_unit_sums<kHeights, kWidths>(sums);
}

// Calls emit(column, row, sums) with the sums of 16 neighbouring rows, for each of `columns` columns, at most
// kWidths * 16.
template <int kHeights, int kWidths, class Emit>
OMNI_INLINE void emit_unit_sums(const UnitSums* sums, int64_t columns, const Emit& emit) {
  OMNI_UNROLL
  for (int tile = 0; tile < kHeights * kWidths; ++tile) {
    const int64_t column = tile / kHeights * kUnitRows, row = tile % kHeights * kUnitRows;
    Floats square[kLanes];
    OMNI_UNROLL
    for (int line = 0; line < kLanes; ++line) square[line] = load<Floats>(sums[tile] + line * kUnitRows);
    transpose(square);
    OMNI_UNROLL
    for (int64_t each = 0; each < kUnitRows; ++each)
      if (column + each < columns) emit(column + each, row, square[each]);
  }
}

// Inputs at a time where there are many columns: so many of 32 rows stay in the first-level cache.
constexpr int64_t kUnitInputsAtOnce = 384;
constexpr int64_t kUnitColumns = 512;  // that meet some rows at a time

// kHeights * 16 rows with all columns, at most kUnitColumns: calls put(first column, left, widths, tiles of sums) for
// 16 or 32 of them at a time, of which `left` are there. Beside them memory of what follows is asked for.
template <int kHeights, class Ahead, class Put>
OMNI_INLINE void unit_columns(const UnitRows& rows, const BFloat16* x, int64_t x_stride, int64_t columns, int64_t size,
                              Ahead following, const Put& put) {
  constexpr int64_t kGroup = 2 * kUnitRows;
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  alignas(kLineBytes) UnitSums sums[kUnitColumns / kGroup * 4];
  const int64_t asked = (kHeights * kUnitRows + groups - 1) / groups;
  const auto meet = [&](int64_t group, int64_t at, int64_t width, auto widths, auto once) OMNI_LAMBDA {
    UnitSums* here = sums + group * 4;
    unit_tiles<kHeights, widths.value, once.value>(rows, x + group * kGroup * x_stride, x_stride, at, width, following,
                                                   asked, here);
    if (at + width >= size) put(group * kGroup, columns - group * kGroup, widths, here);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if (columns <= kUnitRows) return meet(0, 0, size, one, std::true_type{});
  if (groups == 1) return meet(0, 0, size, two, std::true_type{});
  const int64_t blocks = (size + kUnitInputsAtOnce - 1) / kUnitInputsAtOnce;
  const int64_t at_once = ((size + blocks - 1) / blocks + kUnitInputs - 1) / kUnitInputs * kUnitInputs;
  for (int64_t at = 0; at < size; at += at_once) {
    const int64_t width = std::min(at_once, size - at);
    for (int64_t group = 0; group < groups; ++group) {
      if (columns - group * kGroup > kUnitRows) {
        meet(group, at, width, two, std::false_type{});
      } else {
        meet(group, at, width, one, std::false_type{});
      }
    }
  }
}

// unit_product of at least 16 rows.
template <class Emit>
inline void unit_rows(const BFloat16* matrix, int64_t row_stride, int64_t count, const BFloat16* x, int64_t x_stride,
                      int64_t columns, int64_t size, int64_t next, const Emit& emit) {
  const auto meet = [&](int64_t row, int64_t after, auto heights) OMNI_LAMBDA {
    unit_columns<heights.value>(
        {matrix + row * row_stride, row_stride, kUnitRows * row_stride}, x, x_stride, columns, size,
        Following(matrix + after * row_stride, row_stride, size),
        [&](int64_t first, int64_t left, auto widths, const UnitSums* sums) OMNI_LAMBDA {
          emit_unit_sums<heights.value, widths.value>(
              sums, left, [&](int64_t column, int64_t of_tile, Floats of_rows) OMNI_LAMBDA {
                emit(first + column, row + of_tile, of_rows);
              });
        });
  };
  constexpr int64_t kTogether = 2 * kUnitRows;
  int64_t row = 0;
  for (; row + kTogether <= count; row += kTogether)
    meet(row, row + 2 * kTogether <= count ? row + kTogether : next, std::integral_constant<int, 2>{});
  while (row < count) {  // the last tile begins earlier where rows are missing
    const int64_t first = std::min(row, count - kUnitRows);
    meet(first, next, std::integral_constant<int, 1>{});
    row = first + kUnitRows;
  }
}

// Calls emit(column, row, sums of `height` neighbouring rows, height) until every row has met every column, some rows
// more than once. `next`: see dot_matrix. A MatrixUnit must live.
template <class Emit>
inline void unit_product(const BFloat16* matrix, int64_t row_stride, int64_t count, const BFloat16* x, int64_t x_stride,
                         int64_t columns, int64_t size, int64_t next, const Emit& emit) {
  if (count >= kUnitRows) {
    return unit_rows(matrix, row_stride, count, x, x_stride, columns, size, next,
                     [&](int64_t column, int64_t row, Floats sums) OMNI_LAMBDA { emit(column, row, sums, kUnitRows); });
  }
  static thread_local Scratch scratch;
  auto* rows = scratch.reserve<BFloat16>(kUnitRows * size);
  for (int64_t row = 0; row < kUnitRows; ++row)
    std::memcpy(rows + row * size, matrix + std::min(row, count - 1) * row_stride, size * sizeof(BFloat16));
  __asm__ volatile("" ::"r"(rows) : "memory");
  unit_rows(rows, size, kUnitRows, x, x_stride, columns, size, 0,
            [&](int64_t column, int64_t, Floats sums) OMNI_LAMBDA { emit(column, 0, sums, count); });
}
#else
template <class T>
constexpr bool kByMatrixUnit = false;
#endif

}  // namespace omni
