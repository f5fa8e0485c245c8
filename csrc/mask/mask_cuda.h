// mask_cuda.h: masks on the GPU. Arguments have been checked by csrc/api; the device of the tensors
// is current. Semantics: include/sparse24/pack.h and recipe.h.
#pragma once

#include <cuda_runtime_api.h>

#include "sparse24/pack.h"
#include "sparse24/recipe.h"

namespace sparse24::cuda {

void search_mask(const PackArgs* weights, int count, cudaStream_t stream);
void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols,
                 cudaStream_t stream);
void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad, cudaStream_t stream);
void mask_flips(const MaskFlipsArgs* tensors, int count, cudaStream_t stream);
void mask_gap(const ConstMatrix& w, float* gap, cudaStream_t stream);
void masked_decay(const MaskedDecayArgs* tensors, int count, cudaStream_t stream);

}  // namespace sparse24::cuda
