// pack.h: transposable masks, packing by mask, packing by MVUE, and the way back.
//
// The sparse operand of every GEMM is a pair: `packed`, the kept half of the values, and `E`, their positions in the
// order the hardware reads (opaque outside common/metadata.h). `rows, cols` always mean the weight as stored.
#pragma once

#include <cstdint>
#include <optional>

#include "sparse24/quantize.h"
#include "sparse24/types.h"

namespace sparse24 {

/// Bytes of E for a sparse operand of m rows (padded to 64) and k dense columns (padded to 64).
SP24_API int64_t metadata_bytes(int64_t m, int64_t k);

/// Rows of a [tokens, features] gradient after padding for MVUE: a multiple of 8, one byte of metadata.
SP24_API int64_t padded_tokens(int64_t tokens);

/// The same for a packed operand of `dtype`: in 8 bits k is padded to 128 in E, and tokens to 32.
SP24_API int64_t metadata_bytes(DType dtype, int64_t m, int64_t k);
SP24_API int64_t padded_tokens(DType dtype, int64_t tokens);

/// One weight on its way into packed form. `w` is [rows, cols], row- or column-major, rows % 4 == cols % 4 == 0.
///
///   mask     uint16 [rows/4, cols/4], contiguous, bit 4*i + j set: element (i, j) of the block is kept
///   packed   out_dtype [rows, cols/2], contiguous;  E   metadata_bytes(rows, cols)
///   packed_t out_dtype [rows/2, cols], contiguous;  E_t metadata_bytes(cols, rows)
///
/// Null outputs are not written, in pairs (packed with E, packed_t with E_t).
///
/// Float8 out_dtype: packed_t is [cols, rows/2], along k like packed, and E and E_t have the order of 8 bits
/// (metadata_bytes(out_dtype, ..)). Values are w / *scale, rounded once; scale, amax and counters are those of
/// Float8Output, over all of w.
struct PackArgs {
  ConstMatrix w;
  uint16_t* mask = nullptr;  // read by pack_by_mask, written by search_and_pack and search_mask
  DType out_dtype = DType::kBFloat16;
  void* packed = nullptr;
  uint8_t* E = nullptr;
  void* packed_t = nullptr;
  uint8_t* E_t = nullptr;
  const float* scale = nullptr;  // these three with a float8 out_dtype only
  float* amax = nullptr;
  int64_t* counters = nullptr;
};

/// Search the transposable mask that keeps the most magnitude (exact over all 90 patterns of a block); packs nothing.
SP24_API void search_mask(const PackArgs* weights, int count, const Context& context);
/// Pack by the given masks. All weights of a call share dtype, out_dtype and layout class; they run in few launches.
SP24_API void pack_by_mask(const PackArgs* weights, int count, const Context& context);
/// Search and pack in one read of each weight.
SP24_API void search_and_pack(const PackArgs* weights, int count, const Context& context);

/// MVUE: dy [tokens, features], row- or column-major, pruned along tokens without bias.
///
///   seed     int64[2] in the memory of the context's device: the Philox key
///   packed   [padded_tokens/2, features] of dy's dtype, contiguous;  E metadata_bytes(features, padded_tokens)
///   tile_sums  optional: fp32 [ceil(tokens/64), features], sums of dy over 64 tokens each. Their sum is the gradient
///            of a bias
///   packed_dtype  absent: that of dy. Float8: packed is [features, padded_tokens/2], along tokens, and E has the order
///            of 8 bits. What is packed then is the 16-bit value / *scale, rounded at random without bias: by the 16
///            random bits of the neighbouring feature's group (feature ^ 1), which are independent of the group's own;
///            the second kept value takes their complement
///   float8   dy itself in e4m3, from the same read
struct MvueArgs {
  ConstMatrix dy;
  const int64_t* seed = nullptr;
  void* packed = nullptr;
  uint8_t* E = nullptr;
  float* tile_sums = nullptr;
  std::optional<DType> packed_dtype;
  const float* scale = nullptr;  // of packed values; float8 only. Null: 1
  Float8Output float8;
};
SP24_API void mvue_pack(const MvueArgs& args, const Context& context);

/// The dense form: out [rows, cols], row-major, zeros where nothing was kept. `transposed`: packed is packed_t, or a
/// gradient's. Float8 values are multiplied by *scale and rounded once to out's dtype.
struct UnpackArgs {
  const void* packed = nullptr;
  const uint8_t* E = nullptr;
  bool transposed = false;
  Matrix out;
  std::optional<DType> packed_dtype;  // absent: that of out, and values keep their bits
  const float* scale = nullptr;       // null: 1
};
SP24_API void unpack(const UnpackArgs& args, const Context& context);

/// mask uint16 [rows/4, cols/4] -> out, one byte (0 or 1) an element, [rows, cols] contiguous.
SP24_API void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols, const Context& context);

/// Count what is wrong, into `bad` (one int64 in device memory): blocks of `mask` that do not keep two in every row and
/// column; index pairs in E, for m rows and k columns, that are not strictly increasing.
SP24_API void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad, const Context& context);
SP24_API void count_bad_metadata(const uint8_t* E, int64_t m, int64_t k, int64_t* bad, const Context& context);
/// The same of a packed operand of `dtype`: float8 has an order of its own.
SP24_API void count_bad_metadata(DType dtype, const uint8_t* E, int64_t m, int64_t k, int64_t* bad,
                                 const Context& context);

}  // namespace sparse24
