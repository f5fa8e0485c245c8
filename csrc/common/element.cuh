// element.cuh: one element a thread, for operands that no vector fits: right for any strides, and
// slow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/check.h"
#include "sparse24/types.h"

namespace sparse24 {

constexpr int kElementThreads = 256;

struct ElementIndex {
  int64_t row, col;
};

/// This thread's element of [rows, cols], neighbouring threads along columns (`column_major`) or
/// rows; false past the end.
__device__ __forceinline__ bool element_index(int64_t rows, int64_t cols, bool column_major,
                                              ElementIndex& at) {
  const int64_t index = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (index >= rows * cols) return false;
  at.row = column_major ? index % rows : index / cols;
  at.col = column_major ? index / rows : index % cols;
  return true;
}

template <typename T, typename Pointer>
__device__ __forceinline__ T& element(const MatrixView<Pointer>& m, int64_t row, int64_t col) {
  return static_cast<T*>(m.data)[row * m.row_stride + col * m.col_stride];
}

template <typename Pointer>
uint32_t element_blocks(const MatrixView<Pointer>& m) {
  const int64_t blocks = (m.rows * m.cols + kElementThreads - 1) / kElementThreads;
  SP24_CHECK(blocks < int64_t{1} << 31,
             "a matrix that is not aligned for vectors must have fewer than 2^39 elements, got [",
             m.rows, ", ", m.cols, "]");
  return static_cast<uint32_t>(blocks);
}

}  // namespace sparse24
