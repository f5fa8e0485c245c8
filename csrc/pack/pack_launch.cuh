// pack_launch.cuh: which kernel packs which weights, and the launch.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/format.h"
#include "pack/pack_rows.cuh"
#include "pack/pack_tile.cuh"

namespace sparse24 {

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

/// Row-major weights, in tiles of 64 x `Tile::kCols`.
template <typename Masks, typename Tile, int kCapacity>
PackKernel<kCapacity> choose_rows_kernel(const PackClass& c) {
  return with_packed16(c.out, [&](auto format) -> PackKernel<kCapacity> {
    using Out = typename decltype(format)::Storage;
    if (c.in == DType::kFloat32) return pack_rows_kernel<float, Out, Masks, Tile, kCapacity>;
    return pack_rows_kernel<Out, Out, Masks, Tile, kCapacity>;
  });
}

/// All others, in square patches.
template <typename Masks>
PackKernel<kTensorsPerLaunch> choose_pack_kernel(const PackClass& c) {
  return with_packed16(c.out, [&](auto format) -> PackKernel<kTensorsPerLaunch> {
    using Out = typename decltype(format)::Storage;
    if (c.layout == Layout::kStrided) return pack_kernel<AnyValue, Out, Layout::kStrided, Masks>;
    if (c.in == DType::kFloat32) return pack_kernel<float, Out, Layout::kColumnMajor, Masks>;
    return pack_kernel<Out, Out, Layout::kColumnMajor, Masks>;
  });
}

/// Wide tiles write the longest stretches, 512 B of packed_t and 256 B of packed. A single weight
/// of fewer than kSmallWeight elements is too few of them for the chip: GPT-2 124M's has 144 of 64
/// x 256 elements and 576 of 64 x 64, on 132 SMs (bench/results/packing.csv).
using WideTile = RowTile<256>;
using SmallTile = RowTile<64>;
constexpr int64_t kSmallWeight = int64_t{1} << 24;

inline uint32_t tiles_along(int64_t extent, int64_t tile) {
  return static_cast<uint32_t>(round_up(extent, tile) / tile);
}

/// One row-major weight in a launch of its own.
template <typename Masks, typename Tile>
void launch_single(const PackClass& c, PackTensor tensor, cudaStream_t stream) {
  tensor.tile_cols = tiles_along(tensor.w.cols, Tile::kCols);
  PackList<1> list;
  list.add(tensor, tensor.tile_rows * tensor.tile_cols);
  choose_rows_kernel<Masks, Tile, 1>(c)<<<list.tiles(), Tile::kThreads, 0, stream>>>(list);
}

template <typename Masks>
void launch_pack(const PackArgs* weights, int count, cudaStream_t stream, const char* op) {
  PackList<kTensorsPerLaunch> list;
  PackClass list_class{};
  const auto flush = [&] {
    const uint32_t tiles = list.tiles();
    if (tiles == 0) return;
    if (list_class.layout != Layout::kRowMajor) {
      choose_pack_kernel<Masks>(list_class)<<<tiles, kTileThreads, 0, stream>>>(list);
    } else if (list.count > 1) {
      const auto kernel = choose_rows_kernel<Masks, WideTile, kTensorsPerLaunch>(list_class);
      kernel<<<tiles, WideTile::kThreads, 0, stream>>>(list);
    } else if (list.tensor[0].w.rows * list.tensor[0].w.cols < kSmallWeight) {
      launch_single<Masks, SmallTile>(list_class, list.tensor[0], stream);
    } else {
      launch_single<Masks, WideTile>(list_class, list.tensor[0], stream);
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
    const int tile_width = list_class.layout == Layout::kRowMajor ? WideTile::kCols : kTileCols;
    const uint32_t tile_rows = tiles_along(args.w.rows, kTileRows);
    const uint32_t tile_cols = tiles_along(args.w.cols, tile_width);
    list.add(
        {args.w, args.mask, args.packed, args.E, args.packed_t, args.E_t, tile_rows, tile_cols},
        tile_rows * tile_cols);
  }
  flush();
}

}  // namespace sparse24
