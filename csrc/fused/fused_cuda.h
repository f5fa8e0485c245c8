// fused_cuda.h: kernels that join two siblings, and the choice between them and the siblings in
// turn. Arguments have been checked by csrc/api; the device of the tensors is current.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse24/activation.h"
#include "sparse24/activation_pack.h"
#include "sparse24/pack.h"

namespace sparse24::cuda {

/// Mask search and packing in one read.
void search_and_pack(const PackArgs* weights, int count, cudaStream_t stream);

/// Backward of the activation; with args.packed its result is MVUE-packed too, in the same pass
/// where shapes allow.
void activation_backward(const ActivationBackwardArgs& args, cudaStream_t stream);

/// Activations with e4m3 copies of the result, and forward also with h packed. Row-major results.
void activation_forward_outputs(const ActivationArgs& args, cudaStream_t stream);
void activation_backward_outputs(const ActivationBackwardArgs& args, cudaStream_t stream);
/// The latter, where it is what an 8-bit layer asks for: false, and nothing done, where it is not.
/// Operands are row-major in whole vectors, and packing fits (activation_outputs.cuh).
bool activation_backward_rows8(const ActivationBackwardArgs& args, cudaStream_t stream);

/// Activations pruned along features, and their gradient, packed both ways.
void activation_pack(const ActivationPackArgs& args, cudaStream_t stream);
void activation_pack_backward(const ActivationPackBackwardArgs& args, cudaStream_t stream);
/// The same to e4m3, of matrices that are not empty.
void activation_pack8(const ActivationPackArgs& args, cudaStream_t stream);
void activation_pack8_backward(const ActivationPackBackwardArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
