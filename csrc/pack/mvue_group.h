// mvue_group.h: unbiased, minimum-variance 2:4 pruning of one group of four gradients, with one
// uniform number.
//
// Element i is kept with probability p_i and then scaled by 1/p_i; the sum of the p_i is 2. Of all
// such p_i, min(1, c |a_i|) has the least variance. With S the sum of magnitudes that means
//
//   level   no magnitude above S/2: p_i = 2 |a_i| / S, and every kept value becomes sign(a_i) S/2;
//   heavy   one above: it is kept as it is, and one of the other three, drawn with p_i = |a_i| / R
//           where R is the sum of their magnitudes, becomes sign(a_i) R.
//
// One formula does for both. Let base be the smaller of S/2 and R, R the sum of all but the
// largest: then p_i = min(1, |a_i| / base), and a kept value becomes sign(a_i) max(|a_i|, base).
//
// Systematic sampling lays the four p_i end to end, from element 0 on; of two points that are 1
// apart each falls into the interval of an element to keep. Measured in units of base from the
// right end, and from the left end, the points are
//
//   u         the second pick: the last i with |a_i| + ... + |a_3| > u base; 1 if only all reach it
//   1 - u     the first pick: the first i with |a_0| + ... + |a_i| >= (1 - u) base; 2 at most
//
// which needs no division, and no clipping to p_i <= 1 either: sums of magnitudes pass a point
// below base wherever clipped ones do.
//
// Exactness  u = (k + 1/2) 2^-16 from 16 random bits. u base is rounded towards zero, and the
//            first pick's point lies 2^-22 base below (1 - u) base: far less than the 2^-17 from
//            the grid of u to its ends, and more than rounding can do. So what holds for real
//            numbers holds here: the picks differ, and neither is a zero where two are not
//            (tests/cpp/mvue_test.cpp; docs/kernels/mvue.md has the proof).
//            Probabilities are right to within a step of the grid.
// Zeros      A group of zeros keeps places 0 and 1; a lone element is kept as it is beside a zero.
// Range      fp32 denormals are scaled up first, so that S/2 and u base are exact enough; finite
//            numbers with an infinite sum are scaled down. 16-bit denormals need nothing.
// Specials   Inf and NaN are kept as they are, so that they reach the weight gradient and a
//            GradScaler sees them.
// Source     arXiv 2404.01847, section on MVUE; the one formula and the draw are derived here anew.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/philox.h"

