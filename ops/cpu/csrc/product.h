// Products of a matrix whose rows lie in memory as they are, and columns that are staged: every sum runs over the inputs
// in one fixed order, whatever the tile.
#pragma once

#include "matrix_unit.h"
#include "tiles.h"

namespace omni {

// How the columns of a product are staged: kTogether of them share one piece of memory.
template <class T>
struct Columns {
#if defined(__AMX_BF16__)
  static constexpr int64_t kTogether = kByMatrixUnit<T> ? kUnitRows : 1;
#else
  static constexpr int64_t kTogether = 1;
#endif

  // Columns are staged in whole groups, so there must be room for so many of them.
  static constexpr int64_t room(int64_t columns) { return (columns + kTogether - 1) / kTogether * kTogether; }

  // Where an element stands, of columns that take `stride` elements each.
  static int64_t position(int64_t column, int64_t index, int64_t stride) {
#if defined(__AMX_BF16__)
    if constexpr (kByMatrixUnit<T>) return unit_position(column, index, stride);
#endif
    return column * stride + Staging<T>::position(index);
  }

  // Stages a group, or what there is of it; row_at(column) says where each begins.
  template <class RowAt>
  static void stage_group(const RowAt& row_at, int64_t count, int64_t size, Staged<T>* to) {
#if defined(__AMX_BF16__)
    if constexpr (kByMatrixUnit<T>) return stage_for_unit(row_at, count, size, to);
#endif
    for (int64_t column = 0; column < count; ++column) stage<T>(row_at(column), size, to);
  }
};

constexpr int64_t kRowsAtOnce = 48;      // rows that more than a few columns meet before the next ones,
constexpr int64_t kColumnsAtOnce = 128;  // and staged columns that dot_matrix takes at most
constexpr int64_t kFewColumns = 48;      // columns that are read again for every tile of rows, not the rows for them
// Columns that are one tile: each weight is read once, and memory is all that counts.
template <class T>
constexpr int64_t kTileOfColumns = kHasWideTile<T> ? kWideColumns : kTileColumns;

// A product of rows and columns by tiles of kRows * kColumns; see dot_matrix.
template <class T, int kRows, int kColumns>
struct TiledProduct {
  const T* matrix;
  int64_t row_stride, count;
  const Staged<T>* x;
  int64_t x_stride, columns, size;
  float* sums;
  int64_t stride;

  template <int kHeight, int kWidth, int kAsked = 0>
  OMNI_INLINE void tile(int64_t row, int64_t column, const Asked<T, kAsked>& asked = {}) const {
    const T* rows[kHeight];
    for (int r = 0; r < kHeight; ++r) rows[r] = matrix + (row + r) * row_stride;
    Floats partial[kHeight][kWidth] = {};
    accumulate<T>(partial, rows, x + column * x_stride, x_stride, size, asked);
    store_tile(partial, sums + column * stride + row, stride);
  }

  template <class Function>
  OMNI_INLINE void for_each_row_group(const Function& function) const {
    int64_t row = 0;
    for (; row + kRows <= count; row += kRows) function(row, std::integral_constant<int, kRows>{});
    for (; row < count; ++row) function(row, std::integral_constant<int, 1>{});
  }

  // Tiles of rows that lie far apart, each followed by its neighbour in the next tile: the processor sees a few long
  // streams, and asks for them ahead by itself better than any instructions can.
  void by_streams() const {
    const int64_t apart = count / kRows;
    for_each_column_group<kColumns>(columns, [&](int64_t column, auto width) OMNI_LAMBDA {
      for (int64_t row = 0; row < apart; ++row) {
        const T* rows[kRows];
        for (int r = 0; r < kRows; ++r) rows[r] = matrix + (row + r * apart) * row_stride;
        Floats partial[kRows][width.value] = {};
        accumulate<T>(partial, rows, x + column * x_stride, x_stride, size);
        scatter_tile(partial, sums + column * stride + row, stride, apart);
      }
      for (int64_t row = apart * kRows; row < count; ++row) tile<1, width.value>(row, column);
    });
  }

