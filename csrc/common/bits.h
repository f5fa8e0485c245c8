// bits.h: reading floats as bits and back, on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace sparse24 {

SP24_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

SP24_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

SP24_HD float abs_float(float x) {
#if defined(__CUDA_ARCH__)
  return fabsf(x);  // a modifier of the instruction that uses it, where a bit operation would be
                    // one of its own
#else
  return bits_float(float_bits(x) & 0x7fffffffu);
#endif
}

}  // namespace sparse24
