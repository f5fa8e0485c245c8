// weight_patch.cuh: one thread's 8x8 patch of a weight [rows, cols], whatever its dtype and layout.
//
//   kRowMajor, kColumnMajor   16-byte loads; extents and strides allow them (patch_layout)
//   kStrided                  element by element, for anything else: right, and slow
//
// rows and cols are multiples of 4, so a patch has 0, 4 or 8 valid rows and columns; the rest reads
// as zero. Extents are below 2^31 and offsets have 64 bits: a matrix may be larger than 2^31
// elements, one row or column may not.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/convert.h"
#include "common/layout.h"
#include "common/patch.cuh"
#include "common/raster.h"
#include "common/tile.h"
#include "sparse24/types.h"

namespace sparse24 {

/// Stands for the element type of kernels that read the dtype at run time (kStrided).
struct AnyValue {};

constexpr Walk walk_of(Layout layout) {
  return layout == Layout::kColumnMajor ? Walk::kSquare : Walk::kRows;
}
constexpr uint32_t band_of(Layout layout) {
  return layout == Layout::kColumnMajor ? kMixedBand : 1;
}

/// How many of a patch's rows (or columns) from `start` lie inside: 0, 4 or 8.
SP24_HD int valid_lines(int start, int extent) {
  return start >= extent ? 0 : extent - start < kPatch ? extent - start : kPatch;
}

__device__ __forceinline__ uint32_t stride_bytes(const ConstMatrix& w, bool by_rows,
                                                 uint32_t bytes) {
  return static_cast<uint32_t>(by_rows ? w.row_stride : w.col_stride) * bytes;
}

/// 16-bit weights: the values stay packed, in lines as they lie in memory.
template <typename T, Layout kLayout>
struct WeightPatch {
  static constexpr bool kPaired = false;
  static constexpr bool kByRows = kLayout == Layout::kRowMajor;
  Patch16 lines;

  __device__ __forceinline__ void load(const ConstMatrix& w, int row, int col) {
    const int rows = static_cast<int>(w.rows), cols = static_cast<int>(w.cols);
    const int line = kByRows ? row : col, along = kByRows ? col : row;
    const int valid =
        along < (kByRows ? cols : rows) ? valid_lines(line, kByRows ? rows : cols) : 0;
    const uint32_t stride = stride_bytes(w, kByRows, 2);
    lines = load_patch16<4>(advance(static_cast<const uint16_t*>(w.data), stride, line) + along,
                            stride, valid);
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
template <Layout kLayout>
struct WeightPatch<float, kLayout> {
  static constexpr bool kPaired = true;
  static constexpr bool kByRows = kLayout == Layout::kRowMajor;
  float lines[kPatch][kPatch];

  __device__ __forceinline__ void load(const ConstMatrix& w, int row, int col) {
    const int rows = static_cast<int>(w.rows), cols = static_cast<int>(w.cols);
    const int line = kByRows ? row : col, along = kByRows ? col : row;
    const uint32_t stride = stride_bytes(w, kByRows, 4);
    load_patch32<4>(lines, advance(static_cast<const float*>(w.data), stride, line), stride, along,
                    kByRows ? kTileCols / 2 : kTileRows / 4, kByRows ? cols : rows,
                    valid_lines(line, kByRows ? rows : cols));
  }
  __device__ __forceinline__ float value(int i, int j) const {
    return kByRows ? lines[i][j] : lines[j][i];
  }

  template <typename Out>
  __device__ __forceinline__ Patch16 rows() const {
    Patch16 out;
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int p = 0; p < 4; ++p)
        out.line[i][p] = make_pair16<Out>(value(i, 2 * p), value(i, 2 * p + 1));
    }
    return out;
  }
  __device__ __forceinline__ Patch16 columns(const Patch16& rows) const { return transpose(rows); }
};

template <typename... T>
static __device__ float read_as(TypeList<T...>, DType dtype, const void* data, int64_t offset) {
  float value = 0.0f;
  const bool known =
      ((dtype == kDTypeOf<T> && (value = to_float(static_cast<const T*>(data)[offset]), true)) ||
       ...);
  if (!known) __trap();  // csrc/api has refused it
  return value;
}

/// One element of any dtype, as fp32.
static __device__ __noinline__ float read_value(const ConstMatrix& w, int row, int col) {
  if (row >= w.rows || col >= w.cols) return 0.0f;
  const int64_t offset = int64_t{row} * w.row_stride + col * w.col_stride;
  if (w.dtype == DType::kFloat32) return static_cast<const float*>(w.data)[offset];
  return read_as(Types16{}, w.dtype, w.data, offset);
}

/// One element as Out: the same dtype keeps its bits, another is rounded once.
template <typename Out>
static __device__ __noinline__ uint32_t read_bits(const ConstMatrix& w, int row, int col) {
  if (w.dtype != kDTypeOf<Out>) return from_float<Out>(read_value(w, row, col)).bits;
  if (row >= w.rows || col >= w.cols) return 0;
  return static_cast<const uint16_t*>(w.data)[int64_t{row} * w.row_stride + col * w.col_stride];
}

/// Anything else: elements are read where they are needed.
template <>
struct WeightPatch<AnyValue, Layout::kStrided> {
  static constexpr bool kPaired = false;
  const ConstMatrix* w;
  int row, col;

  __device__ __forceinline__ void load(const ConstMatrix& from, int at_row, int at_col) {
    w = &from, row = at_row, col = at_col;
  }
  __device__ __forceinline__ float value(int i, int j) const {
    return read_value(*w, row + i, col + j);
  }

  template <typename Out>
  __device__ __forceinline__ Patch16 rows() const {
    Patch16 out;
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int p = 0; p < 4; ++p) {
        out.line[i][p] = read_bits<Out>(*w, row + i, col + 2 * p) |
                         read_bits<Out>(*w, row + i, col + 2 * p + 1) << 16;
      }
    }
    return out;
  }
  __device__ __forceinline__ Patch16 columns(const Patch16& rows) const { return transpose(rows); }
};

}  // namespace sparse24
