// pack_tile.cuh: weights to packed form, both orientations from one read; the kernel behind
// pack_by_mask and search_and_pack for column-major weights and for any that no vector fits.
// Row-major ones go through pack_rows.cuh.
//
//   w          [rows, cols] bf16, fp16 or fp32; rows % 4 == cols % 4 == 0
//   mask       uint16 [rows/4, cols/4]: read, or searched and written, as the mask source says
//   packed     16-bit [rows, cols/2], E for (m = rows, k = cols)
//   packed_t   16-bit [rows/2, cols], E_t for (m = cols, k = rows)
//
// Work     A block of 128 threads takes a tile of 64 x 128 elements of one of up to 32 weights, a
//          thread 8x8 of them (tile.h): four masks, eight whole bytes of E and eight of E_t.
// Values   Kept pairs are picked by byte permutations; their selectors are looked up by the bits of
//          the mask (pack_group.h).
// Traffic  bf16: 2 B read, 1.125 + 1.125 B written, 0.125 B of mask an element; fp32 2 B more.
//          11008 x 4096 in bf16: 197 MB, 47 us at 4.2 TB/s; fp32 287 MB, 68 us. Metadata go through
//          stage.cuh.
// Edges    Column-major weights may end after whole patches only; cols % 8 != 0, odd strides or
//          addresses, and one 16-bit dtype to another take kStrided. The last tile of a row or
//          column of tiles owns what is left; metadata past the edge, up to 64, become padding
//          nibbles.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "pack/pack_list.cuh"
#include "pack/stage.cuh"

namespace sparse24 {

/// Kept bits of a patch's lines (rows, or columns): nibbles of lines 0-3 in `low`, of lines 4-7 in
/// `high`; the groups of elements 0-3 in the lower halves, those of 4-7 in the upper ones.
struct KeptLines {
  uint32_t low, high;
};

__device__ __forceinline__ KeptLines kept_rows(const PatchMasks& masks) {
  return {masks.top, masks.bottom};
}

__device__ __forceinline__ KeptLines kept_columns(const PatchMasks& masks) {
  return {transpose_masks(pair_of_lows(masks.top, masks.bottom)),
          transpose_masks(pair_of_highs(masks.top, masks.bottom))};
}

/// Bytes of E of a patch: `low` for lines 0-3, `high` for lines 4-7.
struct MetaBytes {
  uint32_t low, high;
};

/// With padding nibbles where fewer than 8 lines (m) or positions along them (k) are valid.
__device__ __forceinline__ MetaBytes patch_meta(const KeptLines& lines, int valid_m, int valid_k) {
  constexpr uint32_t kPadding = 0x11111111u * kPaddingNibble;
  MetaBytes meta = {meta_bytes_of(lines.low), meta_bytes_of(lines.high)};
  const uint32_t kept = valid_k == 0 ? 0u : valid_k == 4 ? 0x0F0F0F0Fu : 0xFFFFFFFFu;
  meta.low = valid_m < 4 ? kPadding : (meta.low & kept) | (kPadding & ~kept);
  meta.high = valid_m < 8 ? kPadding : (meta.high & kept) | (kPadding & ~kept);
  return meta;
}

/// The kept pairs of a patch: of line i, the pair of its group `group` (0: elements 0-3).
struct KeptPairs {
  uint32_t pair[kPatch][2];
};

__device__ __forceinline__ KeptPairs kept_pairs(const Patch16& lines, const KeptLines& bits) {
  KeptPairs kept;
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    SP24_UNROLL
    for (int group = 0; group < 2; ++group) {
      const PairSelectors selectors =
          pair_selectors((half == 0 ? bits.low : bits.high) >> (16 * group));
      SP24_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t (&line)[4] = lines.line[4 * half + i];
        kept.pair[4 * half + i][group] =
            kept_pair(line[2 * group], line[2 * group + 1], selectors, i);
      }
    }
  }
  return kept;
}

/// Stores the low and the high 16 bits of a pair at `to` and `to + step`.
__device__ __forceinline__ void store_halves(uint16_t* to, int64_t step, uint32_t pair) {
  to[0] = static_cast<uint16_t>(pair);
  to[step] = static_cast<uint16_t>(pair >> 16);
}

/// packed: of each row, the kept pair of the left group and that of the right one.
template <bool kVector>
__device__ __forceinline__ void store_packed(uint16_t* packed, const KeptPairs& kept, int row,
                                             int col, int cols, int valid_rows, int valid_cols) {
  if (valid_cols == 0) return;
  const uint32_t stride = static_cast<uint32_t>(cols);  // cols/2 values
  uint16_t* first = advance(packed, stride, row) + col / 2;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    uint16_t* to = advance(first, stride, i);
    if (i / 4 * 4 < valid_rows) {
      if constexpr (kVector) {
        store8(to, make_uint2(kept.pair[i][0], kept.pair[i][1]));
      } else {
        store_halves(to, 1, kept.pair[i][0]);
        if (valid_cols > 4) store_halves(to + 2, 1, kept.pair[i][1]);
      }
    }
  }
}

