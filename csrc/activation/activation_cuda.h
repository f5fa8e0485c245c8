// activation_cuda.h: activations on the GPU. Arguments have been checked by csrc/api; the device of
// the tensors is current. Semantics: include/sparse24/activation.h.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse24/activation.h"

namespace sparse24::cuda {

void activation_forward(const ActivationArgs& args, cudaStream_t stream);

/// activation_backward without packing: `seed`, `packed` and `E` are not looked at.
void activation_backward_dense(const ActivationBackwardArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
