// activation_outputs.cu: launches of activation_outputs.cuh.
#include <cuda_runtime.h>

#include "activation/kinds.cuh"
#include "common/cuda_check.h"
#include "fused/activation_outputs.cuh"
#include "fused/fused_cuda.h"

namespace sparse24 {
namespace {

/// Gated results are packed half by half, and a half must have whole blocks of E.
void check_packed_halves(bool gated, bool packs, int64_t d_ff) {
  SP24_CHECK(
      !gated || !packs || d_ff % kMetaBlock == 0,
      "d_ff must be a multiple of 64 where a gated gradient is packed beside float8 outputs, "
      "got ",
      d_ff, "; give d_gate_up, and pack it by mvue_compress");
}

template <bool kBackward>
struct LaunchOutputs {
  const ActivationParams& params;
  bool packs;
  DType packed_dtype;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    if constexpr (sizeof(T) == 2) {
      with_packing<T>(packs, packed_dtype, [&](auto packed) {
        using Packed = decltype(packed);
        const uint32_t blocks = params.to.tile_rows * params.to.tile_cols;
        if constexpr (kBackward) {
          backward_outputs_kernel<kKind, kGated, T, Packed>
              <<<blocks, kTile8Threads, 0, stream>>>(params);
        } else if constexpr (!packs8<Packed>) {
          forward_outputs_kernel<kKind, kGated, T, Packed>
              <<<blocks, kTile8Threads, 0, stream>>>(params);
        }
      });
    }
  }
};

}  // namespace

namespace cuda {

void activation_forward_outputs(const ActivationArgs& args, cudaStream_t stream) {
  const DType dtype = args.gate_up.dtype, packed_dtype = args.packed_dtype.value_or(dtype);
  SP24_CHECK(dtype != DType::kFloat32, "h in float8 or packed needs bfloat16 or float16 on a GPU, ",
             "got float32; use activation_forward, then quantize");
  SP24_CHECK(args.packed == nullptr || !is_float8(packed_dtype),
             "h is packed in its own dtype, got packed_dtype ", name_of(packed_dtype),
             "; write h, and pack it by mvue_compress");
  ActivationParams p = {};
  p.gate_up = args.gate_up;
  p.vectors = row_vectors(args.gate_up, args.gated ? 2 : 1);
  p.to = tile_outputs(args.h.rows, args.h.cols, 1, args.float8);
  add_dense(p.to, args.h, 1, "h");
  p.lines = kPatch;
  if (args.packed != nullptr) add_packing(p.to, args, packed_dtype);
  with_kernel(args.kind, args.gated, dtype,
              LaunchOutputs<false>{p, args.packed != nullptr, packed_dtype, stream});
  SP24_CHECK_LAUNCH("activation_forward with float8 or packed h of ", name_of(dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

void activation_backward_outputs(const ActivationBackwardArgs& args, cudaStream_t stream) {
  const DType dtype = args.d_h.dtype, packed_dtype = args.packed_dtype.value_or(dtype);
  SP24_CHECK(dtype != DType::kFloat32, "float8 gradients need bfloat16 or float16 on a GPU, ",
             "got float32; use activation_backward, then quantize");
  check_packed_halves(args.gated, args.packed != nullptr, args.d_h.cols);
  ActivationParams p = {};
  p.d_h = args.d_h, p.gate_up = args.gate_up, p.h = args.h;
  p.vectors = row_vectors(args.gate_up, args.gated ? 2 : 1) && row_vectors(args.d_h);
  p.h_vectors = args.h.data != nullptr && row_vectors(args.h);
  p.to = tile_outputs(args.d_h.rows, args.d_h.cols, args.gated ? 2 : 1, args.float8);
  add_dense(p.to, args.d_gate_up, args.gated ? 2 : 1, "d_gate_up");
  check_row_major(args.h, "h");
  p.lines = kPatch;
  if (args.packed != nullptr) add_packing(p.to, args, packed_dtype);
  p.to.tile_sums = args.tile_sums;
  with_kernel(args.kind, args.gated, dtype,
              LaunchOutputs<true>{p, args.packed != nullptr, packed_dtype, stream});
  SP24_CHECK_LAUNCH("activation_backward with float8 outputs of ", name_of(dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
