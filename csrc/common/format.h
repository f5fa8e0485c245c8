// format.h: what each packed format is and can do. Its twin in Python is sparse24/formats.py, and a
// test compares the two through the binding.
//
//   kPerVector   elements of 16 bytes
//   kMetaTileK   extent along k of a block of E, whose order meta_offset gives (metadata.h)
//   kTokenStep   tokens are padded to a multiple of this where k is tokens
//   kMnMajor     may a packed operand also lie along m ([k/2, m])? wgmma reads 8-bit ones along k
//                only
//   kScaled      values are x / scale, and products multiply by the scale again
//   kWide        of what is computed beside them, and of products, where these are not fp32
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/convert.h"
#include "common/float8.h"
#include "common/metadata.h"
#include "sparse24/types.h"

namespace sparse24 {

struct Format16 {
  static constexpr int kBytes = 2, kPerVector = 16 / kBytes;
  static constexpr int kMetaTileK = kMetaBlock, kTokenStep = 8;
  static constexpr bool kMnMajor = true, kScaled = false;
  static int64_t meta_offset(int64_t m, int64_t k, int64_t rows_m) {
    return meta_byte_offset(m, k, rows_m);
  }
  static int64_t meta_size(int64_t m, int64_t k) { return meta_bytes(m, k); }
};
struct Format8 {
  static constexpr int kBytes = 1, kPerVector = 16 / kBytes;
  static constexpr int kMetaTileK = kMeta8BlockK, kTokenStep = 32;
  static constexpr bool kMnMajor = false, kScaled = true;
  static int64_t meta_offset(int64_t m, int64_t k, int64_t rows_m) {
    return meta8_byte_offset(m, k, rows_m);
  }
  static int64_t meta_size(int64_t m, int64_t k) { return meta8_bytes(m, k); }
};

template <typename T>
struct FormatOf : std::conditional_t<is_float8(T::kDType), Format8, Format16> {
  using Storage = T;
  static constexpr DType kDType = T::kDType;
  static constexpr DType kWide = is_float8(kDType) ? DType::kBFloat16 : kDType;
};

/// Every format of packed values on a GPU.
using PackedTypes = Join<Types16, Types8>;

/// function(FormatOf<T>{}) for the type of the list that has this dtype; the last where none has.
template <typename First, typename... Rest, typename Function>
auto with_format_of(TypeList<First, Rest...>, DType dtype, Function&& function) {
  if constexpr (sizeof...(Rest) > 0)
    if (dtype != First::kDType) return with_format_of(TypeList<Rest...>{}, dtype, function);
  return function(FormatOf<First>{});
}

template <typename Types>
void check_one_of(DType dtype, const char* what) {
  if (!with_type_of(Types{}, dtype, [](auto) {}))
    throw Error(concat(what, " must be ", names_of(Types{}), ", got ", name_of(dtype)));
}

/// Calls function(FormatOf<...>{}); throws for a dtype that is no packed format of the GPU.
template <typename Function>
auto with_packed_format(DType dtype, Function&& function) {
  check_one_of<PackedTypes>(dtype, "a packed operand");
  return with_format_of(PackedTypes{}, dtype, function);
}

/// The same for the 16-bit formats alone.
template <typename Function>
auto with_packed16(DType dtype, Function&& function) {
  check_one_of<Types16>(dtype, "these values");
  return with_format_of(Types16{}, dtype, function);
}

inline DType wide_of(DType dtype) {
  return with_packed_format(dtype, [](auto format) { return decltype(format)::kWide; });
}

/// Bytes of E for m rows and k columns; fp32, which only the CPU packs, has the order of 16 bits.
inline int64_t meta_bytes_for(DType dtype, int64_t m, int64_t k) {
  return is_float8(dtype) ? meta8_bytes(m, k) : meta_bytes(m, k);
}
inline int64_t meta_offset_for(DType dtype, int64_t m, int64_t k, int64_t rows_m) {
  return is_float8(dtype) ? meta8_byte_offset(m, k, rows_m) : meta_byte_offset(m, k, rows_m);
}

/// Tokens after padding, for the gradient's packed form.
inline int64_t padded_tokens_for(DType dtype, int64_t tokens) {
  return round_up(tokens, is_float8(dtype) ? Format8::kTokenStep : Format16::kTokenStep);
}

}  // namespace sparse24
