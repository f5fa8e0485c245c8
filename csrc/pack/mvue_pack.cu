// mvue_pack.cu: unbiased 2:4 pruning of an output gradient along tokens, straight to the packed
// operand.
//
//   dy       [tokens, features] bf16 or fp16, row- or column-major, any extents
//   packed   [padded/2, features] with padded = tokens rounded up to 8
//   E        for (m = features, k = padded)
//
// Work     A tile is 64 tokens x 128 features, a thread takes 8 x 8 of it: sixteen groups of four,
//          two Philox calls (mvue_patch.cuh). Row-major gradients have their groups across four
//          rows; column-major ones are turned in pairs of words.
// Traffic  2 B read, 1 + 1/8 B written an element. 8192 x 4096: 105 MB, 25 us at 4.2 TB/s. About 13
//          instructions an element, half of what the SMs could issue meanwhile.
// Edges    Tokens past the end read as zeros: their groups keep nothing, with padding nibbles.
//          features % 8 != 0, odd strides or addresses go element by element (kStrided), as do
//          column-major gradients with tokens % 8 != 0.
// Sums     Of row-major gradients tile_sums come out of the same registers (tile_sums.cuh), of
//          others by a read of their own.
// Random   The draw of a group depends on the seed and its own place only. The seed is read from
//          device memory, so a replayed graph draws anew when it changes.
#include <cuda_runtime.h>

#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/format.h"
#include "common/patch.cuh"
#include "common/raster.h"
#include "common/weight_patch.cuh"
#include "pack/mvue_patch.cuh"
#include "pack/pack_cuda.h"
#include "pack/stage.cuh"
#include "pack/tile_outputs.cuh"
#include "pack/tile_sums.cuh"

namespace sparse24 {
namespace {

struct MvueParams {
  ConstMatrix dy;
  const int64_t* seed;
  uint16_t* packed;
  uint8_t* E;
  float* tile_sums;
  uint32_t tile_rows, tile_cols;
};

/// Column-major: two bytes are read by columns for one written by rows; kSquare is 6 % slower.
constexpr Walk gradient_walk(Layout layout) {
  return layout == Layout::kColumnMajor ? Walk::kTall : Walk::kRows;
}

/// Measured (docs/kernels/mvue.md): loads by columns wait longer, and want one more block.
constexpr int blocks_per_sm(Layout layout) {
  return layout == Layout::kRowMajor ? 5 : layout == Layout::kColumnMajor ? 6 : 1;
}

template <typename T, Layout kLayout>
__device__ __forceinline__ Patch16 load_gradient(const ConstMatrix& dy, int token, int feature) {
  constexpr bool kByTokens = kLayout != Layout::kColumnMajor;
  const int tokens = static_cast<int>(dy.rows), features = static_cast<int>(dy.cols);
  Patch16 patch;
  if constexpr (kLayout == Layout::kStrided) {
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int p = 0; p < 4; ++p) {
        patch.line[i][p] = read_bits<T>(dy, token + i, feature + 2 * p) |
                           read_bits<T>(dy, token + i, feature + 2 * p + 1) << 16;
      }
    }
  } else {
    const int line = kByTokens ? token : feature, along = kByTokens ? feature : token;
    const int lines = kByTokens ? tokens : features, length = kByTokens ? features : tokens;
    const uint32_t stride = stride_bytes(dy, kByTokens, 2);
    const uint16_t* first = advance(static_cast<const uint16_t*>(dy.data), stride, line) + along;
    patch = load_patch16<kByTokens ? 1 : 8, true>(first, stride, along < length ? lines - line : 0);
  }
  return patch;
}

/// Sums of the columns of a patch that is held by tokens.
template <typename T>
__device__ __forceinline__ void put_sums(OctetSums& waiting, const PatchOrigin& origin,
                                         const Patch16& gradient) {
  SP24_UNROLL
  for (int p = 0; p < 4; p += 2) {
    float sums[4] = {};
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      add_pair<T>(gradient.line[i][p], sums[0], sums[1]);
      add_pair<T>(gradient.line[i][p + 1], sums[2], sums[3]);
    }
    waiting.put(origin.row, origin.col + 2 * p, sums);
  }
}

