// layout.h: which accesses a matrix allows: vectors of 16 bytes along rows or along columns, or
// single elements.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/convert.h"
#include "sparse24/types.h"

namespace sparse24 {

/// kStrided is anything that the other two do not cover: odd addresses, strides or extents.
enum class Layout { kRowMajor, kColumnMajor, kStrided };

inline bool is_aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

/// Kernels count rows and columns in 32 bits, and offsets in 64: a matrix may have more than 2^31
/// elements, one row or column may not. Strides in bytes then fit 32 bits too.
constexpr int64_t kLargestExtent = int64_t{1} << 30;

inline void check_extents32(int64_t rows, int64_t cols, const char* name) {
  SP24_CHECK(rows < kLargestExtent && cols < kLargestExtent, name,
             " must have fewer than 2^30 rows and columns, got [", rows, ", ", cols, "]");
}

/// Can lines of `length` elements, `stride` apart, be cut into whole vectors at aligned addresses?
inline bool moves_in_vectors(int64_t element_stride, int64_t stride, int64_t length,
                             int64_t per_vector) {
  return element_stride == 1 && stride >= 0 && stride < kLargestExtent &&
         stride % per_vector == 0 && length % per_vector == 0;
}

/// A layout whose lines move in whole vectors. `parts` 2: lines along rows consist of two halves,
/// and both must.
template <typename Pointer>
Layout vector_layout(const MatrixView<Pointer>& m, int parts = 1) {
  const int64_t per_vector = 16 / bytes_of(m.dtype);
  if (!is_aligned16(m.data)) return Layout::kStrided;
  if (moves_in_vectors(m.col_stride, m.row_stride, m.cols, parts * per_vector))
    return Layout::kRowMajor;
  if (moves_in_vectors(m.row_stride, m.col_stride, m.rows, per_vector)) return Layout::kColumnMajor;
  return Layout::kStrided;
}

/// A layout for patches of 8x8: columns in whole patches, and rows too where patches are read along
/// columns. Row-major patches may end inside the matrix.
template <typename Pointer>
Layout patch_layout(const MatrixView<Pointer>& m) {
  constexpr int64_t kPatchSide = 8;
  if (m.cols % kPatchSide != 0) return Layout::kStrided;
  const Layout layout = vector_layout(m);
  return layout == Layout::kColumnMajor && m.rows % kPatchSide != 0 ? Layout::kStrided : layout;
}

}  // namespace sparse24
