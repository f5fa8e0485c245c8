// search_patch.cuh: the masks of one thread's patch: four of 8x8 elements, two of 4x8.
#pragma once

#include <cstdint>

#include "common/weight_patch.cuh"
#include "mask/block_search.h"

namespace sparse24 {

/// Masks of the two blocks of rows 4*bi, ..., 4*bi + 3 of a patch, in the halves of the word.
template <typename Patch>
__device__ __forceinline__ uint32_t search_pair(const Patch& patch, int bi) {
  uint32_t mask[2];
  SP24_UNROLL
  for (int bj = 0; bj < 2; ++bj) {
    float w[4][4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      SP24_UNROLL
      for (int j = 0; j < 4; ++j) w[i][j] = patch.value(4 * bi + i, 4 * bj + j);
    }
    mask[bj] = search_block(w);
  }
  return mask[0] | mask[1] << 16;
}

/// Masks of blocks (0, 0) and (0, 1) in the halves of `top`, (1, 0) and (1, 1) in those of
/// `bottom`.
template <typename Patch>
__device__ __forceinline__ void search_patch(const Patch& patch, uint32_t& top, uint32_t& bottom) {
  top = search_pair(patch, 0);
  bottom = search_pair(patch, 1);
}

/// Two neighbouring masks at a time, unless kStrided, where the last column of blocks may stand
/// alone.
template <Layout kLayout>
__device__ __forceinline__ void store_masks(uint16_t* mask, uint32_t top, uint32_t bottom, int row,
                                            int col, int rows, int cols) {
  const uint32_t block_cols = static_cast<uint32_t>(cols) / 4;
  uint16_t* first = mask + uint64_t{static_cast<uint32_t>(row) / 4} * block_cols + col / 4;
  SP24_UNROLL
  for (int bi = 0; bi < 2; ++bi) {
    if (row + 4 * bi < rows && col < cols) {
      const uint32_t pair = bi == 0 ? top : bottom;
      uint16_t* to = first + bi * block_cols;
      if constexpr (kLayout != Layout::kStrided) {
        *reinterpret_cast<uint32_t*>(to) = pair;
      } else {
        to[0] = static_cast<uint16_t>(pair);
        if (col + 4 < cols) to[1] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
}

}  // namespace sparse24
