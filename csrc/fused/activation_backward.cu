// activation_backward.cu: backward of the activation whose result leaves twice from one read: dense
// d_gate_up for the input gradient, and MVUE-packed for the weight gradient.
//
//   d_h, gate_up, d_gate_up, h   as in activation/backward.cu, bf16 or fp16, every mix of layouts
//   packed [padded/2, 2*d_ff] (plain: d_ff), E, seed   as in compress/mvue_compress.cu, and with
//                                the same bits as mvue_compress(d_gate_up, seed)
//
// Work     All row-major: backward_rows.cuh. Mixed layouts: a tile is 64 tokens x 128 features of
// h;
//          a thread takes an 8x8 patch of d_h, gate and up, makes d_gate and d_up in their
//          registers, rounds them, stores them, and prunes both as mvue_compress would
//          (mvue_patch.cuh). The up half's groups lie d_ff features on.
// Traffic  10 B dense (6 read, 4 written) + 2.25 B packed an element of h; 2 B more for h itself.
// Edges    Vectors must fit all operands, and metadata blocks of 64 must not straddle gate and up:
//          d_ff % 64 == 0 (gated). Otherwise the two passes run one after the other, which is the
//          same by definition.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/backward_patch.cuh"
#include "common/cuda_check.h"
#include "common/raster.h"
#include "compress/compress_cuda.h"
#include "compress/mvue_patch.cuh"
#include "compress/stage.cuh"
#include "compress/tile_sums.cuh"
#include "fused/backward_mvue.cuh"
#include "fused/backward_rows.cuh"
#include "fused/fused_cuda.h"

namespace sparse24 {
namespace {

/// Prunes one half's patch, whose first feature is `feature` of `features`, and stages its
/// metadata.
template <typename T>
__device__ __forceinline__ void prune_half(const BackwardMvue& p, const SquarePatch<T>& gradient,
                                           const PhiloxKey& key, uint8_t* stage, uint32_t block,
                                           const PatchOrigin& origin, uint32_t token,
                                           uint32_t feature, uint32_t features, bool inside) {
  Patch16 lines;
  SP24_UNROLL
  for (int i = 0; i < 32; ++i) lines.line[i / 4][i % 4] = gradient.word[i / 4][i % 4];
  const MvuePatch pruned = prune_patch<T, true>(lines, key, token / 8, feature / 4);
  const uint32_t stride = 2 * features;
  if (inside) store_mvue(advance(p.packed, stride, token / 2) + feature, stride, pruned);
  stage_bytes(stage, block + static_cast<uint32_t>(origin.col) / kMetaBlock,
              static_cast<uint32_t>(origin.col) % kMetaBlock, origin.row, pruned.quad[0].meta,
              pruned.quad[1].meta);
}

// 96 words of operands a thread: three blocks an SM keep them all in registers.
template <Activation kKind, bool kGated, typename T>
__global__ void __launch_bounds__(kTileThreads, kGated ? 3 : 4)
    backward_mvue_mixed_kernel(const __grid_constant__ BackwardMvue p) {
  __shared__ alignas(16) uint8_t stage[2 * kTileMetaBlocks * kStageStride];

  const PatchBackward& b = p.backward;
  const TileIndex tile = raster_tile(blockIdx.x, b.tile_rows, b.tile_cols, kMixedBand);
  const PatchOrigin origin = patch_origin(p.walk, false, threadIdx.x);
  const int token = static_cast<int>(tile.row) * kTileRows + origin.row;
  const int feature = static_cast<int>(tile.col) * kTileCols + origin.col;
  // Tokens past the end are zeros: with d_h = 0 all gradients are, and their groups keep nothing.
  const int valid = feature < b.d_ff ? b.tokens - token : 0;

  const PhiloxKey key = philox_key(p.seed[0], p.seed[1]);
  SquarePatch<T> d_h, gate, up;
  load_backward<kGated>(b, token, feature, valid, d_h, gate, up);
  backward_patch<kKind, kGated>(b.lines, d_h, gate, up);
  store_backward<kGated>(b, token, feature, valid, d_h, gate, up);

  const uint32_t features = static_cast<uint32_t>(b.d_ff) * (kGated ? 2 : 1);
  prune_half(p, gate, key, stage, 0, origin, token, feature, features, valid > 0);
  if (kGated)
    prune_half(p, up, key, stage, kTileMetaBlocks, origin, token, feature + b.d_ff, features,
               valid > 0);

  __syncthreads();  // all bytes of the tile's blocks are staged
  store_halves<kGated>(p, stage, tile);
}

ConstMatrix view_of(const Matrix& m) {
  return {m.data, m.dtype, m.rows, m.cols, m.row_stride, m.col_stride};
}

bool one_pass_fits(const ActivationBackwardArgs& args, const BackwardLayouts& layouts) {
  const bool blocks_fit = args.d_h.cols % (args.gated ? kMetaBlock : kPatch) == 0;
  return args.d_h.dtype != DType::kFloat32 && !layouts.any(Layout::kStrided) && blocks_fit &&
         is_aligned16(args.packed);
}

template <typename T>
struct LaunchOnePass {
  const BackwardMvue& p;
  bool gated, mixed;
  cudaStream_t stream;

