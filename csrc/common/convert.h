// convert.h: fp32 from and to the 16-bit types, rounding to nearest even, the same bits on CPU and
// GPU. The 8-bit types are in float8.h.
//
// A NaN becomes 0x7FFF in both 16-bit types, as the GPU's own conversion has it.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/check.h"
#include "common/host_device.h"
#include "sparse24/types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sparse24 {

/// Storage types: plain bits with a name, so that overloads know the format.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr uint16_t kNan16 = 0x7FFF;

template <typename T>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<Float16> = DType::kFloat16;

SP24_HD float to_float(float x) { return x; }

SP24_HD float to_float(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

SP24_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 0x1Fu, fraction = x.bits & 0x3FFu;
  if (exponent == 0x1F) return bits_float(sign | 0x7F800000u | fraction << 13);
  if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // zero or denormal: exact
  return bits_float(sign | float_bits(magnitude));
#endif
}

template <typename T>
SP24_HD T from_float(float x);

template <>
SP24_HD float from_float<float>(float x) {
  return x;
}

template <>
SP24_HD BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7F800000u) return {kNan16};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
SP24_HD Float16 from_float<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > 0x7F800000u) return {kNan16};
  if (magnitude >= 0x477FF000u)
    return {static_cast<uint16_t>(sign | 0x7C00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {
    // Denormal in fp16: adding 0.5 puts the last fp16 place at the last fp32 place, and the sum
    // rounds once.
    const float shifted = bits_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

inline int bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 4;
    case DType::kBFloat16:
    case DType::kFloat16: return 2;
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2: return 1;
  }
  throw Error(concat("unknown dtype code ", static_cast<int>(dtype)));
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kFloat8E5M2: return "float8_e5m2";
  }
  throw Error(concat("unknown dtype code ", static_cast<int>(dtype)));
}

/// Calls function(T{}) with the storage type of a dtype that is computed with: fp32, bf16, fp16.
template <typename Function>
void with_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat16: return function(Float16{});
    default: break;
  }
  throw Error(concat("a matrix to compute with must be float32, bfloat16 or float16, got ",
                     name_of(dtype)));
}

}  // namespace sparse24
