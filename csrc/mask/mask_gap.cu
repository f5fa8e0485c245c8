// mask_gap.cu: by how much each block's best pattern beats the second best; for statistics, not for training speed.
//
//   w     [rows, cols] fp32, bf16 or fp16, any strides;  gap   fp32 [rows/4, cols/4]
//
// Work     A thread takes a block and goes through all 90 patterns (patterns.h), about 1500 additions.
#include <cuda_runtime.h>

#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "mask/mask_cuda.h"
#include "mask/patterns.h"

namespace sparse24 {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mask_gap_kernel(ConstMatrix w, float* gap, const __grid_constant__ PatternTable table) {
  const int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x, block_cols = w.cols / 4;
  const int64_t row = block / block_cols * 4, col = block % block_cols * 4;
  if (row >= w.rows) return;
  float values[4][4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) {
      values[i][j] = to_float(static_cast<const T*>(w.data)[(row + i) * w.row_stride + (col + j) * w.col_stride]);
    }
  }
  gap[block] = block_gap(values, table);
}

}  // namespace

namespace cuda {

void mask_gap(const ConstMatrix& w, float* gap, cudaStream_t stream) {
  const int64_t blocks = w.rows / 4 * (w.cols / 4);
  if (blocks == 0) return;
  with_type(w.dtype, [&](auto zero) {
    mask_gap_kernel<decltype(zero)>
        <<<static_cast<uint32_t>(round_up(blocks, kThreads) / kThreads), kThreads, 0, stream>>>(w, gap, kPatternTable);
  });
  SP24_CHECK_LAUNCH("mask_gap of [", w.rows, ", ", w.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
