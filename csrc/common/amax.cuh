// amax.cuh: the largest finite magnitude of a matrix, and counts of what a format clips or flushes,
// gathered by passes that read it anyway.
//
// Magnitudes compare like their bits, so maxima are of integers: in a warp by one instruction, in a
// block through shared memory, and in device memory by an atomic, which a block leaves out when
// another one has raised the maximum far enough. The result does not depend on any order.
#pragma once

#include <cstdint>

#include "common/float8.h"
#include "sparse24/quantize.h"

namespace sparse24 {

/// The larger of `seen` and |x|, in bits; what is not finite counts as nothing.
__device__ __forceinline__ uint32_t raise_amax(uint32_t seen, float x) {
  const uint32_t magnitude = float_bits(x) & 0x7FFFFFFFu;
  return magnitude < 0x7F800000u && magnitude > seen ? magnitude : seen;
}

/// The block's amax, in two steps with a barrier of the caller's between them: all threads stage
/// theirs, in `of_warp` with room for the block's warps, then all call the other.
__device__ __forceinline__ void stage_amax(uint32_t seen, uint32_t* of_warp) {
  const uint32_t most = __reduce_max_sync(0xFFFFFFFFu, seen);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
}
template <int kThreads>
__device__ __forceinline__ void store_staged_amax(const uint32_t* of_warp, float* amax) {
  if (threadIdx.x >= 32) return;
  const uint32_t mine = threadIdx.x < kThreads / 32 ? of_warp[threadIdx.x] : 0u;
  const uint32_t block = __reduce_max_sync(0xFFFFFFFFu, mine);
  if (threadIdx.x == 0 && block > *reinterpret_cast<volatile uint32_t*>(amax))
    atomicMax(reinterpret_cast<uint32_t*>(amax), block);
}

/// Both steps, and the barrier.
template <int kThreads>
__device__ __forceinline__ void store_amax(uint32_t seen, float* amax, uint32_t* of_warp) {
  stage_amax(seen, of_warp);
  __syncthreads();  // all warps' maxima are there
  store_staged_amax<kThreads>(of_warp, amax);
}

/// Adds what one value of the format did to `clipped` and `flushed`.
template <typename F>
__device__ __forceinline__ void count_value(float x, float inverse_scale, uint32_t& clipped,
                                            uint32_t& flushed) {
  if (!is_finite(x)) return;
  const float y = fabsf(x * inverse_scale);
  constexpr float kHalfOfLast =
      Float8Traits<F>::kMantissaBits == 3 ? 0x1p-10f : 0x1p-17f;  // a tie goes to zero
  clipped += y > Float8Traits<F>::kLargest;
  flushed += x != 0.0f && y <= kHalfOfLast;
}

/// All threads of a warp must call it.
__device__ __forceinline__ void add_counts(uint32_t clipped, uint32_t flushed, int64_t* counters) {
  const uint32_t all_clipped = __reduce_add_sync(0xFFFFFFFFu, clipped);
  const uint32_t all_flushed = __reduce_add_sync(0xFFFFFFFFu, flushed);
  auto* to = reinterpret_cast<unsigned long long*>(counters);
  if (threadIdx.x % 32 != 0) return;
  if (all_clipped != 0) atomicAdd(to, static_cast<unsigned long long>(all_clipped));
  if (all_flushed != 0) atomicAdd(to + 1, static_cast<unsigned long long>(all_flushed));
}

}  // namespace sparse24
