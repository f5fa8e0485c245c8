// float8.h: fp32 from and to the 8-bit types, the same bits on CPU and GPU.
//
//              bits s.e.m   largest   smallest normal   last place of subnormals
//   e4m3       1.4.3        448       2^-6              2^-9     no Inf
//   e5m2       1.5.2        57344     2^-14             2^-16
//
// Nearest   to nearest even; what is finite and too large becomes the largest value.
// Special   Inf and NaN both become kNan8, so that an overflow upstream stays visible: the GPU's
//           own saturating conversion would hide it.
// Random    to_float8_random rounds up with the probability that keeps the mean, from 16 random
//           bits, down to 2^-16 of the last place.
// Scale     A scale is the factor of dequantisation, x ~= scale * x8; quantising multiplies by its
//           inverse, exactly, because scales are powers of two.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/pair16.h"

namespace sparse24 {

struct Float8E4M3 {
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr const char* kName = "float8_e4m3fn";
  uint8_t bits;
};
struct Float8E5M2 {
  static constexpr DType kDType = DType::kFloat8E5M2;
  static constexpr const char* kName = "float8_e5m2";
  uint8_t bits;
};
using Types8 = TypeList<Float8E4M3, Float8E5M2>;

constexpr uint8_t kNan8 = 0x7F;

template <typename F>
struct Float8Traits;
template <>
struct Float8Traits<Float8E4M3> {
  static constexpr int kMantissaBits = 3, kBias = 7;
  static constexpr float kLargest = 448.0f;
};
template <>
struct Float8Traits<Float8E5M2> {
  static constexpr int kMantissaBits = 2, kBias = 15;
  static constexpr float kLargest = 57344.0f;
};

/// 2^exponent, for normal numbers.
SP24_HD constexpr uint32_t power_bits(int exponent) {
  return static_cast<uint32_t>(exponent + 127) << 23;
}

SP24_HD bool is_finite(float x) { return (float_bits(x) & 0x7F800000u) != 0x7F800000u; }

/// The bits of the exponent and mantissa are those of fp32, moved: a multiplication puts the bias
/// right, and subnormals with it.
template <typename F>
SP24_HD float widen8(uint32_t bits) {
  using Traits = Float8Traits<F>;
  const uint32_t magnitude = bits & 0x7Fu, sign = (bits & 0x80u) << 24;
  const float value = bits_float(magnitude << (23 - Traits::kMantissaBits)) *
                      bits_float(power_bits(127 - Traits::kBias));
  return bits_float(float_bits(value) | sign);
}

SP24_HD float to_float(Float8E4M3 x) {
  if ((x.bits & 0x7Fu) == kNan8) return bits_float(0x7FC00000u);
  return widen8<Float8E4M3>(x.bits);
}
SP24_HD float to_float(Float8E5M2 x) {
  const uint32_t magnitude = x.bits & 0x7Fu;
  if (magnitude > 0x7Cu) return bits_float(0x7FC00000u);
  if (magnitude == 0x7Cu) return bits_float(0x7F800000u | static_cast<uint32_t>(x.bits >> 7) << 31);
  return widen8<Float8E5M2>(x.bits);
}

/// To nearest even, saturating, in integers and without a branch; y is not NaN, and may be
/// infinite.
template <typename F>
SP24_HD uint32_t saturated_code_by_bits(float y) {
  using Traits = Float8Traits<F>;
  constexpr int kDropped = 23 - Traits::kMantissaBits, kLowest = 1 - Traits::kBias;
  const float whole = abs_float(y);
  const float magnitude = whole > Traits::kLargest ? Traits::kLargest : whole;
  // Subnormal: in a sum with this number, the last place of fp32 is the last one of the format.
  const float shifted = magnitude + bits_float(power_bits(kLowest + kDropped));
  const uint32_t subnormal = float_bits(shifted) - power_bits(kLowest + kDropped);
  const uint32_t bits = float_bits(magnitude);
  const uint32_t rounded = bits + ((1u << (kDropped - 1)) - 1u) + (bits >> kDropped & 1u);
  const uint32_t normal = (rounded - power_bits(kLowest - 1)) >> kDropped;
  const bool is_subnormal = magnitude < bits_float(power_bits(kLowest));
  return (float_bits(y) >> 24 & 0x80u) | (is_subnormal ? subnormal : normal);
}

#if defined(__CUDACC__)
/// Two values to nearest, `low` in the lower byte; Inf saturates here, as everything too large, and
/// NaN becomes kNan8. One instruction from sm_89 on.
template <typename F>
__device__ __forceinline__ uint32_t convert_pair8(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  const auto code = [](float y) { return y != y ? kNan8 : saturated_code_by_bits<F>(y); };
  return code(low) | code(high) << 8;
#else
  uint16_t pair;
  if constexpr (Float8Traits<F>::kMantissaBits == 3) {
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  }
  return pair;
#endif
}

/// Four values likewise, the first in the lowest byte. One piece of code for two conversions, so that
/// the halves of the word are not cleared first.
template <typename F>
__device__ __forceinline__ uint32_t convert_quad8(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return convert_pair8<F>(a, b) | convert_pair8<F>(c, d) << 16;
#else
  uint32_t quad;
  if constexpr (Float8Traits<F>::kMantissaBits == 3) {
    asm("{\n .reg .b16 low, high;\n"
        " cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        " mov.b32 %0, {low, high};\n}"
        : "=r"(quad)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  } else {
    asm("{\n .reg .b16 low, high;\n"
        " cvt.rn.satfinite.e5m2x2.f32 low, %2, %1;\n cvt.rn.satfinite.e5m2x2.f32 high, %4, %3;\n"
        " mov.b32 %0, {low, high};\n}"
        : "=r"(quad)
        : "f"(a), "f"(b), "f"(c), "f"(d));
  }
  return quad;
#endif
}
#endif

/// To nearest even, saturating; y is not NaN, and may be infinite.
template <typename F>
SP24_HD uint32_t saturated_code(float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return convert_pair8<F>(y, 0.0f) & 0xFFu;
#else
  return saturated_code_by_bits<F>(y);
#endif
}

/// x / scale to nearest.
template <typename F>
SP24_HD F to_float8(float x, float inverse_scale) {
  if (!is_finite(x)) return {kNan8};
  return {static_cast<uint8_t>(saturated_code<F>(x * inverse_scale))};
}

template <>
SP24_HD Float8E4M3 from_float<Float8E4M3>(float x) {
  return to_float8<Float8E4M3>(x, 1.0f);
}
template <>
SP24_HD Float8E5M2 from_float<Float8E5M2>(float x) {
  return to_float8<Float8E5M2>(x, 1.0f);
}

/// The inverse of a scale that may be absent.
SP24_HD float inverse_of(const float* scale) { return scale == nullptr ? 1.0f : 1.0f / *scale; }

/// A format as numbers, for code that serves both: what rounding at random needs.
struct RandomRounding {
  float move;     // 2^(bias - 127)
  float largest;  // as a code at its place
  int dropped;    // bits of fp32 below the last place

