// pack_rows.cuh: the kernel behind pack_by_mask and search_and_pack for row-major weights in whole
// vectors; everything else goes through pack_tile.cuh, where operands, values and traffic are told.
//
// Work     A block takes a tile of 64 x kCols elements of one of up to kCapacity weights, a thread
//          4x8 of them (row_patch.cuh): two masks, four whole bytes of E, and eight nibbles of E_t,
//          which it exchanges with the lane below or above it for four whole bytes.
// Values   Pairs are picked by byte permutations, their selectors looked up (pack_group.h): about 9
//          instructions an element, and as many again with the search.
// Traffic  Bytes and times are those of pack_tile.cuh. In tiles of 256 columns two warps read
//          2 x 512 B of rows, side by side, and write as much of packed_t and half of it of packed;
//          metadata go through stage.cuh.
// Edges    A patch is inside or outside; metadata past the edge, up to 64, become padding nibbles.
#pragma once

#include "common/row_patch.cuh"
#include "pack/pack_list.cuh"
#include "pack/stage.cuh"

namespace sparse24 {

/// packed: of each row, the kept pair of the left group and that of the right one.
template <typename Out, typename Patch>
__device__ __forceinline__ void store_patch_rows(uint16_t* packed, const Patch& patch,
                                                 uint32_t masks, int row, int col, int cols) {
  const uint32_t stride = static_cast<uint32_t>(cols);  // cols/2 values
  uint16_t* first = advance(packed, stride, row) + col / 2;
  const PairSelectors left = pair_selectors(masks), right = pair_selectors(masks >> 16);
  SP24_UNROLL
  for (int i = 0; i < kRowPatch; ++i) {
    uint32_t pair[4];
    SP24_UNROLL
    for (int p = 0; p < 4; ++p) pair[p] = patch.template pair<Out>(i, p);
    store8(advance(first, stride, i),
           make_uint2(kept_pair(pair[0], pair[1], left, i), kept_pair(pair[2], pair[3], right, i)));
  }
}

/// packed_t: of each column, the first kept element to one row, the second to the next. `columns`
/// are the masks transposed.
template <typename Out, typename Patch>
__device__ __forceinline__ void store_patch_columns(uint16_t* packed_t, const Patch& patch,
                                                    uint32_t columns, int row, int col, int cols) {
  uint32_t kept[8];
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    const PairSelectors selectors = pair_selectors(columns >> (16 * half));
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) {
      uint32_t rows[kRowPatch];  // the pairs that column 4 * half + j is in
      SP24_UNROLL
      for (int i = 0; i < kRowPatch; ++i) rows[i] = patch.template pair<Out>(i, 2 * half + j / 2);
      const uint32_t upper =
          j % 2 == 0 ? pair_of_lows(rows[0], rows[1]) : pair_of_highs(rows[0], rows[1]);
      const uint32_t lower =
          j % 2 == 0 ? pair_of_lows(rows[2], rows[3]) : pair_of_highs(rows[2], rows[3]);
      kept[4 * half + j] = kept_pair(upper, lower, selectors, j);
    }
  }
  uint32_t first[4], second[4];
  SP24_UNROLL
  for (int p = 0; p < 4; ++p) {
    first[p] = pair_of_lows(kept[2 * p], kept[2 * p + 1]);
    second[p] = pair_of_highs(kept[2 * p], kept[2 * p + 1]);
  }
  const uint32_t stride = 2 * static_cast<uint32_t>(cols);
  uint16_t* to = advance(packed_t, stride, static_cast<uint32_t>(row) / 2) + col;
  store16(to, make_uint4(first[0], first[1], first[2], first[3]));
  store16(advance(to, stride, 1), make_uint4(second[0], second[1], second[2], second[3]));
}

/// Four bytes, 8 apart: where lines m, ..., m + 3 wait in stage.cuh.
__device__ __forceinline__ void stage_four(uint8_t* first, uint32_t bytes) {
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) first[8 * i] = static_cast<uint8_t>(bytes >> (8 * i));
}

