// backward_rows.cuh: activation backward with MVUE packing where all operands are row-major.
//
//   d_h [tokens, d_ff], gate_up and d_gate_up [tokens, 2*d_ff], h, packed and E are those of
//   activation_backward.cu, with or without h
//
// Work     A tile is 64 tokens x 128 features of h, a warp takes eight tokens of it, a thread four
//          features: quads of MVUE (mvue_patch.cuh). A thread loads its 8 x 4 elements of d_h, gate
//          and up at once, then walks its two token groups in a loop that is not unrolled.
// Traffic  Bytes and times at the bound are those of activation_backward.cu.
// Why      8 bytes a lane are 256 contiguous ones a warp. The loop halves the code and its
//          registers: 16384 x 14336 takes 703 us on an H200, unrolled 918; with three blocks an SM
//          instead of two, which spill, 730 (docs/kernels/mvue.md).
#pragma once

#include "activation/functions.h"
#include "common/square_patch.cuh"
#include "fused/backward_mvue.cuh"
#include "pack/mvue_patch.cuh"
#include "pack/stage.cuh"
#include "pack/tile_sums.cuh"

namespace sparse24 {

struct RowsBackwardMvue {
  PatchOperand d_h, gate_up, d_gate_up, h;  // h.data is null if it is not wanted
  uint32_t tile_rows, tile_cols;
  PackedBackward to;
  float* tile_sums;  // or null
};

/// Four features of a token: d_h, gate, up; later h, d_gate, d_up.
struct TokenPart {
  uint2 d_h, gate, up;
};

template <Activation kKind, bool kGated, typename T>
__device__ __forceinline__ void backward_word(uint32_t& d_h, uint32_t& gate, uint32_t& up) {
  float h[2], d_gate[2];
  [[maybe_unused]] float d_up[2];
  SP24_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float d = i == 0 ? low_value<T>(d_h) : high_value<T>(d_h);
    const float x = i == 0 ? low_value<T>(gate) : high_value<T>(gate);
    if constexpr (kGated) {
      const float y = i == 0 ? low_value<T>(up) : high_value<T>(up);
      const GatedBackward back = gated_backward<kKind, true>(d, x, y);
      h[i] = back.h, d_gate[i] = back.d_gate, d_up[i] = back.d_up;
    } else {
      const ValueAndSlope act = activate<kKind, true>(x);
      h[i] = act.value, d_gate[i] = d * act.slope;
    }
  }
  d_h = make_pair16<T>(h[0], h[1]);
  gate = make_pair16<T>(d_gate[0], d_gate[1]);
  if constexpr (kGated) up = make_pair16<T>(d_up[0], d_up[1]);
}

/// Both pairs of one half's token group: `tokens[i]` is token i's d_gate or d_up.
template <typename T>
__device__ __forceinline__ void prune_half_quad(const uint2 (&tokens)[4], const uint32_t (&bits)[2],
                                                char* packed, uint32_t stride, bool inside,
                                                uint32_t meta_mask, uint32_t& meta) {
  const PairWords words[2] = {{{tokens[0].x, tokens[1].x, tokens[2].x, tokens[3].x}},
                              {{tokens[0].y, tokens[1].y, tokens[2].y, tokens[3].y}}};
  PrunedPair pruned[2];
  prune_pairs<T>(words, bits, pruned);
  if (inside) {
    store8(packed, make_uint2(pruned[0].first, pruned[1].first));
    store8(packed + stride, make_uint2(pruned[0].second, pruned[1].second));
  }
  meta |= meta_of(pruned[0], pruned[1]) & meta_mask;
}

/// Four features of four tokens, added to the sums over the octet.
template <typename T>
__device__ __forceinline__ void add_tokens(const TokenPart (&tokens)[4], float (&sums)[4]) {
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    add_pair<T>(tokens[i].gate.x, sums[0], sums[1]);
    add_pair<T>(tokens[i].gate.y, sums[2], sums[3]);
  }
}

