// activation_pack.cuh: what forward and backward of activation_pack.cu share: a thread's patch of
// 8 tokens x 8 features, pruned along features, and the way out of both packed forms.
//
// Along features a patch has two groups a token, so one byte of E; the values kept of a token are 8
// bytes, and 16 lanes store 128 contiguous ones. Along tokens a patch is what mvue_pack takes
// (mvue_patch.cuh).
#pragma once

#include <cstdint>

#include "common/patch.cuh"
#include "common/raster.h"
#include "common/weight_patch.cuh"
#include "fused/pruned_lines.cuh"
#include "pack/mvue_patch.cuh"
#include "pack/pack_group.h"
#include "pack/stage.cuh"

namespace sparse24 {

/// The packed forms of a pruned [tokens, d_ff].
struct PackedBothWays {
  uint16_t* packed;  // [tokens, d_ff/2]
  uint8_t* E;        // or null: somebody has it
  const int64_t* seed;
  uint16_t* packed_t;  // [padded/2, d_ff], or null
  uint8_t* E_t;
  int tokens, d_ff;
};

/// This thread's patch: its first token and feature, and its place in the tile.
struct PatchPlace {
  PatchOrigin origin;
  int token, feature;
};

__device__ __forceinline__ PatchPlace patch_place(const TileIndex& tile) {
  const PatchOrigin origin = patch_origin(Walk::kRows, false, threadIdx.x);
  return {origin, static_cast<int>(tile.row) * kTileRows + origin.row,
          static_cast<int>(tile.col) * kTileCols + origin.col};
}

/// Eight tokens of a row-major matrix, or of any with kVector false; zeros past the end.
template <typename T, bool kVector>
__device__ __forceinline__ Patch16 load_tokens(const ConstMatrix& m, const PatchPlace& at) {
  Patch16 patch;
  if constexpr (kVector) {
    const uint32_t stride = stride_bytes(m, true, 2);
    const uint16_t* first =
        advance(static_cast<const uint16_t*>(m.data), stride, at.token) + at.feature;
    const int tokens = static_cast<int>(m.rows), d_ff = static_cast<int>(m.cols);
    patch = load_patch16<1, true>(first, stride, at.feature < d_ff ? tokens - at.token : 0);
  } else {
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int p = 0; p < 4; ++p) {
        patch.line[i][p] = read_bits<T>(m, at.token + i, at.feature + 2 * p) |
                           read_bits<T>(m, at.token + i, at.feature + 2 * p + 1) << 16;
      }
    }
  }
  return patch;
}

/// Four lines of a pruned patch: the values kept of each to packed. Returns their bytes of E.
template <bool kVector>
__device__ __forceinline__ uint32_t store_kept(const PackedBothWays& to, const PatchPlace& at,
                                               int first_line, uint32_t nibbles,
                                               const uint32_t (&lines)[kPatch][4]) {
  const PairSelectors left = pair_selectors(nibbles), right = pair_selectors(nibbles >> 16);
  const uint32_t stride = static_cast<uint32_t>(to.d_ff);  // d_ff/2 values
  uint16_t* first = advance(to.packed, stride, at.token + first_line) + at.feature / 2;
  const int valid = at.feature < to.d_ff ? to.tokens - at.token - first_line : 0;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t (&line)[4] = lines[first_line + i];
    const uint32_t a = kept_pair(line[0], line[1], left, i),
                   b = kept_pair(line[2], line[3], right, i);
    if (i >= valid) continue;
    uint16_t* row = advance(first, stride, i);
    if constexpr (kVector) {
      store8(row, make_uint2(a, b));
    } else {
      row[0] = static_cast<uint16_t>(a), row[1] = static_cast<uint16_t>(a >> 16);
      if (at.feature + 4 >= to.d_ff) continue;
      row[2] = static_cast<uint16_t>(b), row[3] = static_cast<uint16_t>(b >> 16);
    }
  }
  return meta_bytes_of(nibbles);
}

/// The patch pruned along features, and the way out of what is kept. kDense: what is not kept becomes
/// 0 in `patch`. The rest as in prune_lines.
template <bool kVector, bool kDense, typename Positive, typename Result>
__device__ __forceinline__ void prune_and_store(const PackedBothWays& to, const PatchPlace& at,
                                                Patch16& patch, uint32_t (&meta)[2],
                                                const Positive& positive, const Result& result) {
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t nibbles = prune_lines<kDense>(patch, 4 * half, positive, result);
    meta[half] = store_kept<kVector>(to, at, 4 * half, nibbles, patch.line);
  }
}

/// Staged blocks of E, then those of E_t.
constexpr int kPackStageBytes = 2 * kTileMetaBlocks * kStageStride;

__device__ __forceinline__ void stage_rows(uint8_t* stage, const PatchPlace& at,
                                           const uint32_t (&meta)[2]) {
  const uint32_t col = at.origin.col;
  stage_bytes(stage, col / kMetaBlock, at.origin.row, col % kMetaBlock, meta[0], meta[1]);
}

/// The pruned patch pruned again along tokens.
template <typename T, bool kVector>
__device__ __forceinline__ void store_along_tokens(const PackedBothWays& to, const PatchPlace& at,
                                                   const Patch16& patch, uint8_t* stage) {
  const PhiloxKey key = philox_key(to.seed[0], to.seed[1]);
  const MvuePatch pruned = prune_patch<T, true>(
      patch, key, static_cast<uint32_t>(at.token) / kPatch, static_cast<uint32_t>(at.feature) / 4);
  const uint32_t stride = 2 * static_cast<uint32_t>(to.d_ff);
  uint16_t* first = advance(to.packed_t, stride, static_cast<uint32_t>(at.token) / 2) + at.feature;
  if (at.token < to.tokens && at.feature < to.d_ff) {
    if constexpr (kVector) {
      store_mvue(first, stride, pruned);
    } else {
      SP24_UNROLL
      for (int i = 0; i < 4; ++i) {
        SP24_UNROLL
        for (int f = 0; f < kPatch; ++f) {
          const uint2 row = pruned.quad[f / 4].row[i];
          if (at.feature + f < to.d_ff)
            advance(first, stride, i)[f] =
                static_cast<uint16_t>((f % 4 < 2 ? row.x : row.y) >> (16 * (f % 2)));
        }
      }
    }
  }
  const uint32_t col = at.origin.col;
  stage_bytes(stage, kTileMetaBlocks + col / kMetaBlock, col % kMetaBlock, at.origin.row,
              pruned.quad[0].meta, pruned.quad[1].meta);
}

/// After a barrier: warps 0 and 1 store the blocks of E, 2 and 3 those of E_t.
__device__ __forceinline__ void store_metadata(const PackedBothWays& to, const TileIndex& tile,
                                               const uint8_t* stage) {
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t block = tile.col * kTileMetaBlocks + warp % kTileMetaBlocks;
  if (warp < kTileMetaBlocks) {
    if (to.E != nullptr) store_staged(to.E, stage, warp, tile.row, block, to.tokens, to.d_ff);
  } else if (to.packed_t != nullptr) {
    store_staged(to.E_t, stage, warp, block, tile.row, to.d_ff,
                 static_cast<uint32_t>(round_up(to.tokens, kPatch)));
  }
}

}  // namespace sparse24
