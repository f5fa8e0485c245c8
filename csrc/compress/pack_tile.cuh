// pack_tile.cuh: weights to packed form, both orientations from one read; the kernel behind compress and prune_compress.
//
//   w          [rows, cols] bf16, fp16 or fp32; rows % 4 == cols % 4 == 0
//   mask       uint16 [rows/4, cols/4]: read, or searched and written, as the mask source says
//   packed     16-bit [rows, cols/2], E for (m = rows, k = cols);  packed_t [rows/2, cols], E_t for (m = cols, k = rows)
//
// Work     A block of 128 threads takes a tile of 64 x 128 elements of one of up to 32 weights, a thread 8x8 of them
//          (tile.h): four masks, and so eight whole bytes of E and eight of E_t.
// Values   Kept pairs are picked by byte permutations whose selectors come from the bytes of E (pack_group.h).
// Traffic  bf16: 2 B read, 1.125 + 1.125 B written, 0.125 B of mask an element; fp32 2 B more. A warp reads 2 x 256 B of
//          rows and writes 2 x 128 B of packed, 2 x 256 B of packed_t at a time; metadata go through stage.cuh.
// Edges    Row-major weights may end after 4 rows of a patch, column-major ones only after whole patches; cols % 8 != 0,
//          odd strides or addresses, and 16-bit to other 16-bit dtypes take kStrided. The last tile of each row and column
//          of tiles owns what is left; metadata past the edge, up to 64, become padding nibbles.
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
using PackList = TensorList<PackTensor>;
static_assert(sizeof(PackList) <= kKernelParameterBytes, "a launch's tensors must fit its parameters");

/// The masks of a patch: blocks (0, 0) and (0, 1) in the halves of `top`, (1, 0) and (1, 1) in those of `bottom`.
struct PatchMasks {
  uint32_t top, bottom;
};

