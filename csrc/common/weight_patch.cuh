// weight_patch.cuh: one thread's 8x8 patch of a weight [rows, cols], whatever its dtype and layout.
//
//   kRowMajor, kColumnMajor   16-byte loads; extents and strides allow them (choose_weight_layout)
//   kStrided                  element by element, for anything else: right, and slow
//
// rows and cols are multiples of 4, so a patch has 0, 4 or 8 valid rows and columns; the rest reads as zero.
#pragma once

#include <cstdint>

#include "common/convert.h"
#include "common/patch.cuh"
#include "common/raster.h"
#include "common/tile.h"
#include "sparse24/types.h"

namespace sparse24 {

enum class WeightLayout { kRowMajor, kColumnMajor, kStrided };

/// Stands for the element type of kernels that read the dtype at run time (kStrided).
struct AnyValue {};

/// The layout that a kernel can rely on. Row-major patches may end inside a matrix after 4 rows, others only whole.
inline WeightLayout choose_weight_layout(const ConstMatrix& w) {
  const int64_t per_vector = 16 / bytes_of(w.dtype);
  if (!is_aligned16(w.data) || w.cols % kPatch != 0) return WeightLayout::kStrided;
  if (w.col_stride == 1 && w.row_stride % per_vector == 0) return WeightLayout::kRowMajor;
  const bool column_major = w.row_stride == 1 && w.col_stride % per_vector == 0 && w.rows % kPatch == 0;
  return column_major ? WeightLayout::kColumnMajor : WeightLayout::kStrided;
}

constexpr Walk walk_of(WeightLayout layout) {
  return layout == WeightLayout::kColumnMajor ? Walk::kSquare : Walk::kRows;
}
constexpr uint32_t band_of(WeightLayout layout) { return layout == WeightLayout::kColumnMajor ? kMixedBand : 1; }

/// How many of a patch's rows (or columns) from `start` lie inside: 0, 4 or 8.
SP24_HD int valid_lines(int64_t start, int64_t extent) {
  return start >= extent ? 0 : extent - start < kPatch ? static_cast<int>(extent - start) : kPatch;
}

/// 16-bit weights: the values stay packed, in lines as they lie in memory.
template <typename T, WeightLayout kLayout>
struct WeightPatch {
  static constexpr bool kPaired = false;
  static constexpr bool kByRows = kLayout == WeightLayout::kRowMajor;
  Patch16 lines;

  __device__ __forceinline__ void load(const ConstMatrix& w, int64_t row, int64_t col) {
    const uint16_t* data = static_cast<const uint16_t*>(w.data);
    const int valid_rows = valid_lines(row, w.rows), valid_cols = valid_lines(col, w.cols);
    if (kByRows) {
      lines = load_patch16(data + row * w.row_stride + col, w.row_stride, valid_cols == 0 ? 0 : valid_rows);
    } else {
      lines = load_patch16(data + col * w.col_stride + row, w.col_stride, valid_rows == 0 ? 0 : valid_cols);
    }
  }
  __device__ __forceinline__ float value(int i, int j) const {
    const int line = kByRows ? i : j, along = kByRows ? j : i;
    const uint32_t pair = lines.line[line][along / 2];
    return along % 2 == 0 ? low_value<T>(pair) : high_value<T>(pair);
  }
  /// The patch as pairs along rows.
  template <typename Out>
  __device__ __forceinline__ Patch16 rows() const {
    static_assert(std::is_same_v<T, Out>, "other pairs of 16-bit dtypes go through kStrided");
    if constexpr (kByRows) return lines;
    return transpose(lines);
  }
  /// The patch as pairs along columns; `rows` is what rows() gave.
  __device__ __forceinline__ Patch16 columns(const Patch16& rows) const {
    if constexpr (kByRows) return transpose(rows);
    return lines;
  }
};

/// fp32 weights.
template <WeightLayout kLayout>
struct WeightPatch<float, kLayout> {
  static constexpr bool kPaired = true;
  static constexpr bool kByRows = kLayout == WeightLayout::kRowMajor;
  float lines[kPatch][kPatch];

  __device__ __forceinline__ void load(const ConstMatrix& w, int64_t row, int64_t col) {
    const float* data = static_cast<const float*>(w.data);
    if (kByRows) {
      load_patch32(lines, data + row * w.row_stride, w.row_stride, col, kTileCols / 2, w.cols,
                   valid_lines(row, w.rows));
    } else {
      load_patch32(lines, data + col * w.col_stride, w.col_stride, row, kTileRows / 4, w.rows,
                   valid_lines(col, w.cols));
    }
  }
  __device__ __forceinline__ float value(int i, int j) const { return kByRows ? lines[i][j] : lines[j][i]; }

  template <typename Out>
  __device__ __forceinline__ Patch16 rows() const {
    Patch16 out;
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int p = 0; p < 4; ++p) out.line[i][p] = make_pair16<Out>(value(i, 2 * p), value(i, 2 * p + 1));
    }
    return out;
  }
  __device__ __forceinline__ Patch16 columns(const Patch16& rows) const { return transpose(rows); }
};

/// One element of any dtype, as fp32.
static __device__ __noinline__ float read_value(const ConstMatrix& w, int64_t row, int64_t col) {
  if (row >= w.rows || col >= w.cols) return 0.0f;
  const int64_t offset = row * w.row_stride + col * w.col_stride;
  if (w.dtype == DType::kFloat32) return static_cast<const float*>(w.data)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(w.data)[offset];
  return w.dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
}

/// One element as Out: the same dtype keeps its bits, another is rounded once.
template <typename Out>
static __device__ __noinline__ uint32_t read_bits(const ConstMatrix& w, int64_t row, int64_t col) {
  constexpr DType kOut = std::is_same_v<Out, BFloat16> ? DType::kBFloat16 : DType::kFloat16;
  if (w.dtype != kOut) return from_float<Out>(read_value(w, row, col)).bits;
  if (row >= w.rows || col >= w.cols) return 0;
  return static_cast<const uint16_t*>(w.data)[row * w.row_stride + col * w.col_stride];
}

/// Anything else: elements are read where they are needed.
template <>
struct WeightPatch<AnyValue, WeightLayout::kStrided> {
  static constexpr bool kPaired = false;
  const ConstMatrix* w;
  int64_t row, col;

  __device__ __forceinline__ void load(const ConstMatrix& from, int64_t at_row, int64_t at_col) {
    w = &from, row = at_row, col = at_col;
  }
  __device__ __forceinline__ float value(int i, int j) const { return read_value(*w, row + i, col + j); }

  template <typename Out>
  __device__ __forceinline__ Patch16 rows() const {
    Patch16 out;
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int p = 0; p < 4; ++p) {
        out.line[i][p] = read_bits<Out>(*w, row + i, col + 2 * p) | read_bits<Out>(*w, row + i, col + 2 * p + 1) << 16;
      }
    }
    return out;
  }
  __device__ __forceinline__ Patch16 columns(const Patch16& rows) const { return transpose(rows); }
};

}  // namespace sparse24