// Two blocks an SM: 128 registers hold a quad of three operands and the pruning of a group.
// kSums: sums for the gradient of a bias, which plain layers have.
template <Activation kKind, bool kGated, typename T, bool kSums = false>
__global__ void __launch_bounds__(kRowThreads, kGated ? 2 : 3)
    backward_mvue_rows_kernel(const __grid_constant__ RowsBackwardMvue p) {
  static_assert(!(kSums && kGated));
  constexpr int kHalves = kGated ? 2 : 1;
  __shared__ alignas(16) uint8_t stage[kHalves * kTileMetaBlocks * kStageStride];
  [[maybe_unused]] __shared__ alignas(16) OctetSums octet_sums;

  const int d_ff = p.to.d_ff;
  const TileIndex tile = raster_tile(blockIdx.x, p.tile_rows, p.tile_cols, 1);
  const int row = static_cast<int>(threadIdx.x / 32) * 8;
  const int col = static_cast<int>(threadIdx.x % 32) * 4;
  const int token = static_cast<int>(tile.row) * kTileRows + row;
  const int feature = static_cast<int>(tile.col) * kTileCols + col;
  // Tokens past the end are zeros: with d_h = 0 all gradients are, and their groups keep nothing.
  const int valid = feature < d_ff ? p.to.tokens - token : 0;
  const uint32_t features = static_cast<uint32_t>(d_ff) * kHalves;

  TokenPart now[4], next[4];
  const char* d_h = patch_address<T>(p.d_h, token, feature);
  const char* gate_up = patch_address<T>(p.gate_up, token, feature);
  SP24_UNROLL
  for (int i = 0; i < 8; ++i) {
    TokenPart part = {};
    if (i < valid) {
      part.gate = load8_cached(advance(gate_up, p.gate_up.line_bytes, i));
      if (kGated)
        part.up = load8_cached(advance(gate_up, p.gate_up.line_bytes, i) + p.gate_up.half_bytes);
      part.d_h = load8_cached(advance(d_h, p.d_h.line_bytes, i));
    }
    (i < 4 ? now[i] : next[i - 4]) = part;
  }

  const PhiloxKey key = philox_key(p.to.seed[0], p.to.seed[1]);
  const uint32_t octet = static_cast<uint32_t>(token) / 8,
                 quad = static_cast<uint32_t>(feature) / 4;
  Philox4 random[kHalves];
  random[0] = mvue_random(key, octet, quad);
  if constexpr (kGated) random[1] = mvue_random(key, octet, quad + d_ff / 4);

  char* d_gate_up = patch_address<T>(p.d_gate_up, token, feature);
  char* h = p.h.data == nullptr ? nullptr : patch_address<T>(p.h, token, feature);
  const uint32_t stride = 2 * features;
  char* packed =
      reinterpret_cast<char*>(p.to.packed) + uint64_t{stride} * (token / 2) + 2 * feature;
  uint32_t meta[kHalves] = {};
  [[maybe_unused]] float sums[4] = {};
#pragma unroll 1
  for (int group = 0; group < 2; ++group) {
    const int left = valid - 4 * group;
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      backward_word<kKind, kGated, T>(now[i].d_h.x, now[i].gate.x, now[i].up.x);
      backward_word<kKind, kGated, T>(now[i].d_h.y, now[i].gate.y, now[i].up.y);
      if (i < left) {
        char* to = advance(d_gate_up, p.d_gate_up.line_bytes, i);
        store8(to, now[i].gate);
        if (kGated) store8(to + p.d_gate_up.half_bytes, now[i].up);
        if (h != nullptr) store8(advance(h, p.h.line_bytes, i), now[i].d_h);
      }
    }
    if constexpr (kSums) add_tokens<T>(now, sums);
    const uint32_t meta_mask = group == 0 ? 0x0F0F0F0Fu : 0xF0F0F0F0u;
    SP24_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      const uint2 tokens[4] = {
          half == 0 ? now[0].gate : now[0].up, half == 0 ? now[1].gate : now[1].up,
          half == 0 ? now[2].gate : now[2].up, half == 0 ? now[3].gate : now[3].up};
      const uint32_t bits[2] = {random[half].word[0], random[half].word[1]};
      prune_half_quad<T>(tokens, bits, packed + uint64_t{2} * half * d_ff, stride, valid > 0,
                         meta_mask, meta[half]);
      random[half].word[0] = random[half].word[2], random[half].word[1] = random[half].word[3];
    }
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) now[i] = next[i];
    d_gate_up = advance(d_gate_up, p.d_gate_up.line_bytes, 4);
    if (h != nullptr) h = advance(h, p.h.line_bytes, 4);
    packed = advance(packed, stride, 2);
  }
  SP24_UNROLL
  for (int half = 0; half < kHalves; ++half) {
    const uint32_t block = half * kTileMetaBlocks + static_cast<uint32_t>(col) / kMetaBlock;
    stage_meta(stage + stage_offset(block, static_cast<uint32_t>(col) % kMetaBlock, row),
               meta[half]);
  }
  if constexpr (kSums) octet_sums.put(row, col, sums);
  __syncthreads();  // all bytes of the tile's blocks are staged, and all sums of its octets
  store_halves<kGated>(p.to, stage, tile);
  if constexpr (kSums) octet_sums.store(p.tile_sums, tile.row, tile.col, features);
}

}  // namespace sparse24
