// pack_cuda.h: packing and unpacking on the GPU. Arguments have been checked by csrc/api; the
// device of the tensors is current. Semantics: include/sparse24/pack.h.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse24/pack.h"

namespace sparse24::cuda {

void pack_by_mask(const PackArgs* weights, int count, cudaStream_t stream);
void mvue_pack(const MvueArgs& args, cudaStream_t stream);
void quantize(const QuantizeArgs& args, cudaStream_t stream);

/// The part of mvue_pack with 8-bit outputs; dy is not empty.
void mvue_outputs(const MvueArgs& args, cudaStream_t stream);
void unpack(const UnpackArgs& args, cudaStream_t stream);
void count_bad_metadata(DType dtype, const uint8_t* E, int64_t m, int64_t k, int64_t* bad,
                        cudaStream_t stream);

}  // namespace sparse24::cuda