namespace sparse24 {

struct MvuePick {
  float first_value, second_value;
  uint32_t nibble;  // first index | second index << 2
};

/// The random bits of eight groups, those of tokens 8*octet to 8*octet + 7 and features 4*quad to
/// 4*quad + 3: a function of the seed and of these two numbers alone.
SP24_HD Philox4 mvue_random(const PhiloxKey& key, uint32_t octet, uint32_t quad) {
  return philox4x32_10({{quad, octet, key.stream0, key.stream1}}, key.key0, key.key1);
}

/// The 16 of them that belong to one group: `group` (0 or 1) says which four tokens of the octet,
/// `feature` (0 to 3) which feature of the quad.
SP24_HD uint32_t mvue_bits(const Philox4& random, int group, int feature) {
  return random.word[2 * group + feature / 2] >> (feature % 2 * 16) & 0xFFFFu;
}

/// 16 bits to round the group's kept values with, where they become 8 bits: those of the
/// neighbouring feature's draw. They are independent of the group's own draw, so the mean of each
/// element stays right; that two neighbours share their noise adds to no mean. The second kept
/// value takes the complement: where both are the same, their errors cancel in part.
SP24_HD uint32_t mvue_rounding_bits(const Philox4& random, int group, int feature) {
  return mvue_bits(random, group, feature ^ 1);
}

/// The uniform number of 16 random bits k: (k + 1/2) 2^-16.
SP24_HD float mvue_uniform(uint32_t k) {
  return bits_float(0x43000000u | k) - (128.0f - 0x1p-17f);  // 128 + k 2^-16, and all of it exact
}

/// a b towards zero, for a of at most 17 significant bits.
SP24_HD float multiply_down(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rz(a, b);
#else
  const double exact = static_cast<double>(a) * static_cast<double>(b);
  const float nearest = static_cast<float>(exact);
  return nearest > exact ? bits_float(float_bits(nearest) - 1u) : nearest;
#endif
}

/// a b + c, rounded once.
SP24_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

SP24_HD float smaller(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}

/// What decides about a group. The picks are told by signs:
///   second   3 if past3 < 0, else 2 if past2 < 0, else 1
///   first    0 if short0 >= 0, else 1 if short1 >= 0, else 2
struct MvueDraw {
  float base, sum;
  float past3, past2, short0, short1;
};

/// Right for groups with a finite sum. The order of additions is part of the contract: every
/// backend has it.
SP24_HD MvueDraw draw_group(const float (&a)[4], float u) {
  const float b0 = abs_float(a[0]), b1 = abs_float(a[1]), b2 = abs_float(a[2]),
              b3 = abs_float(a[3]);
  const float c = b0 + b1, d = b2 + b3, sum = c + d;
  // The sum of all but the largest is the smallest of four sums of three.
  const float base = smaller(0.5f * sum, smaller(d + smaller(b0, b1), c + smaller(b2, b3)));
  const float from_right = multiply_down(u, base);
  const float from_left = multiply_add(1.0f - 0x1p-22f, base, -from_right);
  return {base, sum, from_right - b3, from_right - d, b0 - from_left, c - from_left};
}

SP24_HD float with_sign_of(float magnitude, float x) {
  return bits_float((float_bits(magnitude) & 0x7fffffffu) | (float_bits(x) & 0x80000000u));
}

SP24_HD float pick_of_four(const float (&a)[4], uint32_t index) {
  const float low = index & 1u ? a[1] : a[0];
  const float high = index & 1u ? a[3] : a[2];
  return index & 2u ? high : low;
}

/// What a kept element becomes.
SP24_HD float kept_value(float a, float base) {
  return with_sign_of(abs_float(a) > base ? abs_float(a) : base, a);
}

SP24_HD MvuePick pick_group(const float (&a)[4], float u) {
  const MvueDraw draw = draw_group(a, u);
  const uint32_t second = draw.past3 < 0.0f ? 3u : draw.past2 < 0.0f ? 2u : 1u;
  const uint32_t first = draw.short0 >= 0.0f ? 0u : draw.short1 >= 0.0f ? 1u : 2u;
  return {kept_value(pick_of_four(a, first), draw.base),
          kept_value(pick_of_four(a, second), draw.base), first | (second << 2)};
}

/// A non-finite group: what is not finite comes first, then the lower index; all values unscaled.
SP24_HD MvuePick keep_nonfinite(const float (&a)[4]) {
  uint32_t kept = 0;
  int count = 0;
  SP24_UNROLL
  for (int want_nonfinite = 1; want_nonfinite >= 0; --want_nonfinite) {
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool nonfinite = (float_bits(a[i]) & 0x7f800000u) == 0x7f800000u;
      if (count < 2 && nonfinite == (want_nonfinite == 1)) kept |= 1u << i, ++count;
    }
  }
  const uint32_t first = kept & 1u ? 0u : kept & 2u ? 1u : 2u;
  const uint32_t second = kept & 8u ? 3u : kept & 4u ? 2u : 1u;
  return {pick_of_four(a, first), pick_of_four(a, second), first | (second << 2)};
}

/// Does the sum of magnitudes stay finite? It nearly always does; pick_group alone is then right
/// for 16-bit values.
SP24_HD bool has_finite_sum(float sum) { return sum < bits_float(0x7f800000u); }

/// Prune one group. u from mvue_uniform.
SP24_HD MvuePick mvue_group(const float (&a)[4], float u) {
  uint32_t bits = 0, largest = 0;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitude = float_bits(a[i]) & 0x7fffffffu;
    bits |= magnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float sum = (abs_float(a[0]) + abs_float(a[1])) + (abs_float(a[2]) + abs_float(a[3]));
  const bool tiny = sum < 0x1p-100f && (bits & 0xffffu) != 0;  // and no 16-bit values
  if (has_finite_sum(sum) && !tiny) return pick_group(a, u);
  if (largest >= 0x7f800000u) return keep_nonfinite(a);
  const float up = tiny ? 0x1p+64f : 0x1p-8f, down = tiny ? 0x1p-64f : 0x1p+8f;
  const float scaled[4] = {a[0] * up, a[1] * up, a[2] * up, a[3] * up};
  MvuePick pick = pick_group(scaled, u);
  pick.first_value *= down;
  pick.second_value *= down;
  return pick;
}

}  // namespace sparse24