/// A mask source that reads: Masks::of(patch, ...) is the other way to get them (fused/search_and_pack.cu).
struct ReadMasks {
  template <WeightLayout kLayout, typename Patch>
  static __device__ __forceinline__ PatchMasks of(const Patch&, const PackTensor& t, int64_t row, int64_t col) {
    // What lies outside gets some valid mask; its metadata are replaced, its values not stored.
    PatchMasks masks = {0xC3C3C3C3u, 0xC3C3C3C3u};
    const int64_t block_cols = t.w.cols / 4;
    const uint16_t* first = t.mask + row / 4 * block_cols + col / 4;
    const bool left = col < t.w.cols, right = col + 4 < t.w.cols;
    if constexpr (kLayout != WeightLayout::kStrided) {
      if (left && row < t.w.rows) masks.top = *reinterpret_cast<const uint32_t*>(first);
      if (left && row + 4 < t.w.rows) masks.bottom = *reinterpret_cast<const uint32_t*>(first + block_cols);
    } else {
      if (left && row < t.w.rows) masks.top = first[0] | (right ? first[1] : 0xC3C3u) << 16;
      if (left && row + 4 < t.w.rows) {
        masks.bottom = first[block_cols] | (right ? first[block_cols + 1] : 0xC3C3u) << 16;
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
  return {meta_from_bits8(interleave_nibbles(masks.top)), meta_from_bits8(interleave_nibbles(masks.bottom))};
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

__device__ __forceinline__ uint32_t meta_byte(const MetaBytes& meta, int line) {
  return ((line < 4 ? meta.low : meta.high) >> (8 * (line % 4))) & 0xFFu;
}

/// Stores the low and the high 16 bits of a pair at `to` and `to + step`.
__device__ __forceinline__ void store_halves(uint16_t* to, int64_t step, uint32_t pair) {
  to[0] = static_cast<uint16_t>(pair);
  to[step] = static_cast<uint16_t>(pair >> 16);
}

/// packed: of each row, the kept pair of the left group and that of the right one.
template <bool kVector>
__device__ __forceinline__ void store_packed(uint16_t* packed, const Patch16& rows, const MetaBytes& meta, int64_t row,
                                             int64_t col, int64_t cols, int valid_rows, int valid_cols) {
  uint16_t* first = packed + row * (cols / 2) + col / 2;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    const uint32_t selectors = pair_selectors(meta_byte(meta, i));
    const uint32_t left = select_bytes(rows.line[i][0], rows.line[i][1], selectors & 0xFFFFu);
    const uint32_t right = select_bytes(rows.line[i][2], rows.line[i][3], selectors >> 16);
    uint16_t* to = first + i * (cols / 2);
    if (i < valid_rows) {
      if constexpr (kVector) {
        if (valid_cols > 0) store8(to, make_uint2(left, right));
      } else {
        if (valid_cols > 0) store_halves(to, 1, left);
        if (valid_cols > 4) store_halves(to + 2, 1, right);
      }
    }
  }
}

/// packed_t: of each column, the kept pair of the upper group to two rows, that of the lower one to the next two.
template <bool kVector>
__device__ __forceinline__ void store_packed_t(uint16_t* packed_t, const Patch16& columns, const MetaBytes& meta,
                                               int64_t row, int64_t col, int64_t cols, int valid_rows, int valid_cols) {
  uint16_t* first = packed_t + row / 2 * cols + col;
  uint32_t upper[kPatch], lower[kPatch];
  SP24_UNROLL
  for (int j = 0; j < kPatch; ++j) {
    const uint32_t selectors = pair_selectors(meta_byte(meta, j));
    upper[j] = select_bytes(columns.line[j][0], columns.line[j][1], selectors & 0xFFFFu);
    lower[j] = select_bytes(columns.line[j][2], columns.line[j][3], selectors >> 16);
  }
  if constexpr (kVector) {
    if (valid_cols == 0) return;
    SP24_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t(&pair)[kPatch] = half == 0 ? upper : lower;
      if (4 * half < valid_rows) {
        store16(first + (2 * half) * cols, make_uint4(pair_of_lows(pair[0], pair[1]), pair_of_lows(pair[2], pair[3]),
                                                      pair_of_lows(pair[4], pair[5]), pair_of_lows(pair[6], pair[7])));
        store16(first + (2 * half + 1) * cols,
                make_uint4(pair_of_highs(pair[0], pair[1]), pair_of_highs(pair[2], pair[3]),
                           pair_of_highs(pair[4], pair[5]), pair_of_highs(pair[6], pair[7])));
      }
    }
  } else {
    SP24_UNROLL
    for (int j = 0; j < kPatch; ++j) {
      if (j < valid_cols && valid_rows > 0) store_halves(first + j, cols, upper[j]);
      if (j < valid_cols && valid_rows > 4) store_halves(first + 2 * cols + j, cols, lower[j]);
    }
  }
}

// fp32 patches take 64 registers and a search needs about 40 more: four blocks an SM hold all of them.
template <typename In, WeightLayout kLayout>
constexpr int kPackBlocksPerSm = std::is_same_v<In, AnyValue> ? 1 : std::is_same_v<In, float> ? 4 : 6;

template <typename In, typename Out, WeightLayout kLayout, typename Masks>
__global__ void __launch_bounds__(kTileThreads, (kPackBlocksPerSm<In, kLayout>))
    pack_kernel(const __grid_constant__ PackList list) {
  __shared__ alignas(16) uint8_t stage[2 * kTileMetaBlocks * kStageStride];

  const int index = list.find(blockIdx.x);
  const PackTensor& t = list.tensor[index];
  const TileIndex tile = raster_tile(blockIdx.x - list.first_tile[index], t.tile_rows, t.tile_cols, band_of(kLayout));
  using Patch = WeightPatch<In, kLayout>;
  const PatchOrigin origin = patch_origin(walk_of(kLayout), Patch::kPaired, threadIdx.x);
  const int64_t row = int64_t{tile.row} * kTileRows + origin.row, col = int64_t{tile.col} * kTileCols + origin.col;
  const int64_t rows = t.w.rows, cols = t.w.cols;
  const int valid_rows = valid_lines(row, rows), valid_cols = valid_lines(col, cols);
  constexpr bool kVector = kLayout != WeightLayout::kStrided;

  Patch patch;
  patch.load(t.w, row, col);
  const PatchMasks masks = Masks::template of<kLayout>(patch, t, row, col);
  const Patch16 by_row = patch.template rows<Out>();

  const int block = origin.col / kMetaBlock, block_col = origin.col % kMetaBlock;
  if (t.packed != nullptr) {
    const MetaBytes meta = row_meta(masks);
    store_packed<kVector>(static_cast<uint16_t*>(t.packed), by_row, meta, row, col, cols, valid_rows, valid_cols);
    const MetaBytes staged = pad_meta(meta, valid_rows, valid_cols);
    stage_bytes(stage, block, origin.row, block_col, staged.low, staged.high);
  }
  if (t.packed_t != nullptr) {
    const MetaBytes meta = column_meta(masks);
    store_packed_t<kVector>(static_cast<uint16_t*>(t.packed_t), patch.columns(by_row), meta, row, col, cols, valid_rows,
                            valid_cols);
    const MetaBytes staged = pad_meta(meta, valid_cols, valid_rows);
    stage_bytes(stage, kTileMetaBlocks + block, block_col, origin.row, staged.low, staged.high);
  }

  __syncthreads();  // all bytes of the tile's blocks are staged
  const int warp = threadIdx.x / 32;
  const int64_t block_of_cols = int64_t{tile.col} * kTileMetaBlocks + warp % kTileMetaBlocks;
  if (warp < kTileMetaBlocks) {
    if (t.packed != nullptr) store_staged(t.E, stage, warp, tile.row, block_of_cols, rows, cols);
  } else {
    if (t.packed_t != nullptr) store_staged(t.E_t, stage, warp, block_of_cols, tile.row, cols, rows);
  }
}

/// What selects a kernel; weights of equal class share launches.
struct PackClass {
  DType in, out;
  WeightLayout layout;

  bool operator==(const PackClass& other) const {
    return in == other.in && out == other.out && layout == other.layout;
  }
};

inline PackClass classify_pack(const PackArgs& args) {
  WeightLayout layout = choose_weight_layout(args.w);
  const bool converts16 = args.w.dtype != DType::kFloat32 && args.w.dtype != args.out_dtype;
  const bool aligned = reinterpret_cast<uintptr_t>(args.mask) % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(args.packed) % 8 == 0 && is_aligned16(args.packed_t);
  if (converts16 || !aligned) layout = WeightLayout::kStrided;
  return {args.w.dtype, args.out_dtype, layout};
}

using PackKernel = void (*)(PackList);

template <typename In, typename Out, typename Masks>
PackKernel choose_pack_kernel(WeightLayout layout) {
  return layout == WeightLayout::kRowMajor ? pack_kernel<In, Out, WeightLayout::kRowMajor, Masks>
                                           : pack_kernel<In, Out, WeightLayout::kColumnMajor, Masks>;
}

template <typename Masks>
PackKernel choose_pack_kernel(const PackClass& c) {
  const bool to_bf16 = c.out == DType::kBFloat16;
  if (c.layout == WeightLayout::kStrided) {
    return to_bf16 ? pack_kernel<AnyValue, BFloat16, WeightLayout::kStrided, Masks>
                   : pack_kernel<AnyValue, Float16, WeightLayout::kStrided, Masks>;
  }
  if (c.in == DType::kFloat32) {
    return to_bf16 ? choose_pack_kernel<float, BFloat16, Masks>(c.layout)
                   : choose_pack_kernel<float, Float16, Masks>(c.layout);
  }
  return to_bf16 ? choose_pack_kernel<BFloat16, BFloat16, Masks>(c.layout)
                 : choose_pack_kernel<Float16, Float16, Masks>(c.layout);
}

template <typename Masks>
void launch_pack(const PackArgs* weights, int count, cudaStream_t stream, const char* op) {
  PackList list;
  PackClass list_class{};
  const auto flush = [&] {
    if (list.tiles() == 0) return;
    choose_pack_kernel<Masks>(list_class)<<<list.tiles(), kTileThreads, 0, stream>>>(list);
    const ConstMatrix& first = list.tensor[0].w;
    SP24_CHECK_LAUNCH(op, " of ", list.count, " weights, the first ", name_of(first.dtype), " [", first.rows, ", ",
                      first.cols, "]");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    const PackArgs& args = weights[i];
    if (args.w.rows == 0 || args.w.cols == 0) continue;
    const PackClass args_class = classify_pack(args);
    if (list.full() || !(args_class == list_class)) flush();
    list_class = args_class;
    const uint32_t tile_rows = static_cast<uint32_t>(round_up(args.w.rows, kTileRows) / kTileRows);
    const uint32_t tile_cols = static_cast<uint32_t>(round_up(args.w.cols, kTileCols) / kTileCols);
    list.add({args.w, args.mask, args.packed, args.E, args.packed_t, args.E_t, tile_rows, tile_cols},
             tile_rows * tile_cols);
  }
  flush();
}

}  // namespace sparse24
