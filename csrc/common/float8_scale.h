// float8_scale.h: from the largest magnitude of a matrix to the scale by which it is cast to e4m3.
#pragma once

#include "common/bits.h"
#include "common/float8.h"
#include "common/host_device.h"

namespace sparse24 {

/// What a scale leaves room for, beyond the largest magnitude: MVUE keeps values of up to twice that.
constexpr float kScaleMargin = 2.0f;

/// The smallest power of two by which amax * kScaleMargin fits; 1 for an amax of 0.
SP24_HD float scale_of(float amax) {
  constexpr float kPerLargest = kScaleMargin / Float8Traits<Float8E4M3>::kLargest;
  constexpr uint32_t kMantissa = 0x007FFFFFu;
  if (!(amax > 0.0f)) return 1.0f;
  const float least = amax * kPerLargest;
  if (least <= 0x1p-126f) return 0x1p-126f;
  return bits_float((float_bits(least) + kMantissa) & ~kMantissa);
}

}  // namespace sparse24
