// recipe.h: what the training recipe does to weights and gradients between backward and the next forward.
#pragma once

#include <cstdint>

#include "sparse24/types.h"

namespace sparse24 {

/// grad += decay * (1 - mask) * w, elementwise. Fixed order: fp32 product of decay and w, then fp32 sum, then one
/// rounding to grad's dtype. `grad_scale`, when not null, is one fp32 on the device that multiplies decay (for
/// optimizers that un-scale inside their own kernel).
struct MaskedDecayArgs {
  Matrix grad;                     // [rows, cols], row- or column-major
  ConstMatrix w;                   // same extents
  const uint16_t* mask = nullptr;  // [rows/4, cols/4]
  float decay = 0.0f;
  const float* grad_scale = nullptr;
};
SP24_API void masked_decay(const MaskedDecayArgs* tensors, int count, const Context& context);

/// flips[i] = number of elements whose kept bit differs between mask_a and mask_b of tensor i (int64, on the device).
struct MaskFlipsArgs {
  const uint16_t* mask_a = nullptr;
  const uint16_t* mask_b = nullptr;
  int64_t blocks = 0;
  int64_t* flips = nullptr;
};
SP24_API void mask_flips(const MaskFlipsArgs* tensors, int count, const Context& context);

/// gap[b] = L1 gap of block b between the best and the second-best of the 90 patterns; fp32 [rows/4, cols/4].
SP24_API void mask_gap(const ConstMatrix& w, float* gap, const Context& context);

}  // namespace sparse24
