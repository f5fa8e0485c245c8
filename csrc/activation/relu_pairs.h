// relu_pairs.h: (squared) ReLU and its gradient for two 16-bit values in a word.
//
// The GPU has them in an instruction or two that round once. That gives the bits of fp32 arithmetic
// with one rounding at its end (functions.h): a product of two 16-bit values is exact in fp32, but
// for bfloat16 products below 2^-134, which become 0 either way. Twice a float16 may leave its
// range, so its gradient of squared ReLU goes through fp32; so does ReLU's of bfloat16 before
// sm_90, which lacks a comparison. A GPU test compares all 16-bit values.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activation/functions.h"
#include "common/pair16.h"

namespace sparse24 {

#if defined(__CUDA_ARCH__)
/// a b, both halves, each rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>) {  // sm_80 has no mul: adding -0 changes nothing
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
}
#endif

/// act(u) of both halves, from positive = max(u, 0).
template <Activation kKind, typename T>
SP24_HD uint32_t relu_pair(uint32_t positive) {
  static_assert(kKind == Activation::kRelu || kKind == Activation::kSquaredRelu);
  if constexpr (kKind == Activation::kRelu) return positive;
#if defined(__CUDA_ARCH__)
  return multiply_pair<T>(positive, positive);
#else
  return make_pair16<T>(activate<kKind, true>(low_value<T>(positive)).value,
                        activate<kKind, true>(high_value<T>(positive)).value);
#endif
}

/// d_h act'(u) of both halves.
template <Activation kKind, typename T>
SP24_HD uint32_t relu_gradient_pair(uint32_t d_h, uint32_t positive) {
  static_assert(kKind == Activation::kRelu || kKind == Activation::kSquaredRelu);
#if defined(__CUDA_ARCH__)
  uint32_t slope;
  if constexpr (kKind == Activation::kSquaredRelu && std::is_same_v<T, BFloat16>) {
    constexpr uint32_t kTwo = 0x40004000u;
    return multiply_pair<T>(d_h, multiply_pair<T>(positive, kTwo));
  } else if constexpr (kKind == Activation::kRelu && std::is_same_v<T, Float16>) {
    asm("set.gt.f16x2.f16x2 %0, %1, %2;" : "=r"(slope) : "r"(positive), "r"(0u));
    return multiply_pair<T>(d_h, slope);
  } else if constexpr (kKind == Activation::kRelu) {
#if __CUDA_ARCH__ >= 900
    asm("set.gt.bf16x2.bf16x2 %0, %1, %2;" : "=r"(slope) : "r"(positive), "r"(0u));
    return multiply_pair<T>(d_h, slope);
#endif
  }
#endif
  return make_pair16<T>(low_value<T>(d_h) * activate<kKind, true>(low_value<T>(positive)).slope,
                        high_value<T>(d_h) * activate<kKind, true>(high_value<T>(positive)).slope);
}

}  // namespace sparse24
