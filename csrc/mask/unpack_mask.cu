// unpack_mask.cu: masks as bytes, and a check of masks from outside. For inspection, export, tests.
//
//   mask  uint16 [rows/4, cols/4];  out  one byte (0 or 1) an element, [rows, cols]
//
// Work     A thread unpacks one block: four stores of 4 bytes, neighbouring threads along a row.
// Traffic  1/8 B read and 1 B written an element. 11008 x 4096: 51 MB, 12 us at 4.2 TB/s.
#include <cuda_runtime.h>

#include "common/block_sum.cuh"
#include "common/cuda_check.h"
#include "mask/block_search.h"
#include "mask/mask_cuda.h"

namespace sparse24 {
namespace {

__global__ void __launch_bounds__(kCountThreads)
    unpack_mask_kernel(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols) {
  const int64_t block = int64_t{blockIdx.x} * kCountThreads + threadIdx.x, block_cols = cols / 4;
  if (block >= rows / 4 * block_cols) return;
  const uint32_t bits = mask[block];
  uint8_t* first = out + block / block_cols * 4 * cols + block % block_cols * 4;
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 4 == 0;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = bits >> (4 * i);
    const uchar4 kept = make_uchar4(row & 1, row >> 1 & 1, row >> 2 & 1, row >> 3 & 1);
    uint8_t* to = first + i * cols;
    if (aligned) {
      *reinterpret_cast<uchar4*>(to) = kept;
    } else {
      to[0] = kept.x, to[1] = kept.y, to[2] = kept.z, to[3] = kept.w;
    }
  }
}

__global__ void __launch_bounds__(kCountThreads)
    count_bad_blocks_kernel(const uint16_t* mask, int64_t blocks, int64_t* bad) {
  int64_t count = 0;
  for (int64_t b = int64_t{blockIdx.x} * kCountThreads + threadIdx.x; b < blocks;
       b += int64_t{gridDim.x} * kCountThreads) {
    count += is_transposable(mask[b]) ? 0 : 1;
  }
  add_block_sum(count, bad);
}

}  // namespace

namespace cuda {

void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols,
                 cudaStream_t stream) {
  const int64_t blocks = rows / 4 * (cols / 4);
  if (blocks == 0) return;
  const uint32_t grid = static_cast<uint32_t>((blocks + kCountThreads - 1) / kCountThreads);
  unpack_mask_kernel<<<grid, kCountThreads, 0, stream>>>(mask, out, rows, cols);
  SP24_CHECK_LAUNCH("unpack_mask to [", rows, ", ", cols, "]");
}

void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad, cudaStream_t stream) {
  SP24_CHECK_CUDA(cudaMemsetAsync(bad, 0, sizeof *bad, stream));
  if (blocks == 0) return;
  count_bad_blocks_kernel<<<count_blocks(blocks), kCountThreads, 0, stream>>>(mask, blocks, bad);
  SP24_CHECK_LAUNCH("count_bad_blocks of ", blocks, " blocks");
}

}  // namespace cuda
}  // namespace sparse24
