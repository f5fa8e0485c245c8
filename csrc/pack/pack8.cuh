// pack8.cuh: weights to 8-bit packed form, both orientations from one read; the kernel behind
// pack_by_mask and search_and_pack to float8.
//
//   w          [rows, cols] bf16, fp16 or fp32, row- or column-major; rows % 4 == cols % 4 == 0
//   mask       uint16 [rows/4, cols/4]: read, or searched and written, as the mask source says
//   packed     8-bit [rows, cols/2], E for (m = rows, k = cols)
//   packed_t   8-bit [cols, rows/2], E_t for (m = cols, k = rows): both along k, which is what
//              wgmma reads of 8 bits
//   scale      one float: packed values are w / *scale; amax, counters: quantize.h
//
// Work     A block of 256 threads takes a tile of 128 x 128 elements of one of up to 32 weights, a
//          thread 8x8 of them: four masks, one conversion an element, and a byte permutation for
//          the four kept values of each of its lines, in both directions. Everything leaves through
//          shared memory (stage8.cuh): 64 B of each row of packed and packed_t, and whole blocks of
//          E.
// Traffic  bf16: 2 B read, 0.625 + 0.625 B written, 0.125 B of mask an element; fp32 2 B more.
//          11008 x 4096 in bf16: 152 MB, 36 us at 4.2 TB/s; fp32 242 MB, 58 us.
// Edges    As in pack_tile.cuh. Rows that no 16-byte vector fits (cols or rows % 32 != 0) are
//          stored byte by byte.
#pragma once

#include <cuda_runtime.h>

#include "common/amax.cuh"
#include "common/bytes.h"
#include "common/cuda_check.h"
#include "common/format.h"
#include "common/stage8.cuh"
#include "pack/pack_tile.cuh"
#include "pack/quantize_patch.cuh"

namespace sparse24 {

struct Pack8Tensor : PackTensor {
  const float* scale;
  float* amax;
  int64_t* counters;
  bool vectors, vectors_t;
};
using Pack8List = TensorList<Pack8Tensor, kTensorsPerLaunch - 2>;
static_assert(sizeof(Pack8List) <= kKernelParameterBytes,
              "a launch's tensors must fit its parameters");

constexpr uint64_t kLeftBytes = make_group_table(1, 16, 0);  // selectors of the lower word's bytes
constexpr uint64_t kRightBytes = make_group_table(1, 16, 0x44);  // and of the upper word's

/// Of each line, the kept pair of the left group and that of the right one.
__device__ __forceinline__ PackedLines packed_lines(const Patch8& lines, const KeptLines& bits,
                                                    const MetaBytes& meta) {
  PackedLines out;
  out.meta_low = meta.low, out.meta_high = meta.high;
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t kept = half == 0 ? bits.low : bits.high;
    const uint32_t left = look_up<kLeftBytes>(kept), right = look_up<kRightBytes>(kept >> 16);
    SP24_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t (&line)[2] = lines.line[4 * half + i];
      out.kept[4 * half + i] =
          select_bytes(line[0], line[1], select_bytes(left, right, i | (i + 4) << 4));
    }
  }
  return out;
}

// The registers of pack_tile.cuh: four or six blocks of half as many threads an SM.
template <typename In>
constexpr int kPack8BlocksPerSm = std::is_same_v<In, AnyValue> ? 1
                                  : std::is_same_v<In, float>  ? 2
                                                               : 3;

