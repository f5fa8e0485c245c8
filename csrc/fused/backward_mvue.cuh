// backward_mvue.cuh: what both kernels of activation backward with MVUE packing share.
#pragma once

#include "common/raster.h"
#include "pack/stage.cuh"

namespace sparse24 {

/// The packed form of d_gate_up.
struct PackedBackward {
  const int64_t* seed;
  uint16_t* packed;
  uint8_t* E;
  int tokens, d_ff;
};

/// Stores the staged metadata of a tile: the blocks of gate, then those of up, each by one warp.
template <bool kGated>
__device__ __forceinline__ void store_halves(const PackedBackward& p, const uint8_t* stage,
                                             const TileIndex& tile) {
  const uint32_t d_ff = static_cast<uint32_t>(p.d_ff);
  const uint32_t warp = threadIdx.x / 32, half = warp / kTileMetaBlocks;
  const uint32_t block = tile.col * kTileMetaBlocks + warp % kTileMetaBlocks;
  if (half < (kGated ? 2 : 1) && block * kMetaBlock < d_ff) {
    store_staged(p.E, stage, warp, half * (d_ff / kMetaBlock) + block, tile.row,
                 d_ff * (kGated ? 2 : 1), static_cast<uint32_t>(round_up(p.tokens, 8)));
  }
}

}  // namespace sparse24
