// functions.h: activations of one fp32 value, with their derivatives.
//
//   silu       x sigmoid(x)
//   gelu       x Phi(x), Phi by erf
//   gelu_tanh  x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3): equal to 0.5 x (1 + tanh z),
//              without its cancellation
//   relu       max(x, 0), derivative 0 at 0
//   squared_relu  max(x, 0)^2
//   identity   x
//
// NaN stays NaN everywhere. With kFor16Bits a function may be coarser, by a small part of the last
// place of a 16-bit result; in the tail of GELU it is still better than fp32 arithmetic, which
// suffers from cancellation there.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "sparse24/activation.h"

namespace sparse24 {

struct ValueAndSlope {
  float value;
  float slope;
};

struct Sigmoid {
  float value;
  float complement;  // 1 - value, without cancellation where value is close to 1
};

/// exp(x) to a few ulp; `kFor16Bits` on the GPU: to 2^-20 or so, in two instructions, which no
/// result that is rounded to 16 bits shows.
template <bool kFor16Bits>
SP24_HD float exponential(float x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kFor16Bits) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));  // log2(e)
    return power;
  }
#endif
  return expf(x);
}

/// 1 / (1 + exp(-x)) and 1 minus it, to a few ulp.
template <bool kFor16Bits>
SP24_HD Sigmoid sigmoid(float x) {
  const float decayed = exponential<kFor16Bits>(-x);
#if defined(__CUDA_ARCH__)
  float value;
  if constexpr (kFor16Bits) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(1.0f + decayed));
  } else {
    value = __fdividef(1.0f, 1.0f + decayed);  // one instruction and 2 ulp; 0 past 2^126, as wanted
  }
#else
  const float value = 1.0f / (1.0f + decayed);
#endif
  return {value, value == 0.0f ? 1.0f : decayed * value};
}

/// log(Phi(x) / Phi(-x)): the sigmoid of it is Phi(x). An odd polynomial, fitted so that Phi
/// is off by 2^-14 of itself for |x| < 3, and by more in the tail (2^-7 at 5.5), where 16-bit
/// results are denormal or nearly so. It rises everywhere, so both limits are right. A tenth of the
/// work of erfc.
SP24_HD float normal_logit(float x) {
  constexpr float kCoefficients[] = {1.59558904f,      0.0729680136f, -0.000208145022f,
                                     -8.20214773e-05f, 5.209336e-06f, -1.43909972e-07f};
  const float square = x * x;
  float sum = 1.53367352e-09f;
  SP24_UNROLL
  for (int i = 5; i >= 0; --i) sum = fmaf(sum, square, kCoefficients[i]);
  return x * sum;
}

/// The activation and its derivative at x. Callers that need one of them leave the other to the
/// optimizer.
template <Activation kKind, bool kFor16Bits = false>
SP24_HD ValueAndSlope activate(float x) {
  if constexpr (kKind == Activation::kSilu) {
    const Sigmoid s = sigmoid<kFor16Bits>(x);
    // Where the sigmoid underflows to 0, so does the product; -inf * 0 would give NaN.
    const float value = s.value == 0.0f ? 0.0f : x * s.value;
    // Likewise inf * 0 in the slope at inf, which is 1.
    return {value, s.value + (s.complement == 0.0f ? 0.0f : value * s.complement)};
  } else if constexpr (kKind == Activation::kGelu) {
    constexpr float kInvSqrt2 = 0.70710678118654752f, kInvSqrt2Pi = 0.39894228040143268f;
    const float phi =
        kFor16Bits ? sigmoid<kFor16Bits>(normal_logit(x)).value : 0.5f * erfcf(-x * kInvSqrt2);
    const float density = kInvSqrt2Pi * exponential<kFor16Bits>(-0.5f * x * x);
    return {phi == 0.0f ? 0.0f : x * phi, phi + (density == 0.0f ? 0.0f : x * density)};
  } else if constexpr (kKind == Activation::kGeluTanh) {
    constexpr float kLinear = 2 * 0.79788456080286536f, kCubic = 0.044715f;
    const float square = x * x;
    float twice_z, dz;  // 2 z and its derivative
    if constexpr (kFor16Bits) {
      twice_z = x * fmaf(kLinear * kCubic, square, kLinear);
      dz = fmaf(3.0f * kLinear * kCubic, square, kLinear);
    } else {
      twice_z = kLinear * x * (1.0f + kCubic * square);
      dz = kLinear * (1.0f + 3.0f * kCubic * square);
    }
    const Sigmoid s = sigmoid<kFor16Bits>(twice_z);
    const float value = s.value == 0.0f ? 0.0f : x * s.value;
    const float tail = s.complement == 0.0f ? 0.0f : value * s.complement;
    return {value, s.value + (tail == 0.0f ? 0.0f : tail * dz)};
  } else if constexpr (kKind == Activation::kRelu) {
    return {x > 0.0f ? x : (x == x ? 0.0f : x), x > 0.0f ? 1.0f : 0.0f};
  } else if constexpr (kKind == Activation::kIdentity) {
    return {x, 1.0f};
  } else {
    const float positive = x > 0.0f ? x : (x == x ? 0.0f : x);
    return {positive * positive, 2.0f * positive};
  }
}

/// Gated: d_gate and d_up of h = act(gate) * up, and h itself.
struct GatedBackward {
  float d_gate, d_up, h;
};

template <Activation kKind, bool kFor16Bits = false>
SP24_HD GatedBackward gated_backward(float d_h, float gate, float up) {
  const ValueAndSlope act = activate<kKind, kFor16Bits>(gate);
  return {d_h * up * act.slope, d_h * act.value, act.value * up};
}

/// Calls function.template operator()<kind>() for the given kind.
template <typename Function>
void with_activation(Activation kind, Function&& function) {
  switch (kind) {
    case Activation::kSilu: return function.template operator()<Activation::kSilu>();
    case Activation::kGelu: return function.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh: return function.template operator()<Activation::kGeluTanh>();
    case Activation::kRelu: return function.template operator()<Activation::kRelu>();
    case Activation::kSquaredRelu: return function.template operator()<Activation::kSquaredRelu>();
    case Activation::kIdentity: return function.template operator()<Activation::kIdentity>();
  }
}

}  // namespace sparse24