template <typename T, Layout kLayout, bool kSums>
__global__ void __launch_bounds__(kTileThreads, blocks_per_sm(kLayout))
    mvue_kernel(const __grid_constant__ MvueParams p) {
  __shared__ alignas(16) uint8_t stage[kTileMetaBlocks * kStageStride];
  [[maybe_unused]] __shared__ alignas(16) OctetSums octet_sums;

  const TileIndex tile = raster_tile(blockIdx.x, p.tile_rows, p.tile_cols, band_of(kLayout));
  const PatchOrigin origin = patch_origin(gradient_walk(kLayout), false, threadIdx.x);
  const int token = static_cast<int>(tile.row) * kTileRows + origin.row;
  const int feature = static_cast<int>(tile.col) * kTileCols + origin.col;
  const int features = static_cast<int>(p.dy.cols);
  const int padded = static_cast<int>(round_up(p.dy.rows, 8));

  const PhiloxKey key = philox_key(p.seed[0], p.seed[1]);
  const Patch16 gradient = load_gradient<T, kLayout>(p.dy, token, feature);
  if constexpr (kSums) put_sums<T>(octet_sums, origin, gradient);
  const MvuePatch pruned = prune_patch<T, kLayout != Layout::kColumnMajor>(
      gradient, key, static_cast<uint32_t>(token) / 8, static_cast<uint32_t>(feature) / 4);

  const uint32_t stride = 2 * static_cast<uint32_t>(features);
  uint16_t* first = advance(p.packed, stride, static_cast<uint32_t>(token) / 2) + feature;
  if constexpr (kLayout != Layout::kStrided) {
    if (token < padded && feature < features) store_mvue(first, stride, pruned);
  } else {
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      SP24_UNROLL
      for (int f = 0; f < kPatch; ++f) {
        if (token < padded && feature + f < features) {
          const uint2 row = pruned.quad[f / 4].row[i];
          advance(first, stride, i)[f] =
              static_cast<uint16_t>((f % 4 < 2 ? row.x : row.y) >> (16 * (f % 2)));
        }
      }
    }
  }
  stage_bytes(stage, static_cast<uint32_t>(origin.col) / kMetaBlock,
              static_cast<uint32_t>(origin.col) % kMetaBlock, origin.row, pruned.quad[0].meta,
              pruned.quad[1].meta);

  __syncthreads();  // all bytes of the tile's blocks are staged, and all sums of its octets
  if constexpr (kSums) octet_sums.store(p.tile_sums, tile.row, tile.col, features);
  const uint32_t warp = threadIdx.x / 32;
  if (warp < kTileMetaBlocks) {
    store_staged(p.E, stage, warp, tile.col * kTileMetaBlocks + warp, tile.row, features, padded);
  }
}

template <typename T>
void launch_mvue(const MvueArgs& args, cudaStream_t stream) {
  const ConstMatrix& dy = args.dy;
  Layout layout = patch_layout(dy);
  if (!is_aligned16(args.packed)) layout = Layout::kStrided;
  const uint32_t tile_rows = static_cast<uint32_t>(round_up(dy.rows, kTileRows) / kTileRows);
  const uint32_t tile_cols = static_cast<uint32_t>(round_up(dy.cols, kTileCols) / kTileCols);
  const MvueParams params = {dy,       args.seed,      static_cast<uint16_t*>(args.packed),
                             args.E,   args.tile_sums, tile_rows,
                             tile_cols};
  const bool sums = args.tile_sums != nullptr, in_one_pass = sums && layout == Layout::kRowMajor;
  const auto kernel = in_one_pass                      ? mvue_kernel<T, Layout::kRowMajor, true>
                      : layout == Layout::kRowMajor    ? mvue_kernel<T, Layout::kRowMajor, false>
                      : layout == Layout::kColumnMajor ? mvue_kernel<T, Layout::kColumnMajor, false>
                                                       : mvue_kernel<T, Layout::kStrided, false>;
  kernel<<<tile_rows * tile_cols, kTileThreads, 0, stream>>>(params);
  SP24_CHECK_LAUNCH("mvue_pack of ", name_of(dy.dtype), " [", dy.rows, ", ", dy.cols, "]");
  if (sums && !in_one_pass) launch_tile_sums<T>(dy, args.tile_sums, stream);
}

}  // namespace

namespace cuda {

void mvue_pack(const MvueArgs& args, cudaStream_t stream) {
  if (args.dy.rows == 0 || args.dy.cols == 0) return;
  check_extents32(args.dy.rows, args.dy.cols, "dy");
  const bool to_float8 = is_float8(args.packed_dtype.value_or(args.dy.dtype)),
             float8_too = args.float8.x8 != nullptr || args.float8.x8_t != nullptr ||
                          args.float8.amax != nullptr;
  if (to_float8 || (float8_too && packing16_fits(args.packed, args.dy.cols)))
    return mvue_outputs(args, stream);
  if (float8_too) quantize({args.dy, args.float8}, stream);
  with_packed16(args.dy.dtype, [&](auto format) {
    launch_mvue<typename decltype(format)::Storage>(args, stream);
  });
}

}  // namespace cuda
}  // namespace sparse24
