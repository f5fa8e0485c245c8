// activation.h: activations of a feed-forward layer, gated and plain, forward and backward.
#pragma once

#include <cstdint>
#include <optional>

#include "sparse24/quantize.h"
#include "sparse24/types.h"

namespace sparse24 {

/// kGelu is the erf form, kGeluTanh the tanh approximation, kSquaredRelu is relu(x)^2. kIdentity gives x back: a copy
/// from one layout to another.
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kSquaredRelu = 4, kIdentity = 5 };
constexpr Activation kLastActivation = Activation::kIdentity;

/// Gated: gate_up [tokens, 2*d_ff] holds [gate | up] and h = act(gate) * up, [tokens, d_ff].
/// Plain (`gated` false): gate_up is [tokens, d_ff] and h = act(gate_up).
/// Every matrix is row- or column-major, each on its own; all share one dtype; fp32 arithmetic inside.
///
/// Further outputs of the same read are made from h as it is rounded to gate_up's dtype, whether h is stored or not:
/// `float8` (h8, h8_t), and h MVUE-packed along tokens, bit-equal to mvue_pack of h, for weight gradients that prune the
/// layer's input in place of dy.
struct ActivationArgs {
  Activation kind = Activation::kSilu;
  bool gated = true;
  ConstMatrix gate_up;
  Matrix h;  // its extents and dtype count even where data is null: not written
  Float8Output float8;
  const int64_t* seed = nullptr;  // these five as in MvueArgs
  void* packed = nullptr;
  uint8_t* E = nullptr;
  std::optional<DType> packed_dtype;
  const float* scale = nullptr;
};
SP24_API void activation_forward(const ActivationArgs& args, const Context& context);

/// d_gate_up from d_h and gate_up; `h` (when its data is not null) is recomputed in the same pass. With `packed` and `E`,
/// d_gate_up is also MVUE-packed for the weight gradient, bit-equal to mvue_pack(d_gate_up, seed), and `tile_sums`, if
/// given, are those of that call.
struct ActivationBackwardArgs {
  Activation kind = Activation::kSilu;
  bool gated = true;
  ConstMatrix d_h;
  ConstMatrix gate_up;
  Matrix d_gate_up;
  Matrix h;                       // optional
  const int64_t* seed = nullptr;  // int64[2] on the device; with packed
  void* packed = nullptr;         // optional: [padded_tokens/2, d_gate_up.cols]
  uint8_t* E = nullptr;
  float* tile_sums = nullptr;  // optional, with packed: fp32 [ceil(tokens/64), d_gate_up.cols]
  // As in MvueArgs. With float8.x8 or float8.x8_t, d_gate_up.data may be null: all is made of the gradient as it is
  // rounded to d_h's dtype.
  std::optional<DType> packed_dtype;
  const float* scale = nullptr;
  Float8Output float8;
};
SP24_API void activation_backward(const ActivationBackwardArgs& args, const Context& context);

}  // namespace sparse24
