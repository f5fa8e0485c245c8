// pack_tile.cuh: weights to packed form, both orientations from one read; the kernel behind
// compress and prune_compress.
//
//   w          [rows, cols] bf16, fp16 or fp32; rows % 4 == cols % 4 == 0
//   mask       uint16 [rows/4, cols/4]: read, or searched and written, as the mask source says
//   packed     16-bit [rows, cols/2], E for (m = rows, k = cols)
//   packed_t   16-bit [rows/2, cols], E_t for (m = cols, k = rows)
//
// Work     A block of 128 threads takes a tile of 64 x 128 elements of one of up to 32 weights, a
//          thread 8x8 of them (tile.h): four masks, eight whole bytes of E and eight of E_t.
// Values   Kept pairs are picked by byte permutations; their selectors come from the bytes of E
//          (pack_group.h). About 11 instructions an element, 9 more with the search.
// Traffic  bf16: 2 B read, 1.125 + 1.125 B written, 0.125 B of mask an element; fp32 2 B more. A
//          warp reads 2 x 256 B of rows and writes 2 x 128 B of packed, 2 x 256 B of packed_t at a
//          time; metadata go through stage.cuh.
// Edges    Row-major weights may end after 4 rows of a patch, column-major ones after whole patches
//          only; cols % 8 != 0, odd strides or addresses, and one 16-bit dtype to another take
//          kStrided. The last tile of a row or column of tiles owns what is left; metadata past
//          the edge, up to 64, become padding nibbles.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/cuda_check.h"
#include "common/tensor_list.h"
#include "common/weight_patch.cuh"
#include "compress/pack_group.h"
#include "compress/stage.cuh"
#include "sparse24/compress.h"

