// activation_backward.cu: backward of the activation whose result leaves twice from one read: dense
// d_gate_up for the input gradient, and MVUE-packed for the weight gradient.
//
//   d_h, gate_up, d_gate_up, h   as in activation/backward.cu, bf16 or fp16, every mix of layouts
//   packed [padded/2, 2*d_ff] (plain: d_ff), E, seed   as in pack/mvue_pack.cu, and with
//                                the same bits as mvue_pack(d_gate_up, seed)
//
// Work     All row-major: backward_rows.cuh. Otherwise backward_tiles.cuh: tiles through shared
//          memory. Both make d_gate and d_up in registers, round them, store them, and prune both
//          as mvue_pack would (mvue_patch.cuh). The up half's groups lie d_ff features on.
// Traffic  10 B dense (6 read, 4 written) + 2.25 B packed an element of h; 2 B more for h itself.
//          8192 x 11008: 1.10 GB, 263 us at 4.2 TB/s.
// Edges    Vectors must fit all operands, and metadata blocks of 64 must not straddle gate and up:
//          d_ff % 64 == 0 (gated). Lines of tiles must not overlap. Otherwise the two passes run
//          one after the other, which is the same by definition.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/kinds.cuh"
#include "common/cuda_check.h"
#include "common/format.h"
#include "fused/backward_rows.cuh"
#include "fused/backward_tiles.cuh"
#include "fused/fused_cuda.h"
#include "pack/pack_cuda.h"
#include "pack/tile_sums.cuh"

namespace sparse24 {
namespace {

/// Is any of the results in 8 bits?
bool with_float8(const ActivationBackwardArgs& args) {
  return args.float8.x8 != nullptr || args.float8.x8_t != nullptr || args.float8.amax != nullptr ||
         (args.packed != nullptr && is_float8(args.packed_dtype.value_or(args.d_h.dtype)));
}

bool one_pass_fits(const ActivationBackwardArgs& args, const BackwardLayouts& layouts) {
  const bool blocks_fit = args.d_h.cols % (args.gated ? kMetaBlock : kPatch) == 0;
  return args.d_h.dtype != DType::kFloat32 && !layouts.any(Layout::kStrided) && blocks_fit &&
         is_aligned16(args.packed) &&
         (!layouts.any(Layout::kColumnMajor) || backward_tiles_fit(args, layouts));
}

PackedBackward packed_backward(const ActivationBackwardArgs& args) {
  return {args.seed, static_cast<uint16_t*>(args.packed), args.E, static_cast<int>(args.d_h.rows),
          static_cast<int>(args.d_h.cols)};
}

struct LaunchOnePass {
  const ActivationBackwardArgs& args;
  const BackwardLayouts& layouts;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    if constexpr (sizeof(T) == 2) {
      layouts.any(Layout::kColumnMajor) ? launch_tiles<kKind, kGated, T>()
                                        : launch_rows<kKind, kGated, T>();
    }
  }
  template <Activation kKind, bool kGated, typename T>
  void launch_rows() const {
    const int64_t d_ff = args.d_h.cols;
    const auto operand = [&](const auto& m) { return patch_operand(m, Layout::kRowMajor, d_ff); };
    const uint32_t tile_rows =
        static_cast<uint32_t>(round_up(args.d_h.rows, kTileRows) / kTileRows);
    const uint32_t tile_cols = static_cast<uint32_t>(round_up(d_ff, kTileCols) / kTileCols);
    const RowsBackwardMvue p = {operand(args.d_h),
                                operand(args.gate_up),
                                operand(args.d_gate_up),
                                operand(args.h),
                                tile_rows,
                                tile_cols,
                                packed_backward(args),
                                args.tile_sums};
    const auto kernel = !kGated && args.tile_sums != nullptr
                            ? backward_mvue_rows_kernel<kKind, kGated, T, !kGated>
                            : backward_mvue_rows_kernel<kKind, kGated, T>;
    kernel<<<tile_rows * tile_cols, kRowThreads, 0, stream>>>(p);
  }
  template <Activation kKind, bool kGated, typename T>
  void launch_tiles() const {
    using Tile = MvueTile<T>;
    with_tile_operand([this](auto kind) {
      using Operand = typename decltype(kind)::Type;
      const TileBackwardMvue<Operand> p = {tile_backward<Tile, Operand>(args, layouts),
                                           packed_backward(args)};
      launch_tile_pass<Tile>(backward_mvue_tile_kernel<kKind, kGated, T, Operand>, p,
                             kBackwardBytes<Tile, kGated>, stream);
    });
  }
};

void launch_one_pass(const ActivationBackwardArgs& args, const BackwardLayouts& layouts,
                     cudaStream_t stream) {
  with_kernel(args.kind, args.gated, args.d_h.dtype, LaunchOnePass{args, layouts, stream});
  SP24_CHECK_LAUNCH("activation_backward with packing of ", name_of(args.d_h.dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
  const bool summed = !args.gated && !layouts.any(Layout::kColumnMajor);
  if (args.tile_sums == nullptr || summed) return;
  with_packed16(args.d_h.dtype, [&](auto format) {
    launch_tile_sums<typename decltype(format)::Storage>(as_const(args.d_gate_up), args.tile_sums,
                                                         stream);
  });
}

}  // namespace

namespace cuda {

void activation_backward(const ActivationBackwardArgs& args, cudaStream_t stream) {
  if (args.d_h.rows == 0 || args.d_h.cols == 0) return;
  if (with_float8(args)) return activation_backward_outputs(args, stream);
  if (args.packed == nullptr) return activation_backward_dense(args, stream);
  check_extents32(args.gate_up.rows, args.gate_up.cols, "gate_up");
  const BackwardLayouts layouts(args);
  if (one_pass_fits(args, layouts)) return launch_one_pass(args, layouts, stream);
  activation_backward_dense(args, stream);
  mvue_pack({as_const(args.d_gate_up), args.seed, args.packed, args.E, args.tile_sums}, stream);
}

}  // namespace cuda
}  // namespace sparse24
