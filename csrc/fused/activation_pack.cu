// activation_pack.cu: activations pruned to 2:4 along features by size, and their gradient at the
// same places, each packed along features and along tokens from one read.
//
//   u, d_h    [tokens, d_ff] bf16 or fp16, row-major; d_ff % 4 == 0, any number of tokens
//   packed    [tokens, d_ff/2], E for (m = tokens, k = d_ff): h, or d_u at the places kept
//   packed_t  [padded/2, d_ff], E_t for (m = d_ff, k = padded), seed: of that pruned matrix, with
//             the bits of mvue_pack; not wanted where null
//   tile_sums backward: fp32 [ceil(tokens/64), d_ff], tile_sums.cuh
//
// Work     A tile is 64 tokens x 128 features, a thread takes 8 x 8 of it: whole bytes of E in both
//          directions. Ranks, comparisons, values and gradients of 16-bit pairs are done as pairs
//          (two_of_four.h, relu_pairs.h): some five instructions an element besides those of MVUE.
// Traffic  Forward 2 B read, 1 + 1/8 and 1 + 1/8 B written an element: 4.25 B, without a seed
//          3.125 B. Backward 4 B read, 1 + 1 + 1/8 B written: 6.125 B, without a seed 5 B.
//          16384 x 16384 at 4.2 TB/s: 272 us and 391 us.
// Edges    Tokens and features past the end read as zeros, and their groups get padding nibbles.
//          d_ff % 8 != 0, other strides and odd addresses go element by element (kVector false).
// Source   arXiv 2503.16672 (pruning behind a squared ReLU), arXiv 2404.01847 (MVUE).
#include <cuda_runtime.h>

#include "activation/relu_pairs.h"
#include "common/cuda_check.h"
#include "common/format.h"
#include "common/layout.h"
#include "fused/activation_pack.cuh"
#include "fused/fused_cuda.h"
#include "pack/tile_sums.cuh"

