// activation_pack.h: activations pruned to 2:4 along features by size, and packed along features and along tokens.
//
// Behind a (squared) ReLU most of h is zero, so two of four lose next to nothing: arXiv 2503.16672. Weights stay dense.
#pragma once

#include <cstdint>
#include <optional>

#include "sparse24/activation.h"
#include "sparse24/types.h"

namespace sparse24 {

/// h = act(u), rounded to u's dtype. Of each group of four neighbouring features of a token the two largest of max(u, 0)
/// are kept; equal ones: the lower index first; NaN of either sign is above Inf. -0 gives 0.
///
///   kind       kRelu or kSquaredRelu
///   u          [tokens, d_ff], row- or column-major, d_ff % 4 == 0, any number of tokens
///   packed     [tokens, d_ff/2] of u's dtype, contiguous;  E metadata_bytes(tokens, d_ff)
///   seed, packed_t, E_t   all or none: the pruned h as mvue_pack packs it, bit for bit; there are the sizes
///   packed_dtype  absent: that of u. Float8_e4m3fn: both packed forms and E have its sizes and orders, packed holds
///              h / *scale to nearest, packed_t what mvue_pack with this packed_dtype and scale makes of the pruned h
///   scale      e4m3 only: one float, written first, by a read more: that of h, as own_scale of QuantizeArgs
struct ActivationPackArgs {
  Activation kind = Activation::kSquaredRelu;
  ConstMatrix u;
  void* packed = nullptr;
  uint8_t* E = nullptr;
  const int64_t* seed = nullptr;
  void* packed_t = nullptr;
  uint8_t* E_t = nullptr;
  std::optional<DType> packed_dtype;
  float* scale = nullptr;
};
SP24_API void activation_pack(const ActivationPackArgs& args, const Context& context);

/// d_u = d_h act'(u) at the places that activation_pack keeps of this u, exactly 0 elsewhere.
///
///   d_h        as u
///   packed     [tokens, d_ff/2] of u's dtype: d_u at the kept places; its metadata is E of activation_pack
///   seed, packed_t, E_t, packed_dtype, scale   of the pruned d_u, as there; its scale is that of what is kept
///   tile_sums  optional: fp32 [ceil(tokens/64), d_ff], sums of the pruned d_u, as in MvueArgs
struct ActivationPackBackwardArgs {
  Activation kind = Activation::kSquaredRelu;
  ConstMatrix d_h;
  ConstMatrix u;
  void* packed = nullptr;
  const int64_t* seed = nullptr;
  void* packed_t = nullptr;
  uint8_t* E_t = nullptr;
  float* tile_sums = nullptr;
  std::optional<DType> packed_dtype;
  float* scale = nullptr;
};
SP24_API void activation_pack_backward(const ActivationPackBackwardArgs& args, const Context& context);

}  // namespace sparse24
