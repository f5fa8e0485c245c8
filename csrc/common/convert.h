// convert.h: fp32 from and to the 16-bit types, rounding to nearest even, the same bits on CPU and
// GPU. The 8-bit types are in float8.h.
//
// A NaN becomes 0x7FFF in both 16-bit types, as the GPU's own conversion has it.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

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
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  uint16_t bits;
};
struct Float16 {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "float16";
  uint16_t bits;
};

template <typename... T>
struct TypeList {};
template <typename... A, typename... B>
TypeList<A..., B...> join(TypeList<A...>, TypeList<B...>);
template <typename A, typename B>
using Join = decltype(join(A{}, B{}));
template <typename T, typename List>
constexpr bool kIsIn = false;
template <typename T, typename... All>
constexpr bool kIsIn<T, TypeList<All...>> = (std::is_same_v<T, All> || ...);

/// All 16-bit types. Sizes, names, dispatch and the packed formats (format.h) follow from this
/// list; another type also needs to_float and from_float below.
using Types16 = TypeList<BFloat16, Float16>;

constexpr uint16_t kNan16 = 0x7FFF;

template <typename T>
constexpr DType kDTypeOf = T::kDType;
template <>
constexpr DType kDTypeOf<float> = DType::kFloat32;

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

/// Calls function(T{}) with the type of the list that has this dtype; false where none has.
template <typename... T, typename Function>
bool with_type_of(TypeList<T...>, DType dtype, Function&& function) {
  return ((dtype == kDTypeOf<T> && (function(T{}), true)) || ...);
}

inline int bytes_of(DType dtype) {
  int bytes = dtype == DType::kFloat32 ? 4 : is_float8(dtype) ? 1 : 0;
  with_type_of(Types16{}, dtype, [&](auto zero) { bytes = sizeof zero; });
  if (bytes == 0) throw Error(concat("unknown dtype code ", static_cast<int>(dtype)));
  return bytes;
}

inline const char* name_of(DType dtype) {
  const char* name = nullptr;
  if (with_type_of(Types16{}, dtype, [&](auto zero) { name = decltype(zero)::kName; })) return name;
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
    case DType::kFloat8E5M2: return "float8_e5m2";
    default: break;
  }
  throw Error(concat("unknown dtype code ", static_cast<int>(dtype)));
}

/// "float16, bfloat16 or another", for messages.
template <typename... Names>
std::string any_of(const Names&... names) {
  std::string text;
  size_t left = sizeof...(Names);
  ((text += names, text += --left > 1 ? ", " : left == 1 ? " or " : ""), ...);
  return text;
}
template <typename... T>
std::string names_of(TypeList<T...>) {
  return any_of(T::kName...);
}
/// Of what is computed with: fp32 and 16 bits.
template <typename... T>
std::string computed_names(TypeList<T...>) {
  return any_of("float32", T::kName...);
}

/// Calls function(T{}) with the storage type of a dtype that is computed with: fp32 and 16 bits.
template <typename Function>
void with_type(DType dtype, Function&& function) {
  if (dtype == DType::kFloat32) return function(float{});
  if (with_type_of(Types16{}, dtype, function)) return;
  throw Error(concat("a matrix to compute with must be ", computed_names(Types16{}), ", got ",
                     name_of(dtype)));
}

}  // namespace sparse24
