// block_sum.cuh: counts of all threads, added into one number in global memory. Integers: any order
// gives the same sum.
#pragma once

#include <cstdint>

namespace sparse24 {

constexpr int kCountThreads = 256;

/// Adds `count` of every thread of a block of kCountThreads to *total. All threads must call it.
__device__ __forceinline__ void add_block_sum(int64_t count, int64_t* total) {
  __shared__ int64_t of_warp[kCountThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2)
    count += __shfl_down_sync(0xFFFFFFFFu, count, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = count;
  __syncthreads();  // all warps' sums are there
  if (threadIdx.x == 0) {
    int64_t sum = 0;
    for (int64_t of_one : of_warp) sum += of_one;
    if (sum != 0)
      atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(sum));
  }
}

/// Blocks for a grid-stride loop over `items`: a few waves at most.
inline uint32_t count_blocks(int64_t items) {
  constexpr int64_t kMost = 4096;
  const int64_t blocks = (items + kCountThreads - 1) / kCountThreads;
  return static_cast<uint32_t>(blocks < kMost ? blocks : kMost);
}

}  // namespace sparse24
