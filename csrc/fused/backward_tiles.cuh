// backward_tiles.cuh: activation backward with MVUE packing where operands are column-major, all or
// some of them.
//
//   d_h [tokens, d_ff], gate_up and d_gate_up [tokens, 2*d_ff], h, packed and E are those of
//   activation_backward.cu, with or without h
//
// Work     A block takes a tile of 64 tokens x 128 features of h, a thread 8 x 8 of it. Operands
//          come and dense results leave as in activation/backward.cu: 128 or 256 contiguous bytes
//          at a time, whichever way they lie. While the results leave, a thread prunes its
//          patches of d_gate and d_up from registers, rounded as they are stored, one after the
//          other in a loop: half the code.
// Traffic  Bytes and times are those of activation_backward.cu.
// Packed   goes straight to memory: a warp writes whole, aligned 64 B of each row (tile_place.h).
#pragma once

#include "activation/backward_tile.cuh"
#include "fused/backward_mvue.cuh"
#include "pack/mvue_patch.cuh"

namespace sparse24 {

template <typename T>
using MvueTile = PatchTile<T, kTileRows / kPatch, kTileCols / kPatch>;

template <typename Operand>
struct TileBackwardMvue : TileBackward<Operand> {
  PackedBackward to;
};

// Four blocks an SM: 128 registers a thread, 51 KB of shared memory a block.
template <Activation kKind, bool kGated, typename T, typename Operand>
__global__ void __launch_bounds__(kTileThreads, 4)
    backward_mvue_tile_kernel(const __grid_constant__ TileBackwardMvue<Operand> p) {
  if (!kRunsHere<Operand>) return;
  using Tile = MvueTile<T>;
  constexpr int kHalves = kGated ? 2 : 1;
  static_assert(Tile::kSide == kPatch && Tile::kThreads == kTileThreads, "16-bit elements");
  extern __shared__ __align__(128) char staged[];
  __shared__ alignas(16) uint8_t meta_stage[kHalves * kTileMetaBlocks * kStageStride];
  __shared__ uint64_t arrived;
  const TileIndex tile = p.walk.tile();
  const int token = static_cast<int>(tile.row) * kTileRows;
  const int feature = static_cast<int>(tile.col) * kTileCols;
  if (!kByEngine<Operand> || threadIdx.x == 0)
    load_operands<Tile, kGated>(p, staged, &arrived, token, feature);
  const PhiloxKey key = philox_key(p.to.seed[0], p.to.seed[1]);
  wait_for_loads<Operand>(&arrived);

  // Patches are held by rows, as pruning wants them. What a tile has outside of the matrix is
  // zeros: with d_h = 0 all gradients are, and their groups keep nothing.
  SquarePatch<T> d_h, gate, up;
  read_operands<Tile, kGated>(p, staged, false, d_h, gate, up);
  backward_patch<kKind, kGated>(p.lines, d_h, gate, up);

  __syncthreads();  // all operands have been read
  stage_results<Tile, kGated>(p, staged, false, d_h, gate, up);
  fence_results<Operand>();
  __syncthreads();  // all results are staged
  if (!kByEngine<Operand> || threadIdx.x == 0)
    store_results<Tile, kGated>(p, staged, token, feature);

  const TilePlace patch = typename Tile::Place{}.patch;
  const uint32_t row = patch.token * kPatch, col = patch.feature * kPatch;  // within the tile
  const uint32_t first_token = token + row, first_feature = feature + col;
  const uint32_t tokens = p.to.tokens, d_ff = p.to.d_ff, stride = 2 * kHalves * d_ff;
  const bool inside = first_token < tokens && first_feature < d_ff;
  uint16_t* packed = advance(p.to.packed, stride, first_token / 2) + first_feature;
  uint32_t quad = first_feature / 4, block = col / kMetaBlock;
#pragma unroll 1
  for (int half = 0; half < kHalves; ++half) {
    Patch16 lines;
    SP24_UNROLL
    for (int i = 0; i < 32; ++i) lines.line[i / 4][i % 4] = gate.word[i / 4][i % 4];
    const MvuePatch pruned = prune_patch<T, true>(lines, key, first_token / 8, quad);
    if (inside) store_mvue(packed, stride, pruned);
    stage_bytes(meta_stage, block, col % kMetaBlock, row, pruned.quad[0].meta, pruned.quad[1].meta);
    if constexpr (kGated) gate = up;
    packed += d_ff, quad += d_ff / 4, block += kTileMetaBlocks;
  }
  __syncthreads();  // all bytes of the tile's blocks are staged
  store_halves<kGated>(p.to, meta_stage, tile);
  if (!kByEngine<Operand> || threadIdx.x == 0) finish_stores<Operand>();
}

}  // namespace sparse24