  template <Activation kKind>
  void operator()() const {
    gated ? launch<kKind, true>() : launch<kKind, false>();
  }
  template <Activation kKind, bool kGated>
  void launch() const {
    const uint32_t tiles = p.backward.tile_rows * p.backward.tile_cols;
    if (mixed) {
      backward_mvue_mixed_kernel<kKind, kGated, T><<<tiles, kTileThreads, 0, stream>>>(p);
    } else if (!kGated && p.tile_sums != nullptr) {
      backward_mvue_rows_kernel<kKind, false, T, true><<<tiles, kRowThreads, 0, stream>>>(p);
    } else {
      backward_mvue_rows_kernel<kKind, kGated, T><<<tiles, kRowThreads, 0, stream>>>(p);
    }
  }
};

template <typename T>
void launch_one_pass(const ActivationBackwardArgs& args, const BackwardLayouts& layouts,
                     cudaStream_t stream) {
  // kTall is 1 to 4 % faster where most bytes are columns, and 8 to 15 % slower elsewhere.
  const bool tall =
      layouts.gate_up == Layout::kColumnMajor && layouts.d_gate_up == Layout::kColumnMajor;
  const BackwardMvue p = {patch_backward(args, layouts),
                          tall ? Walk::kTall : Walk::kSquare,
                          args.seed,
                          static_cast<uint16_t*>(args.packed),
                          args.E,
                          args.tile_sums};
  const bool mixed = layouts.any(Layout::kColumnMajor);
  with_activation(args.kind, LaunchOnePass<T>{p, args.gated, mixed, stream});
  SP24_CHECK_LAUNCH("activation_backward with packing of ", name_of(args.d_h.dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
  const bool summed = !args.gated && !mixed;
  if (args.tile_sums != nullptr && !summed)
    launch_tile_sums<T>(view_of(args.d_gate_up), args.tile_sums, stream);
}

}  // namespace

namespace cuda {

void activation_backward(const ActivationBackwardArgs& args, cudaStream_t stream) {
  if (args.d_h.rows == 0 || args.d_h.cols == 0) return;
  if (args.packed == nullptr) return activation_backward_dense(args, stream);
  check_extents32(args.gate_up.rows, args.gate_up.cols, "gate_up");
  const BackwardLayouts layouts(args);
  if (one_pass_fits(args, layouts)) {
    return args.d_h.dtype == DType::kBFloat16 ? launch_one_pass<BFloat16>(args, layouts, stream)
                                              : launch_one_pass<Float16>(args, layouts, stream);
  }
  activation_backward_dense(args, stream);
  mvue_compress({view_of(args.d_gate_up), args.seed, args.packed, args.E, args.tile_sums}, stream);
}

}  // namespace cuda
}  // namespace sparse24
