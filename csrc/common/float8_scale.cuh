// float8_scale.cuh: a scale that a pass finds by itself, in the memory where it is wanted: zero, then
// the largest magnitude (amax.cuh), then the scale.
//
// Traffic  4 B, beside those of whoever finds the magnitude: two launches of some 2 us.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/float8_scale.h"

namespace sparse24 {

static __global__ void scale_of_amax_kernel(float* scale) { *scale = scale_of(*scale); }

/// find(scale) launches what raises *scale to the largest finite magnitude.
template <typename Find>
void find_scale(float* scale, cudaStream_t stream, const Find& find) {
  SP24_CHECK_CUDA(cudaMemsetAsync(scale, 0, sizeof *scale, stream));
  find(scale);
  scale_of_amax_kernel<<<1, 1, 0, stream>>>(scale);
  SP24_CHECK_LAUNCH("the scale of a matrix");
}

}  // namespace sparse24