  template <typename F>
  static SP24_HD RandomRounding of() {
    constexpr int kMantissaBits = Float8Traits<F>::kMantissaBits, kDropped = 23 - kMantissaBits;
    return {bits_float(power_bits(Float8Traits<F>::kBias - 127)),
            bits_float((kMantissaBits == 3 ? 0x7Eu : 0x7Bu) << kDropped), kDropped};
  }

  /// |x| / scale, moved to where the format's exponent and mantissa begin at bit `dropped`, plus
  /// `random` (16 bits; 1/2 more, so that 0 and 65535 are alike) below the last place. What is
  /// above is the code; subnormals of the format are subnormals of fp32.
  SP24_HD uint32_t operator()(float magnitude, float inverse_scale, uint32_t random) const {
    const float moved = magnitude * inverse_scale * move;
#if defined(__CUDA_ARCH__)
    const float y = fminf(moved, largest);
#else
    const float y = moved < largest ? moved : largest;
#endif
    const int spare = dropped - 16;
    return float_bits(y) + (random << spare | 1u << (spare - 1));
  }
};

/// x / scale, rounded up or down at random so that the mean is right; `random` has 16 bits.
template <typename F>
SP24_HD F to_float8_random(float x, float inverse_scale, uint32_t random) {
  if (!is_finite(x)) return {kNan8};
  const RandomRounding rounding = RandomRounding::of<F>();
  const uint32_t bits = rounding(abs_float(x), inverse_scale, random);
  return {static_cast<uint8_t>(bits >> rounding.dropped | (float_bits(x) >> 24 & 0x80u))};
}

}  // namespace sparse24
