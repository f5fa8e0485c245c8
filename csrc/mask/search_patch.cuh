// search_patch.cuh: the four masks of one thread's 8x8 patch.
#pragma once

#include <cstdint>

#include "common/weight_patch.cuh"
#include "mask/block_search.h"

namespace sparse24 {

/// Masks of blocks (0, 0) and (0, 1) in the halves of `top`, (1, 0) and (1, 1) in those of
/// `bottom`.
template <typename Patch>
__device__ __forceinline__ void search_patch(const Patch& patch, uint32_t& top, uint32_t& bottom) {
  uint32_t mask[2][2];
  SP24_UNROLL
  for (int bi = 0; bi < 2; ++bi) {
    SP24_UNROLL
    for (int bj = 0; bj < 2; ++bj) {
      float w[4][4];
      SP24_UNROLL
      for (int i = 0; i < 4; ++i) {
        SP24_UNROLL
        for (int j = 0; j < 4; ++j) w[i][j] = patch.value(4 * bi + i, 4 * bj + j);
      }
      mask[bi][bj] = search_block(w);
    }
  }
  top = mask[0][0] | mask[0][1] << 16;
  bottom = mask[1][0] | mask[1][1] << 16;
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