template <typename In, typename Out, Layout kLayout, typename Masks>
__global__ void __launch_bounds__(kTile8Threads, kPack8BlocksPerSm<In>)
    pack8_kernel(const __grid_constant__ Pack8List list) {
  __shared__ alignas(16) PackedStage stage, stage_t;
  __shared__ uint32_t of_warp[kTile8Threads / 32];

  const int index = list.find(blockIdx.x);
  const Pack8Tensor& t = list.tensor[index];
  const TileIndex tile =
      raster_tile(list.within(blockIdx.x, index), t.tile_rows, t.tile_cols, kBand8);
  using Patch = WeightPatch<In, kLayout>;
  const PatchOrigin origin = tile8_origin<kLayout != Layout::kColumnMajor>(Patch::kPaired);
  const int first_row = static_cast<int>(tile.row) * kTile8;
  const int first_col = static_cast<int>(tile.col) * kTile8;
  const int row = first_row + origin.row, col = first_col + origin.col;
  const int rows = static_cast<int>(t.w.rows), cols = static_cast<int>(t.w.cols);
  const int valid_rows = valid_lines(row, rows), valid_cols = valid_lines(col, cols);

  Patch patch;
  patch.load(t.w, row, col);
  const PatchMasks masks = Masks::template of<kLayout>(patch, t, row, col);
  const float inverse = inverse_of(t.scale);
  PatchStatistics seen;
  const Patch8 by_row =
      quantize_patch<Out>(patch, inverse, t.amax != nullptr, t.counters != nullptr, seen);
  if (t.counters != nullptr) add_counts(seen.clipped, seen.flushed, t.counters);
  if (t.packed != nullptr) {
    const KeptLines bits = kept_rows(masks);
    stage.put(packed_lines(by_row, bits, patch_meta(bits, valid_rows, valid_cols)), origin.row,
              origin.col);
  }
  if (t.packed_t != nullptr) {
    const KeptLines bits = kept_columns(masks);
    stage_t.put(packed_lines(transpose(by_row), bits, patch_meta(bits, valid_cols, valid_rows)),
                origin.col, origin.row);
  }
  if (t.amax != nullptr) store_amax<kTile8Threads>(float_bits(seen.amax), t.amax, of_warp);

  __syncthreads();  // all lines of the tile are staged
  if (t.packed != nullptr)
    stage.store({static_cast<uint8_t*>(t.packed), cols / 2, rows, cols / 2}, t.vectors, t.E,
                meta_blocks(rows), first_row, first_col);
  if (t.packed_t != nullptr)
    stage_t.store({static_cast<uint8_t*>(t.packed_t), rows / 2, cols, rows / 2}, t.vectors_t, t.E_t,
                  meta_blocks(cols), first_col, first_row);
}

template <typename Masks, typename In, typename Out>
auto choose_pack8_kernel(Layout layout) -> void (*)(Pack8List) {
  if (layout == Layout::kStrided) return pack8_kernel<AnyValue, Out, Layout::kStrided, Masks>;
  if (layout == Layout::kColumnMajor) return pack8_kernel<In, Out, Layout::kColumnMajor, Masks>;
  return pack8_kernel<In, Out, Layout::kRowMajor, Masks>;
}

template <typename Masks>
void launch_pack8_list(const Pack8List& list, DType out, Layout layout, cudaStream_t stream,
                       const char* op) {
  const uint32_t tiles = list.tiles();
  if (tiles == 0) return;
  const ConstMatrix& first = list.tensor[0].w;
  with_type(first.dtype, [&](auto in) {
    using In = decltype(in);
    with_packed_format(out, [&](auto format) {
      if constexpr (decltype(format)::kScaled) {
        const auto kernel =
            choose_pack8_kernel<Masks, In, typename decltype(format)::Storage>(layout);
        kernel<<<tiles, kTile8Threads, 0, stream>>>(list);
      }
    });
  });
  SP24_CHECK_LAUNCH(op, " to ", name_of(out), " of ", list.count, " weights, the first ",
                    name_of(first.dtype), " [", first.rows, ", ", first.cols, "]");
}

inline Pack8Tensor pack8_tensor(const PackArgs& args) {
  const int64_t rows = args.w.rows, cols = args.w.cols;
  const PackTensor base = {args.w,
                           args.mask,
                           args.packed,
                           args.E,
                           args.packed_t,
                           args.E_t,
                           static_cast<uint32_t>(round_up(rows, kTile8) / kTile8),
                           static_cast<uint32_t>(round_up(cols, kTile8) / kTile8)};
  return {base,
          args.scale,
          args.amax,
          args.counters,
          vectors_fit(args.packed, cols / 2, cols / 2),
          vectors_fit(args.packed_t, rows / 2, rows / 2)};
}

/// All weights of a call share dtype and out_dtype; those of one layout share launches.
template <typename Masks>
void launch_pack8(const PackArgs* weights, int count, cudaStream_t stream, const char* op) {
  Pack8List list;
  Layout layout{};
  const auto flush = [&] {
    launch_pack8_list<Masks>(list, weights[0].out_dtype, layout, stream, op);
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    const PackArgs& args = weights[i];
    if (args.w.rows == 0 || args.w.cols == 0) continue;
    check_extents32(args.w.rows, args.w.cols, "w");
    const bool aligned = reinterpret_cast<uintptr_t>(args.mask) % 4 == 0;
    const Layout args_layout = aligned ? patch_layout(args.w) : Layout::kStrided;
    if (list.full() || args_layout != layout) flush();
    layout = args_layout;
    const Pack8Tensor tensor = pack8_tensor(args);
    list.add(tensor, tensor.tile_rows * tensor.tile_cols);
  }
  flush();
}

}  // namespace sparse24