  // All columns with a few neighbouring rows, then with the next ones, of which kAsked are asked for beside each group
  // of columns, step by step.
  template <int kAsked>
  void by_rows(int64_t next) const {
    for_each_row_group([&](int64_t row, auto height) OMNI_LAMBDA {
      const int64_t end = row + height.value;
      const int64_t after = end == count && next > 0 ? next : std::min(end, std::max<int64_t>(count - kRows, 0));
      const T* following = matrix + after * row_stride;
      int64_t group = 0;
      for_each_column_group<kColumns>(columns, [&](int64_t column, auto width) OMNI_LAMBDA {
        Asked<T, kAsked> asked;
        for (int64_t each = 0; each < kAsked; ++each)
          asked.rows[each] = following + (group * kAsked + each) % kRows * row_stride;
        ++group;
        tile<height.value, width.value>(row, column, asked);
      });
    });
  }

  // All rows with a few columns, which stay in the first-level cache, then with the next ones. What follows them is
  // asked for beside the last kRows groups of columns, another row of each tile beside each of them.
  void by_columns(int64_t next) const {
    int64_t ahead = next > 0 ? kRows - (columns + kColumns - 1) / kColumns : -columns;
    for_each_column_group<kColumns>(columns, [&](int64_t column, auto width) OMNI_LAMBDA {
      if (ahead < 0) {
        for_each_row_group([&](int64_t row, auto height) OMNI_LAMBDA { tile<height.value, width.value>(row, column); });
      } else {
        const T* following = matrix + (next + ahead) * row_stride;
        for_each_row_group([&](int64_t row, auto height) OMNI_LAMBDA {
          tile<height.value, width.value>(row, column, Asked<T, 1>{{following + row * row_stride}});
        });
      }
      ++ahead;
    });
  }

  void multiply(int64_t next) const {
    if (columns > kFewColumns) return by_columns(next);
    if (columns > 2 * kColumns) return by_rows<1>(next);
    if (columns > kColumns) return by_rows<(kRows + 1) / 2>(next);
    by_streams();
  }
};

// sums[column * stride + row] of `count` rows that lie `row_stride` apart, for at most kColumnsAtOnce staged columns;
// kSpare floats behind those of each column are overwritten. `next`: where the rows stand that will be read after them,
// as many, counted from the first of these; memory is asked for them. 0: nobody knows.
template <class T>
inline void dot_matrix(const T* matrix, int64_t row_stride, int64_t count, const Staged<T>* x, int64_t x_stride,
                       int64_t columns, int64_t size, float* sums, int64_t stride, int64_t next) {
#if defined(__AMX_BF16__)
  if constexpr (kByMatrixUnit<T>) {
    const MatrixUnit unit;
    return unit_product(matrix, row_stride, count, x, x_stride, columns, size, next,
                        [&](int64_t column, int64_t row, Floats of_rows, int64_t height) OMNI_LAMBDA {
                          std::memcpy(sums + column * stride + row, &of_rows, height * sizeof(float));
                        });
  }
#endif
  const auto multiply = [&](auto rows, auto most) {
    const int64_t at_once = columns <= most.value ? count : kRowsAtOnce;
    for (int64_t row = 0; row < count; row += at_once) {
      const int64_t height = std::min(at_once, count - row);
      const TiledProduct<T, rows.value, most.value> product{matrix + row * row_stride, row_stride, height, x, x_stride,
                                                            columns, size, sums + row, stride};
      product.multiply(row + height < count ? height : next > 0 ? next - row : 0);
    }
  };
  if constexpr (kHasWideTile<T>) {
    if (columns > kTileColumns)
      return multiply(std::integral_constant<int, kWideRows>{}, std::integral_constant<int, kWideColumns>{});
  }
  multiply(std::integral_constant<int, kTileRows>{}, std::integral_constant<int, kTileColumns>{});
}

}  // namespace omni