/// packed_t: of each column, the kept pair of the upper group to two rows, that of the lower one to
/// the next two.
template <bool kVector>
__device__ __forceinline__ void store_packed_t(uint16_t* packed_t, const KeptPairs& kept, int row,
                                               int col, int cols, int valid_rows, int valid_cols) {
  if (valid_cols == 0) return;
  const uint32_t stride = 2 * static_cast<uint32_t>(cols);
  uint16_t* first = advance(packed_t, stride, static_cast<uint32_t>(row) / 2) + col;
  SP24_UNROLL
  for (int group = 0; group < 2; ++group) {
    uint16_t* to = advance(first, stride, 2 * group);
    if (4 * group < valid_rows) {
      if constexpr (kVector) {
        uint32_t low[4], high[4];
        SP24_UNROLL
        for (int p = 0; p < 4; ++p) {
          low[p] = pair_of_lows(kept.pair[2 * p][group], kept.pair[2 * p + 1][group]);
          high[p] = pair_of_highs(kept.pair[2 * p][group], kept.pair[2 * p + 1][group]);
        }
        store16(to, make_uint4(low[0], low[1], low[2], low[3]));
        store16(advance(to, stride, 1), make_uint4(high[0], high[1], high[2], high[3]));
      } else {
        SP24_UNROLL
        for (int j = 0; j < kPatch; ++j) {
          if (j < valid_cols) store_halves(to + j, cols, kept.pair[j][group]);
        }
      }
    }
  }
}

// fp32 patches take 64 registers and a search needs about 40 more: four blocks an SM hold all of
// them.
template <typename In, Layout kLayout>
constexpr int kPackBlocksPerSm = std::is_same_v<In, AnyValue> ? 1
                                 : std::is_same_v<In, float>  ? 4
                                                              : 6;

template <typename In, typename Out, Layout kLayout, typename Masks>
__global__ void __launch_bounds__(kTileThreads, (kPackBlocksPerSm<In, kLayout>))
    pack_kernel(const __grid_constant__ PackList<kTensorsPerLaunch> list) {
  __shared__ alignas(16) uint8_t stage[2 * kTileMetaBlocks * kStageStride];

  const int index = list.find(blockIdx.x);
  const PackTensor& t = list.tensor[index];
  const TileIndex tile =
      raster_tile(list.within(blockIdx.x, index), t.tile_rows, t.tile_cols, band_of(kLayout));
  using Patch = WeightPatch<In, kLayout>;
  const PatchOrigin origin = patch_origin(walk_of(kLayout), Patch::kPaired, threadIdx.x);
  const int row = static_cast<int>(tile.row) * kTileRows + origin.row;
  const int col = static_cast<int>(tile.col) * kTileCols + origin.col;
  const int rows = static_cast<int>(t.w.rows), cols = static_cast<int>(t.w.cols);
  const int valid_rows = valid_lines(row, rows), valid_cols = valid_lines(col, cols);
  constexpr bool kVector = kLayout != Layout::kStrided;

  Patch patch;
  patch.load(t.w, row, col);
  const PatchMasks masks = Masks::template of<kLayout>(patch, t, row, col);
  const Patch16 by_row = patch.template rows<Out>();

  const uint32_t tile_row = origin.row, block = origin.col / uint32_t{kMetaBlock},
                 block_col = origin.col % uint32_t{kMetaBlock};
  if (t.packed != nullptr) {
    const KeptLines bits = kept_rows(masks);
    store_packed<kVector>(static_cast<uint16_t*>(t.packed), kept_pairs(by_row, bits), row, col,
                          cols, valid_rows, valid_cols);
    const MetaBytes staged = patch_meta(bits, valid_rows, valid_cols);
    stage_bytes(stage, block, tile_row, block_col, staged.low, staged.high);
  }
  if (t.packed_t != nullptr) {
    const KeptLines bits = kept_columns(masks);
    store_packed_t<kVector>(static_cast<uint16_t*>(t.packed_t),
                            kept_pairs(patch.columns(by_row), bits), row, col, cols, valid_rows,
                            valid_cols);
    const MetaBytes staged = patch_meta(bits, valid_cols, valid_rows);
    stage_bytes(stage, kTileMetaBlocks + block, block_col, tile_row, staged.low, staged.high);
  }

  __syncthreads();  // all bytes of the tile's blocks are staged
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t block_of_cols = tile.col * kTileMetaBlocks + warp % kTileMetaBlocks;
  if (warp < kTileMetaBlocks) {
    if (t.packed != nullptr) store_staged(t.E, stage, warp, tile.row, block_of_cols, rows, cols);
  } else {
    if (t.packed_t != nullptr)
      store_staged(t.E_t, stage, warp, block_of_cols, tile.row, cols, rows);
  }
}

}  // namespace sparse24
