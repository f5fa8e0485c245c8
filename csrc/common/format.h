// format.h: what each packed format is and can do. One row a format; its twin in Python is
// sparse24/formats.py, and a test compares the two through the binding.
//
//   kPerVector   elements of 16 bytes
//   kMetaTileK   extent along k of a block of E, whose order kMetaOffset gives (metadata.h)
//   kMnMajor     may a packed operand also lie along m ([k/2, m])? wgmma reads 8-bit ones along k
//   only kScaled      values are x / scale, and products multiply by the scale again kTokenStep
//   tokens are padded to a multiple of this where k is tokens
#pragma once

#include <cstdint>

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

template <DType kDType>
struct Format;
template <>
struct Format<DType::kBFloat16> : Format16 {
  using Storage = BFloat16;
  static constexpr DType kDType = DType::kBFloat16;
};
template <>
struct Format<DType::kFloat16> : Format16 {
  using Storage = Float16;
  static constexpr DType kDType = DType::kFloat16;
};
template <>
struct Format<DType::kFloat8E4M3> : Format8 {
  using Storage = Float8E4M3;
  static constexpr DType kDType = DType::kFloat8E4M3;
};
template <>
struct Format<DType::kFloat8E5M2> : Format8 {
  using Storage = Float8E5M2;
  static constexpr DType kDType = DType::kFloat8E5M2;
};

constexpr DType kPackedFormats[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3,
                                    DType::kFloat8E5M2};

/// Calls function(Format<dtype>{}); throws for a dtype that is no packed format of the GPU.
template <typename Function>
auto with_packed_format(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16: return function(Format<DType::kBFloat16>{});
    case DType::kFloat16: return function(Format<DType::kFloat16>{});
    case DType::kFloat8E4M3: return function(Format<DType::kFloat8E4M3>{});
    case DType::kFloat8E5M2: return function(Format<DType::kFloat8E5M2>{});
    default: break;
  }
  throw Error(
      concat("a packed operand must be bfloat16, float16, float8_e4m3fn or float8_e5m2, got ",
             name_of(dtype)));
}

/// The same for the 16-bit formats alone.
template <typename Function>
auto with_packed16(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kBFloat16: return function(Format<DType::kBFloat16>{});
    case DType::kFloat16: return function(Format<DType::kFloat16>{});
    default: break;
  }
  throw Error(concat("these values must be bfloat16 or float16, got ", name_of(dtype)));
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
