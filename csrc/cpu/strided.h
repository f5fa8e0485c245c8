// strided.h: typed access to the public API's matrix views, and value conversion between dtypes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/convert.h"
#include "sparse24/types.h"

namespace sparse24::cpu {

template <typename T>
struct Strided {
  T* data;
  int64_t row_stride, col_stride;

  T& operator()(int64_t row, int64_t col) const {
    return data[row * row_stride + col * col_stride];
  }
  bool is_column_major() const { return row_stride == 1 && col_stride != 1; }
};

template <typename T>
Strided<T> typed(const Matrix& view) {
  return {static_cast<T*>(view.data), view.row_stride, view.col_stride};
}
template <typename T>
Strided<const T> typed(const ConstMatrix& view) {
  return {static_cast<const T*>(view.data), view.row_stride, view.col_stride};
}

/// The same dtype copies bits (a NaN keeps its payload); another one is reached with one rounding.
template <typename Out, typename In>
Out convert(In x) {
  if constexpr (std::is_same_v<In, Out>) {
    return x;
  } else {
    return from_float<Out>(to_float(x));
  }
}

/// A square part of a matrix. Ops walk matrices tile by tile: a tile of either layout stays in the
/// L1 cache, and 64 is the extent of a metadata block, so a tile owns its bytes of E.
struct Tile {
  int64_t row_begin, row_end, col_begin, col_end;
};

constexpr int64_t kTile = 64;

inline int64_t tiles_along(int64_t extent) { return (extent + kTile - 1) / kTile; }

inline Tile tile_at(int64_t tile_row, int64_t tile_col, int64_t rows, int64_t cols) {
  return {tile_row * kTile, std::min(rows, (tile_row + 1) * kTile), tile_col * kTile,
          std::min(cols, (tile_col + 1) * kTile)};
}

}  // namespace sparse24::cpu
