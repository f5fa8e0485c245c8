// row_patch.cuh: one thread's patch of 4 rows x 8 columns of a row-major weight: half of the square
// patch of weight_patch.cuh, so half the registers and half the instructions from a load to its
// store. Small weights want that: their tiles all run at once, and a thread's own time is the
// kernel's.
//
// Rows come in fours and columns in eights (patch_layout), so a patch lies inside or outside as a
// whole. fp32 lanes are paired as in patch.cuh. Lanes `kWide` apart own the upper and the lower
// half of eight rows.
#pragma once

#include <cstdint>

#include "common/patch.cuh"
#include "common/tile.h"
#include "sparse24/types.h"

namespace sparse24 {

/// 16-bit weights.
template <typename T, int kWide>
struct RowPatch {
  static constexpr bool kPaired = false;
  uint32_t line[kRowPatch][4];

  __device__ __forceinline__ void load(const ConstMatrix& w, int row, int col, bool inside) {
    const uint32_t stride = static_cast<uint32_t>(w.row_stride) * 2;
    const uint16_t* first = advance(static_cast<const uint16_t*>(w.data), stride, row) + col;
    uint4 v[kRowPatch];
    if (inside) {
      SP24_UNROLL
      for (int i = 0; i < kRowPatch; ++i) v[i] = load16_cached(advance(first, stride, i));
    } else {
      SP24_UNROLL
      for (int i = 0; i < kRowPatch; ++i) v[i] = make_uint4(0, 0, 0, 0);
    }
    SP24_UNROLL
    for (int i = 0; i < kRowPatch; ++i) {
      line[i][0] = v[i].x, line[i][1] = v[i].y, line[i][2] = v[i].z, line[i][3] = v[i].w;
    }
  }
  __device__ __forceinline__ float value(int i, int j) const {
    return j % 2 == 0 ? low_value<T>(line[i][j / 2]) : high_value<T>(line[i][j / 2]);
  }
  template <typename Out>
  __device__ __forceinline__ uint32_t pair(int i, int p) const {
    static_assert(std::is_same_v<T, Out>, "other pairs of 16-bit dtypes go through kStrided");
    return line[i][p];
  }
};

/// fp32 weights.
template <int kWide>
struct RowPatch<float, kWide> {
  static constexpr bool kPaired = true;
  float line[kRowPatch][8];

  __device__ __forceinline__ void load(const ConstMatrix& w, int row, int col, bool) {
    const int rows = static_cast<int>(w.rows), cols = static_cast<int>(w.cols);
    const uint32_t stride = static_cast<uint32_t>(w.row_stride) * 4;
    load_patch32<kRowPatch, true>(line, advance(static_cast<const float*>(w.data), stride, row),
                                  stride, col, kWide / 2 * 8, cols, row < rows ? kRowPatch : 0);
  }
  __device__ __forceinline__ float value(int i, int j) const { return line[i][j]; }
  template <typename Out>
  __device__ __forceinline__ uint32_t pair(int i, int p) const {
    return make_pair16<Out>(line[i][2 * p], line[i][2 * p + 1]);
  }
};

}  // namespace sparse24