/// The lane has a nibble of E_t for each of eight columns, and the lane kWide away has those of the
/// same columns' other four rows. The upper lane joins bytes of columns 0-3, the lower lane those
/// of columns 4-7.
template <int kWide>
__device__ __forceinline__ uint32_t join_columns(uint32_t columns, bool inside, bool is_lower) {
  constexpr uint32_t kPadding = 0x01010101u * kPaddingNibble;
  const uint32_t left = inside ? look_up<kMetaTable>(columns) : kPadding;
  const uint32_t right = inside ? look_up<kMetaTable>(columns >> 16) : kPadding;
  const int shift = is_lower ? 4 : 0;
  const uint32_t given = (is_lower ? left : right) << shift;
  const uint32_t kept = (is_lower ? right : left) << shift;
  return kept | __shfl_xor_sync(0xFFFFFFFFu, given, kWide);
}

/// 64 registers a thread, or 80 for fp32 in small blocks: no kernel spills.
template <typename In, typename Tile>
constexpr int kRowBlocksPerSm =
    Tile::kThreads <= 128 && sizeof(In) == 4 ? 6 : 1024 / Tile::kThreads;

template <typename In, typename Out, typename Masks, typename Tile, int kCapacity>
__global__ void __launch_bounds__(Tile::kThreads, (kRowBlocksPerSm<In, Tile>))
    pack_rows_kernel(const __grid_constant__ PackList<kCapacity> list) {
  __shared__ alignas(16) uint8_t stage[2 * Tile::kMetaBlocks * kStageStride];

  const int index = list.find(blockIdx.x);
  const PackTensor& t = list.tensor[index];
  const uint32_t number = list.within(blockIdx.x, index);
  const uint32_t tile_row = number / t.tile_cols, tile_col = number - tile_row * t.tile_cols;
  using Patch = RowPatch<In, Tile::kWide>;
  const PatchOrigin origin = Tile::origin(Patch::kPaired, threadIdx.x);
  const int row = static_cast<int>(tile_row) * kTileRows + origin.row;
  const int col = static_cast<int>(tile_col) * Tile::kCols + origin.col;
  const int rows = static_cast<int>(t.w.rows), cols = static_cast<int>(t.w.cols);
  const bool inside = row < rows && col < cols;

  Patch patch;
  patch.load(t.w, row, col, inside);
  const uint32_t masks = Masks::of_row_patch(patch, t, row, col, inside);

  const uint32_t m = origin.row, k = origin.col;
  const uint32_t block = k / uint32_t{kMetaBlock}, in_block = k % uint32_t{kMetaBlock};
  if (t.packed != nullptr) {
    if (inside) {
      store_patch_rows<Out>(static_cast<uint16_t*>(t.packed), patch, masks, row, col, cols);
    }
    constexpr uint32_t kPadding = 0x11111111u * kPaddingNibble;
    stage_four(stage + stage_offset(block, m, in_block), inside ? meta_bytes_of(masks) : kPadding);
  }
  if (t.packed_t != nullptr) {
    const uint32_t columns = transpose_masks(masks);
    if (inside) {
      store_patch_columns<Out>(static_cast<uint16_t*>(t.packed_t), patch, columns, row, col, cols);
    }
    const bool is_lower = (threadIdx.x & Tile::kWide) != 0;
    const uint32_t offset = stage_offset(Tile::kMetaBlocks + block, in_block, m & ~uint32_t{7});
    stage_four(stage + offset + (is_lower ? 32 : 0),
               join_columns<Tile::kWide>(columns, inside, is_lower));
  }

  __syncthreads();  // all bytes of the tile's blocks are staged
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t block_of_cols = tile_col * Tile::kMetaBlocks + warp % Tile::kMetaBlocks;
  if (warp < Tile::kMetaBlocks) {
    if (t.packed != nullptr) store_staged(t.E, stage, warp, tile_row, block_of_cols, rows, cols);
  } else if (warp < 2 * Tile::kMetaBlocks) {
    if (t.packed_t != nullptr)
      store_staged(t.E_t, stage, warp, block_of_cols, tile_row, cols, rows);
  }
}

}  // namespace sparse24
