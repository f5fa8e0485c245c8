// activation_backward_rows8.cu: launches of backward_rows8.cuh.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/kinds.cuh"
#include "common/cuda_check.h"
#include "fused/backward_rows8.cuh"
#include "fused/fused_cuda.h"

namespace sparse24 {
namespace {

struct LaunchRows8 {
  const RowsBackward8& params;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    if constexpr (kKind != Activation::kIdentity && sizeof(T) == 2) {
      const auto kernel = !kGated && params.to.tile_sums != nullptr
                              ? backward_rows8_kernel<kKind, kGated, T, !kGated>
                              : backward_rows8_kernel<kKind, kGated, T, false>;
      kernel<<<static_cast<uint32_t>(row_blocks(params.to)), kRowThreads, 0, stream>>>(params);
    }
  }
};

}  // namespace

namespace cuda {

bool activation_backward_rows8(const ActivationBackwardArgs& args, cudaStream_t stream) {
  const DType dtype = args.d_h.dtype, packed_dtype = args.packed_dtype.value_or(dtype);
  const bool made_here = args.h.data == nullptr && args.d_gate_up.data == nullptr &&
                         (!args.gated || args.tile_sums == nullptr);
  if (args.kind == Activation::kIdentity || !made_here || args.packed == nullptr) return false;
  TileOutputs to = tile_outputs(args.d_h.rows, args.d_h.cols, args.gated ? 2 : 1, args.float8);
  add_packing(to, args, packed_dtype);
  to.tile_sums = args.tile_sums;
  if (!rows8_fit(to, packed_dtype)) return false;
  const auto operand = [&](const ConstMatrix& m) {
    return patch_operand(m, Layout::kRowMajor, args.d_h.cols);
  };
  const RowsBackward8 params = {operand(args.d_h), operand(args.gate_up), to};
  with_kernel(args.kind, args.gated, dtype, LaunchRows8{params, stream});
  SP24_CHECK_LAUNCH("activation_backward to float8 of ", name_of(dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
  return true;
}

}  // namespace cuda
}  // namespace sparse24