namespace sparse24 {
namespace {

struct PackParams {
  ConstMatrix u, d_h;  // d_h: backward
  PackedBothWays to;
  float* tile_sums;  // or null
  uint32_t tile_rows, tile_cols;
};

/// Without MVUE few registers are needed, and more blocks wait for memory.
constexpr int forward_blocks(bool along_tokens) { return along_tokens ? 5 : 7; }
/// 128 registers hold both operands' patches.
constexpr int kBackwardBlocks = 4;

template <Activation kKind, typename T, bool kVector, bool kAlongTokens>
__global__ void __launch_bounds__(kTileThreads, kVector ? forward_blocks(kAlongTokens) : 1)
    activation_pack_kernel(const __grid_constant__ PackParams p) {
  __shared__ alignas(16) uint8_t stage[kPackStageBytes];
  const TileIndex tile = raster_tile(blockIdx.x, p.tile_rows, p.tile_cols, 1);
  const PatchPlace at = patch_place(tile);
  Patch16 h = load_tokens<T, kVector>(p.u, at);
  uint32_t meta[2];
  prune_and_store<kVector, kAlongTokens>(
      p.to, at, h, meta, [&](int line, int w) { return positive_pair<T>(h.line[line][w]); },
      [&](int, int, uint32_t positive) { return relu_pair<kKind, T>(positive); });
  stage_rows(stage, at, meta);
  if constexpr (kAlongTokens) store_along_tokens<T, kVector>(p.to, at, h, stage);
  __syncthreads();  // all bytes of the tile's blocks are staged
  store_metadata(p.to, tile, stage);
}

/// Sums over the patch's tokens.
template <typename T>
__device__ __forceinline__ void put_sums(OctetSums& waiting, const PatchOrigin& origin,
                                         const Patch16& patch) {
  SP24_UNROLL
  for (int w = 0; w < 4; w += 2) {
    float sums[4] = {};
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      add_pair<T>(patch.line[i][w], sums[0], sums[1]);
      add_pair<T>(patch.line[i][w + 1], sums[2], sums[3]);
    }
    waiting.put(origin.row, origin.col + 2 * w, sums);
  }
}

template <Activation kKind, typename T, bool kVector, bool kAlongTokens, bool kSums>
__global__ void __launch_bounds__(kTileThreads, kVector ? kBackwardBlocks : 1)
    activation_pack_backward_kernel(const __grid_constant__ PackParams p) {
  __shared__ alignas(16) uint8_t stage[kPackStageBytes];
  [[maybe_unused]] __shared__ alignas(16) OctetSums octet_sums;
  const TileIndex tile = raster_tile(blockIdx.x, p.tile_rows, p.tile_cols, 1);
  const PatchPlace at = patch_place(tile);
  const Patch16 u = load_tokens<T, kVector>(p.u, at);
  Patch16 d_u = load_tokens<T, kVector>(p.d_h, at);
  uint32_t meta[2];
  prune_and_store<kVector, kAlongTokens || kSums>(
      p.to, at, d_u, meta, [&](int line, int w) { return positive_pair<T>(u.line[line][w]); },
      [&](int line, int w, uint32_t positive) {
        return relu_gradient_pair<kKind, T>(d_u.line[line][w], positive);
      });
  if constexpr (kSums) put_sums<T>(octet_sums, at.origin, d_u);
  if constexpr (kAlongTokens) store_along_tokens<T, kVector>(p.to, at, d_u, stage);
  if constexpr (kAlongTokens || kSums) __syncthreads();  // all bytes and sums of the tile are there
  if constexpr (kAlongTokens) store_metadata(p.to, tile, stage);
  if constexpr (kSums) octet_sums.store(p.tile_sums, tile.row, tile.col, p.to.d_ff);
}

PackParams pack_params(const ConstMatrix& u, const ConstMatrix& d_h, const PackedBothWays& to,
                       float* tile_sums) {
  const auto tiles = [](int64_t extent, int along) {
    return static_cast<uint32_t>((extent + along - 1) / along);
  };
  return {u, d_h, to, tile_sums, tiles(u.rows, kTileRows), tiles(u.cols, kTileCols)};
}

template <typename Kernel>
void launch_tiles(Kernel kernel, const PackParams& p, cudaStream_t stream) {
  kernel<<<p.tile_rows * p.tile_cols, kTileThreads, 0, stream>>>(p);
}

/// Do vectors fit all that is read and written?
bool vectors_fit(const ConstMatrix& m, const PackedBothWays& to) {
  return patch_layout(m) == Layout::kRowMajor && is_aligned16(to.packed) &&
         is_aligned16(to.packed_t);
}

template <typename Args>
PackedBothWays packed_both_ways(const Args& args, uint8_t* E) {
  return {static_cast<uint16_t*>(args.packed),   E,        args.seed,
          static_cast<uint16_t*>(args.packed_t), args.E_t, static_cast<int>(args.u.rows),
          static_cast<int>(args.u.cols)};
}

template <Activation kKind, typename T>
void launch_forward(const PackParams& p, cudaStream_t stream) {
  const bool along_tokens = p.to.packed_t != nullptr, vectors = vectors_fit(p.u, p.to);
  const auto kernel = vectors        ? along_tokens ? activation_pack_kernel<kKind, T, true, true>
                                                    : activation_pack_kernel<kKind, T, true, false>
                      : along_tokens ? activation_pack_kernel<kKind, T, false, true>
                                     : activation_pack_kernel<kKind, T, false, false>;
  launch_tiles(kernel, p, stream);
}

template <Activation kKind, typename T, bool kVector, bool kAlongTokens>
void launch_backward(const PackParams& p, cudaStream_t stream) {
  const auto kernel = p.tile_sums != nullptr
                          ? activation_pack_backward_kernel<kKind, T, kVector, kAlongTokens, true>
                          : activation_pack_backward_kernel<kKind, T, kVector, kAlongTokens, false>;
  launch_tiles(kernel, p, stream);
}

template <Activation kKind, typename T>
void launch_backward(const PackParams& p, cudaStream_t stream) {
  const bool along_tokens = p.to.packed_t != nullptr;
  if (vectors_fit(p.u, p.to) && vectors_fit(p.d_h, p.to)) {
    along_tokens ? launch_backward<kKind, T, true, true>(p, stream)
                 : launch_backward<kKind, T, true, false>(p, stream);
  } else {
    along_tokens ? launch_backward<kKind, T, false, true>(p, stream)
                 : launch_backward<kKind, T, false, false>(p, stream);
  }
}

}  // namespace

namespace cuda {

void activation_pack(const ActivationPackArgs& args, cudaStream_t stream) {
  if (args.u.rows == 0 || args.u.cols == 0) return;
  check_extents32(args.u.rows, args.u.cols, "u");
  if (args.scale != nullptr) return activation_pack8(args, stream);
  const PackParams p = pack_params(args.u, {}, packed_both_ways(args, args.E), nullptr);
  with_packed16(args.u.dtype, [&](auto format) {
    using T = typename decltype(format)::Storage;
    args.kind == Activation::kRelu ? launch_forward<Activation::kRelu, T>(p, stream)
                                   : launch_forward<Activation::kSquaredRelu, T>(p, stream);
  });
  SP24_CHECK_LAUNCH("activation_pack of ", name_of(args.u.dtype), " u [", args.u.rows, ", ",
                    args.u.cols, "]");
}

void activation_pack_backward(const ActivationPackBackwardArgs& args, cudaStream_t stream) {
  if (args.u.rows == 0 || args.u.cols == 0) return;
  check_extents32(args.u.rows, args.u.cols, "u");
  if (args.scale != nullptr) return activation_pack8_backward(args, stream);
  const PackParams p =
      pack_params(args.u, args.d_h, packed_both_ways(args, nullptr), args.tile_sums);
  with_packed16(args.u.dtype, [&](auto format) {
    using T = typename decltype(format)::Storage;
    args.kind == Activation::kRelu ? launch_backward<Activation::kRelu, T>(p, stream)
                                   : launch_backward<Activation::kSquaredRelu, T>(p, stream);
  });
  SP24_CHECK_LAUNCH("activation_pack_backward of ", name_of(args.u.dtype), " u [", args.u.rows,
                    ", ", args.u.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
