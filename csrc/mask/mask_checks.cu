// mask_checks.cu: masks as one byte an element, and the count of blocks that are not transposable.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/metadata.h"
#include "mask/block_search.h"
#include "mask/mask_cuda.h"

namespace sparse24 {
namespace {

constexpr int kThreads = 256;

/// A thread writes four neighbours of a row: one block's share of it.
__global__ void __launch_bounds__(kThreads)
    unpack_mask_kernel(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t block_cols) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = unit / block_cols, block_col = unit % block_cols;
  if (row >= rows) return;
  const uint32_t bits = mask[row / 4 * block_cols + block_col] >> (row % 4 * 4);
  // Bits 0-3 to the lowest bit of each byte.
  const uint32_t bytes = (bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21;
  if (reinterpret_cast<uintptr_t>(out) % 4 == 0) {
    reinterpret_cast<uint32_t*>(out)[unit] = bytes;
  } else {
    for (int i = 0; i < 4; ++i) out[4 * unit + i] = static_cast<uint8_t>(bytes >> (8 * i));
  }
}

__global__ void __launch_bounds__(kThreads)
    count_bad_blocks_kernel(const uint16_t* mask, int64_t blocks, unsigned long long* bad) {
  const int64_t block = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool wrong = block < blocks && !is_transposable(mask[block]);
  const uint32_t votes = __ballot_sync(0xFFFFFFFFu, wrong);
  if (threadIdx.x % 32 == 0 && votes != 0) atomicAdd(bad, static_cast<unsigned long long>(__popc(votes)));
}

uint32_t grid_of(int64_t units) { return static_cast<uint32_t>(round_up(units, kThreads) / kThreads); }

}  // namespace

namespace cuda {

void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols, cudaStream_t stream) {
  if (rows == 0 || cols == 0) return;
  unpack_mask_kernel<<<grid_of(rows * (cols / 4)), kThreads, 0, stream>>>(mask, out, rows, cols / 4);
  SP24_CHECK_LAUNCH("unpack_mask of [", rows, ", ", cols, "]");
}

void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad, cudaStream_t stream) {
  SP24_CHECK_CUDA(cudaMemsetAsync(bad, 0, sizeof *bad, stream));
  if (blocks == 0) return;
  count_bad_blocks_kernel<<<grid_of(blocks), kThreads, 0, stream>>>(mask, blocks,
                                                                    reinterpret_cast<unsigned long long*>(bad));
  SP24_CHECK_LAUNCH("count_bad_blocks of ", blocks, " blocks");
}

}  // namespace cuda
}  // namespace sparse24
