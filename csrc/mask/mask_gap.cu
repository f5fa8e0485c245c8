// mask_gap.cu: the L1 gap between the best and the second-best pattern of every block. For
// monitoring, on demand.
//
//   w  [rows, cols] of any dtype and strides;  gap  fp32 [rows/4, cols/4]
//
// Work     One block a thread through all 90 patterns, some 3000 instructions: bound by arithmetic.
// Traffic  bf16: 2 B read and 1/4 B written an element. 11008 x 4096: 101 MB, 24 us at 4.2 TB/s;
//          the instructions take 285 us at one a lane and clock of an H200.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/layout.h"
#include "common/weight_patch.cuh"
#include "mask/mask_cuda.h"
#include "mask/patterns.h"

namespace sparse24 {
namespace {

constexpr int kGapThreads = 128;

__constant__ PatternTable device_patterns = make_pattern_table();

__global__ void __launch_bounds__(kGapThreads)
    mask_gap_kernel(const __grid_constant__ ConstMatrix w, float* gap) {
  const int64_t block = int64_t{blockIdx.x} * kGapThreads + threadIdx.x, block_cols = w.cols / 4;
  if (block >= w.rows / 4 * block_cols) return;
  const int row = static_cast<int>(block / block_cols) * 4,
            col = static_cast<int>(block % block_cols) * 4;
  float values[4][4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) values[i][j] = read_value(w, row + i, col + j);
  }
  gap[block] = block_gap(values, device_patterns);
}

}  // namespace

namespace cuda {

void mask_gap(const ConstMatrix& w, float* gap, cudaStream_t stream) {
  const int64_t blocks = w.rows / 4 * (w.cols / 4);
  if (blocks == 0) return;
  check_extents32(w.rows, w.cols, "w");
  mask_gap_kernel<<<static_cast<uint32_t>((blocks + kGapThreads - 1) / kGapThreads), kGapThreads, 0,
                    stream>>>(w, gap);
  SP24_CHECK_LAUNCH("mask_gap of ", name_of(w.dtype), " [", w.rows, ", ", w.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