namespace sparse24 {

struct PackTensor {
  ConstMatrix w;
  uint16_t* mask;
  void* packed;
  uint8_t* E;
  void* packed_t;
  uint8_t* E_t;
  uint32_t tile_rows, tile_cols;
};
template <int kCapacity>
using PackList = TensorList<PackTensor, kCapacity>;
static_assert(sizeof(PackList<kTensorsPerLaunch>) <= kKernelParameterBytes,
              "a launch's tensors must fit its parameters");

/// The masks of a patch: blocks (0, 0) and (0, 1) in the halves of `top`, (1, 0) and (1, 1) in
/// those of `bottom`.
struct PatchMasks {
  uint32_t top, bottom;
};

/// A mask source that reads: Masks::of(patch, ...) is the other way to get them
/// (fused/search_and_pack.cu).
struct ReadMasks {
  template <Layout kLayout, typename Patch>
  static __device__ __forceinline__ PatchMasks of(const Patch&, const PackTensor& t, int row,
                                                  int col) {
    // What lies outside gets some valid mask; its metadata are replaced, its values not stored.
    constexpr uint32_t kFirst = 0xC3C3u;
    PatchMasks masks = {kFirst | kFirst << 16, kFirst | kFirst << 16};
    const int rows = static_cast<int>(t.w.rows), cols = static_cast<int>(t.w.cols);
    const uint32_t block_cols = static_cast<uint32_t>(cols) / 4;
    const uint16_t* first =
        t.mask + uint64_t{static_cast<uint32_t>(row) / 4} * block_cols + col / 4;
    SP24_UNROLL
    for (int bi = 0; bi < 2; ++bi) {
      if (row + 4 * bi < rows && col < cols) {
        const uint16_t* from = first + bi * block_cols;
        uint32_t& pair = bi == 0 ? masks.top : masks.bottom;
        if constexpr (kLayout != Layout::kStrided) {
          pair = *reinterpret_cast<const uint32_t*>(from);
        } else {
          pair = from[0] | (col + 4 < cols ? from[1] : kFirst) << 16;
        }
      }
    }
    return masks;
  }
};

/// Bytes of E of a patch: `low` for lines 0-3 (rows, or columns for E_t), `high` for lines 4-7.
struct MetaBytes {
  uint32_t low, high;
};

__device__ __forceinline__ MetaBytes row_meta(const PatchMasks& masks) {
  return {meta_from_bits8(interleave_nibbles(masks.top)),
          meta_from_bits8(interleave_nibbles(masks.bottom))};
}

__device__ __forceinline__ MetaBytes column_meta(const PatchMasks& masks) {
  const uint32_t left = transpose_masks(pair_of_lows(masks.top, masks.bottom));
  const uint32_t right = transpose_masks(pair_of_highs(masks.top, masks.bottom));
  return {meta_from_bits8(interleave_nibbles(left)), meta_from_bits8(interleave_nibbles(right))};
}

/// Padding nibbles where fewer than 8 lines (m) or positions along them (k) are valid.
__device__ __forceinline__ MetaBytes pad_meta(MetaBytes meta, int valid_m, int valid_k) {
  constexpr uint32_t kPadding = 0x11111111u * kPaddingNibble;
  const uint32_t kept = valid_k == 0 ? 0u : valid_k == 4 ? 0x0F0F0F0Fu : 0xFFFFFFFFu;
  meta.low = valid_m < 4 ? kPadding : (meta.low & kept) | (kPadding & ~kept);
  meta.high = valid_m < 8 ? kPadding : (meta.high & kept) | (kPadding & ~kept);
  return meta;
}

/// The kept pairs of a patch: of line i, the pair of its group `group` (0: elements 0-3).
struct KeptPairs {
  uint32_t pair[kPatch][2];
};

__device__ __forceinline__ KeptPairs kept_pairs(const Patch16& lines, const MetaBytes& meta) {
  KeptPairs kept;
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    SP24_UNROLL
    for (int k = 0; k < 4; ++k) {  // nibbles k and k + 4: the same group of lines two apart
      const uint32_t selectors = pair_selectors(half == 0 ? meta.low : meta.high, k);
      const int line = 4 * half + k / 2, group = k % 2;
      const uint32_t (&upper)[4] = lines.line[line];
      const uint32_t (&lower)[4] = lines.line[line + 2];
      kept.pair[line][group] = select_bytes(upper[2 * group], upper[2 * group + 1], selectors);
      kept.pair[line + 2][group] =
          select_bytes(lower[2 * group], lower[2 * group + 1], selectors >> 16);
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

template <typename In, typename Out, Layout kLayout, typename Masks, int kCapacity>
__global__ void __launch_bounds__(kTileThreads, (kPackBlocksPerSm<In, kLayout>))
    pack_kernel(const __grid_constant__ PackList<kCapacity> list) {
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
    const MetaBytes meta = row_meta(masks);
    store_packed<kVector>(static_cast<uint16_t*>(t.packed), kept_pairs(by_row, meta), row, col,
                          cols, valid_rows, valid_cols);
    const MetaBytes staged = pad_meta(meta, valid_rows, valid_cols);
    stage_bytes(stage, block, tile_row, block_col, staged.low, staged.high);
  }
  if (t.packed_t != nullptr) {
    const MetaBytes meta = column_meta(masks);
    store_packed_t<kVector>(static_cast<uint16_t*>(t.packed_t),
                            kept_pairs(patch.columns(by_row), meta), row, col, cols, valid_rows,
                            valid_cols);
    const MetaBytes staged = pad_meta(meta, valid_cols, valid_rows);
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

/// What selects a kernel; weights of equal class share launches.
struct PackClass {
  DType in, out;
  Layout layout;

  bool operator==(const PackClass& other) const {
    return in == other.in && out == other.out && layout == other.layout;
  }
};

inline PackClass classify_pack(const PackArgs& args) {
  Layout layout = patch_layout(args.w);
  const bool converts16 = args.w.dtype != DType::kFloat32 && args.w.dtype != args.out_dtype;
  const bool aligned = reinterpret_cast<uintptr_t>(args.mask) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(args.packed) % 8 == 0 &&
                       is_aligned16(args.packed_t);
  if (converts16 || !aligned) layout = Layout::kStrided;
  return {args.w.dtype, args.out_dtype, layout};
}

template <int kCapacity>
using PackKernel = void (*)(PackList<kCapacity>);

template <typename Masks, int kCapacity>
PackKernel<kCapacity> choose_row_major(const PackClass& c) {
  const bool to_bf16 = c.out == DType::kBFloat16;
  if (c.in == DType::kFloat32) {
    return to_bf16 ? pack_kernel<float, BFloat16, Layout::kRowMajor, Masks, kCapacity>
                   : pack_kernel<float, Float16, Layout::kRowMajor, Masks, kCapacity>;
  }
  return to_bf16 ? pack_kernel<BFloat16, BFloat16, Layout::kRowMajor, Masks, kCapacity>
                 : pack_kernel<Float16, Float16, Layout::kRowMajor, Masks, kCapacity>;
}

template <typename Masks>
PackKernel<kTensorsPerLaunch> choose_pack_kernel(const PackClass& c) {
  constexpr int kMany = kTensorsPerLaunch;
  if (c.layout == Layout::kRowMajor) return choose_row_major<Masks, kMany>(c);
  const bool to_bf16 = c.out == DType::kBFloat16;
  if (c.layout == Layout::kStrided) {
    return to_bf16 ? pack_kernel<AnyValue, BFloat16, Layout::kStrided, Masks, kMany>
                   : pack_kernel<AnyValue, Float16, Layout::kStrided, Masks, kMany>;
  }
  if (c.in == DType::kFloat32) {
    return to_bf16 ? pack_kernel<float, BFloat16, Layout::kColumnMajor, Masks, kMany>
                   : pack_kernel<float, Float16, Layout::kColumnMajor, Masks, kMany>;
  }
  return to_bf16 ? pack_kernel<BFloat16, BFloat16, Layout::kColumnMajor, Masks, kMany>
                 : pack_kernel<Float16, Float16, Layout::kColumnMajor, Masks, kMany>;
}

template <typename Masks>
void launch_pack(const PackArgs* weights, int count, cudaStream_t stream, const char* op) {
  PackList<kTensorsPerLaunch> list;
  PackClass list_class{};
  const auto flush = [&] {
    const uint32_t tiles = list.tiles();
    if (tiles == 0) return;
    if (list.count == 1 && list_class.layout == Layout::kRowMajor) {
      const auto kernel = choose_row_major<Masks, 1>(list_class);
      kernel<<<tiles, kTileThreads, 0, stream>>>(list.single());
    } else {
      const auto kernel = choose_pack_kernel<Masks>(list_class);
      kernel<<<tiles, kTileThreads, 0, stream>>>(list);
    }
    const ConstMatrix& first = list.tensor[0].w;
    SP24_CHECK_LAUNCH(op, " of ", list.count, " weights, the first ", name_of(first.dtype), " [",
                      first.rows, ", ", first.cols, "]");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    const PackArgs& args = weights[i];
    if (args.w.rows == 0 || args.w.cols == 0) continue;
    check_extents32(args.w.rows, args.w.cols, "w");
    const PackClass args_class = classify_pack(args);
    if (list.full() || !(args_class == list_class)) flush();
    list_class = args_class;
    const uint32_t tile_rows = static_cast<uint32_t>(round_up(args.w.rows, kTileRows) / kTileRows);
    const uint32_t tile_cols = static_cast<uint32_t>(round_up(args.w.cols, kTileCols) / kTileCols);
    list.add(
        {args.w, args.mask, args.packed, args.E, args.packed_t, args.E_t, tile_rows, tile_cols},
        tile_rows * tile_cols);
  }
  flush();
}

}  // namespace sparse24
