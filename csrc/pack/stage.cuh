// stage.cuh: metadata of a tile, staged in shared memory.
//
// A thread's bytes of E lie 8 apart, in blocks that hold the bytes of 64 threads: written directly
// they would cost a memory transaction each. So threads put bytes into staged blocks, and after a
// barrier each warp stores whole blocks of 512 contiguous bytes, 16 a lane.
#pragma once

#include <cstdint>

#include "common/metadata.h"
#include "common/tile.h"
#include "common/vector.cuh"

namespace sparse24 {

/// Eight bytes for m, m + 1, ..., m + 7 (m % 8 == 0) and the same k; the first four in `low`.
__device__ __forceinline__ void stage_bytes(uint8_t* stage, uint32_t block, uint32_t m, uint32_t k,
                                            uint32_t low, uint32_t high) {
  uint8_t* first = stage + stage_offset(block, m, k);
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    first[8 * i] = static_cast<uint8_t>(low >> (8 * i));
    first[8 * i + 32] = static_cast<uint8_t>(high >> (8 * i));
  }
}

/// One warp stores staged block `block` to E, at its block (block_m, block_k). Blocks outside of E
/// are not stored.
__device__ __forceinline__ void store_staged(uint8_t* E, const uint8_t* stage, uint32_t block,
                                             uint32_t block_m, uint32_t block_k, uint32_t m,
                                             uint32_t k) {
  if (block_m * kMetaBlock >= m || block_k * kMetaBlock >= k) return;
  const uint32_t blocks_m = (m + kMetaBlock - 1) / kMetaBlock, lane = threadIdx.x % 32;
  uint8_t* to = E + meta_block_start(block_m, block_k, blocks_m) + lane * 16;
  const uint8_t* from = stage + block * kStageStride + lane * 16;
  if (reinterpret_cast<uintptr_t>(E) % 16 == 0) {
    store16(to, *reinterpret_cast<const uint4*>(from));
  } else {
    for (int i = 0; i < 16; ++i) to[i] = from[i];
  }
}

}  // namespace sparse24
