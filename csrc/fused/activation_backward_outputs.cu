// activation_backward_outputs.cu: launches of backward with several outputs: the two that 8-bit
// layers want by rows (backward_rows8.cuh), every other mix by activation_outputs.cuh.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/kinds.cuh"
#include "common/cuda_check.h"
#include "fused/activation_outputs.cuh"
#include "fused/fused_cuda.h"

namespace sparse24 {
namespace {

struct LaunchBackwardOutputs {
  const ActivationParams& params;
  bool packs;
  DType packed_dtype;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    if constexpr (sizeof(T) == 2) {
      with_packing<T>(packs, packed_dtype, [&](auto packed) {
        const auto kernel = backward_outputs_kernel<kKind, kGated, T, decltype(packed)>;
        SP24_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             kWaitingBytes<kGated>));
        const uint32_t blocks = params.to.tile_rows * params.to.tile_cols;
        kernel<<<blocks, kTile8Threads, kWaitingBytes<kGated>, stream>>>(params);
      });
    }
  }
};

}  // namespace

namespace cuda {

void activation_backward_outputs(const ActivationBackwardArgs& args, cudaStream_t stream) {
  const DType dtype = args.d_h.dtype, packed_dtype = args.packed_dtype.value_or(dtype);
  const int parts = args.gated ? 2 : 1;
  if (dtype == DType::kFloat32 || !packing_fits(args, packed_dtype, args.d_h.cols, args.gated) ||
      !rows_fit(args.gate_up, parts) || !rows_fit(args.d_h) || !rows_fit(args.h) ||
      !rows_fit(args.d_gate_up, parts)) {
    check_written(args.d_gate_up, "d_gate_up");
    activation_backward_dense(args, stream);
    return write_others(args, args.d_gate_up, args.tile_sums, stream);
  }
  if (activation_backward_rows8(args, stream)) return;
  ActivationParams p = {};
  p.d_h = args.d_h, p.gate_up = args.gate_up, p.h = args.h;
  p.to = tile_outputs(args.d_h.rows, args.d_h.cols, parts, args.float8);
  p.to.x16 = static_cast<uint16_t*>(args.d_gate_up.data);
  p.to.x16_ld = args.d_gate_up.row_stride;
  p.lines = kPatch;
  if (args.packed != nullptr) add_packing(p.to, args, packed_dtype);
  p.to.tile_sums = args.tile_sums;
  with_kernel(args.kind, args.gated, dtype,
              LaunchBackwardOutputs{p, args.packed != nullptr, packed_dtype, stream});
  SP24_CHECK_LAUNCH("activation_backward with float8 outputs of ", name_of(dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
