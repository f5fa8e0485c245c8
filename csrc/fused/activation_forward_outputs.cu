// activation_forward_outputs.cu: launches of forward with several outputs; the kernels are in
// activation_outputs.cuh.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/kinds.cuh"
#include "common/cuda_check.h"
#include "fused/activation_outputs.cuh"
#include "fused/fused_cuda.h"

namespace sparse24 {
namespace {

struct LaunchForwardOutputs {
  const ActivationParams& params;
  bool packs;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    if constexpr (sizeof(T) == 2) {
      const uint32_t blocks = params.to.tile_rows * params.to.tile_cols;
      const auto kernel = packs ? forward_outputs_kernel<kKind, kGated, T, T>
                                : forward_outputs_kernel<kKind, kGated, T, NoPacking>;
      kernel<<<blocks, kTile8Threads, 0, stream>>>(params);
    }
  }
};

}  // namespace

namespace cuda {

void activation_forward_outputs(const ActivationArgs& args, cudaStream_t stream) {
  const DType dtype = args.gate_up.dtype, packed_dtype = args.packed_dtype.value_or(dtype);
  const bool one_pass = packing_fits(args, packed_dtype, args.h.cols, false) &&
                        !(args.packed != nullptr && is_float8(packed_dtype)) &&
                        rows_fit(args.gate_up, args.gated ? 2 : 1) && rows_fit(args.h) &&
                        dtype != DType::kFloat32;
  if (!one_pass) {
    check_written(args.h, "h");
    activation_forward(args, stream);
    return write_others(args, args.h, nullptr, stream);
  }
  ActivationParams p = {};
  p.gate_up = args.gate_up;
  p.to = tile_outputs(args.h.rows, args.h.cols, 1, args.float8);
  p.to.x16 = static_cast<uint16_t*>(args.h.data), p.to.x16_ld = args.h.row_stride;
  p.lines = kPatch;
  if (args.packed != nullptr) add_packing(p.to, args, packed_dtype);
  with_kernel(args.kind, args.gated, dtype,
              LaunchForwardOutputs{p, args.packed != nullptr, stream});
  SP24_CHECK_LAUNCH("activation_forward with float8 or packed h of ", name_of(dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
