// mvue_group.h: unbiased, minimum-variance 2:4 pruning of one group of four gradients, with one
// uniform number.
//
// Element i is kept with probability p_i (their sum is 2) and then scaled by 1/p_i; p_i = min(1, c
// |a_i|) has the least variance. With S the sum of magnitudes that means
//
//   level   no magnitude above S/2: p_i = 2 |a_i| / S, and every kept value becomes sign(a_i) S/2;
//   heavy   one above: it is kept as it is, and one of the other three, drawn with p_i = |a_i| / R
//   where R is the sum
//           of their magnitudes, becomes sign(a_i) R.
//
// Systematic sampling needs one uniform u: with running sums C_i of p, the picks are the first C_i
// > u and the first later C_i > u + 1. Here sums of magnitudes are compared with u S/2 and (u + 1)
// S/2, so there is no division at all.
//
// Exactness  u = (k + 1/2) 2^-22 from 22 random bits: u and u + 1 are exact in fp32, and never 0, 1
// or 2. The last
//            non-zero element ends the running sum by decree, whatever rounding left of it, and the
//            first pick leaves a non-zero element for the second: always two picks where two are
//            non-zero, and never a zero one.
// Range      Groups whose sum is tiny or huge are scaled by a power of two first: denormals stay
// exact, sums of finite
//            numbers finite.
// Specials   Inf and NaN are kept as they are, so that they reach the weight gradient and a
// GradScaler sees them. Source     arXiv 2404.01847, section on MVUE; the level case and the
// one-uniform draw are derived there anew.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/philox.h"

namespace sparse24 {

struct MvuePick {
  float first_value, second_value;
  uint32_t nibble;  // first index | second index << 2
};

/// The uniform number of 32 random bits: (k + 1/2) 2^-22 with k their upper 22.
SP24_HD float mvue_uniform(uint32_t random) {
  return static_cast<float>(2u * (random >> 10) + 1u) * 0x1p-23f;
}

/// The four uniforms of groups (token_group, features 4*quad .. 4*quad + 3): a function of the seed
/// and these alone.
SP24_HD Philox4 mvue_random(const PhiloxKey& key, uint32_t token_group, uint32_t feature_quad) {
  return philox4x32_10({{feature_quad, token_group, key.stream0, key.stream1}}, key.key0, key.key1);
}

SP24_HD float with_sign_of(float magnitude, float x) {
  return bits_float((float_bits(magnitude) & 0x7fffffffu) | (float_bits(x) & 0x80000000u));
}

SP24_HD float pick_of_four(const float (&a)[4], uint32_t index) {
  const float low = index & 1u ? a[1] : a[0];
  const float high = index & 1u ? a[3] : a[2];
  return index & 2u ? high : low;
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

/// The draw proper, for magnitudes whose sum is neither tiny, huge nor non-finite. Values carry the
/// sign of a.
SP24_HD MvuePick draw_group(const float (&a)[4], float u) {
  const float b0 = abs_float(a[0]), b1 = abs_float(a[1]), b2 = abs_float(a[2]),
              b3 = abs_float(a[3]);

  // The largest (the first of equals) and the other three, in order.
  uint32_t heavy = 0;
  float top = b0;
  if (b1 > top) top = b1, heavy = 1;
  if (b2 > top) top = b2, heavy = 2;
  if (b3 > top) top = b3, heavy = 3;
  const float r0 = heavy == 0 ? b1 : b0;
  const float r1 = heavy <= 1 ? b2 : b1;
  const float r2 = heavy <= 2 ? b3 : b2;
  const float rest = (r0 + r1) + r2;

  uint32_t first, second;
  float first_scale, second_scale;
  if (top > rest) {  // heavy
    const float target = u * rest;
    // Past the last non-zero there is nothing to pick: stop there even if rounding left the sum at
    // the target.
    const bool at0 = r0 > target || (r1 == 0.0f && r2 == 0.0f);
    const bool at1 = r0 + r1 > target || r2 == 0.0f;
    const uint32_t among_rest = at0 ? 0u : at1 ? 1u : 2u;
    const uint32_t other = among_rest + (among_rest >= heavy ? 1u : 0u);
    first = heavy < other ? heavy : other;
    second = heavy < other ? other : heavy;
    first_scale = first == heavy ? top : rest;
    second_scale = second == heavy ? top : rest;
  } else {  // level
    const float c1 = b0 + b1, c2 = c1 + b2, half = 0.5f * (c2 + b3);
    const float target = u * half, next = (u + 1.0f) * half;
    const bool zero3 = b3 == 0.0f, zero2 = b2 == 0.0f, zero1 = b1 == 0.0f;
    // The first pick must leave a non-zero element behind it.
    const bool one_left_after_0 =
        static_cast<int>(!zero1) + static_cast<int>(!zero2) + static_cast<int>(!zero3) == 1;
    const bool one_left_after_1 = static_cast<int>(!zero2) + static_cast<int>(!zero3) == 1;
    const bool first_is_0 = b0 != 0.0f && (b0 > target || one_left_after_0);
    const bool first_is_1 = b1 != 0.0f && (c1 > target || one_left_after_1);
    first = first_is_0 ? 0u : first_is_1 ? 1u : 2u;
    const bool second_is_1 = first < 1u && b1 != 0.0f && (c1 > next || (zero2 && zero3));
    const bool second_is_2 = first < 2u && b2 != 0.0f && (c2 > next || zero3);
    second = second_is_1 ? 1u : second_is_2 ? 2u : 3u;
    first_scale = second_scale = half;
  }
  const float first_a = pick_of_four(a, first), second_a = pick_of_four(a, second);
  // A zero stays zero: only groups with fewer than two non-zero elements pick one, to fill the
  // second place.
  return {first_a == 0.0f ? 0.0f : with_sign_of(first_scale, first_a),
          second_a == 0.0f ? 0.0f : with_sign_of(second_scale, second_a), first | (second << 2)};
}

/// Prune one group. u from mvue_uniform.
SP24_HD MvuePick mvue_group(const float (&a)[4], float u) {
  const float sum = (abs_float(a[0]) + abs_float(a[1])) + (abs_float(a[2]) + abs_float(a[3]));
  if (sum > 0x1p-60f && sum < 0x1p+120f) return draw_group(a, u);
  // Rare from here on. 2^64 lifts every denormal into the normal range; 2^-8 brings four times the
  // largest fp32 down.
  if (sum == 0.0f) return {0.0f, 0.0f, 0x4u};
  bool finite = true;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) finite = finite && (float_bits(a[i]) & 0x7f800000u) != 0x7f800000u;
  if (!finite) return keep_nonfinite(a);
  const bool tiny = sum < 1.0f;
  const float up = tiny ? 0x1p+64f : 0x1p-8f, down = tiny ? 0x1p-64f : 0x1p+8f;
  const float scaled[4] = {a[0] * up, a[1] * up, a[2] * up, a[3] * up};
  MvuePick pick = draw_group(scaled, u);
  pick.first_value *= down;
  pick.second_value *= down;
  // What 2^-8 sent to zero beside a huge neighbour is kept as it was.
  const float first_a = pick_of_four(a, pick.nibble & 3u),
              second_a = pick_of_four(a, pick.nibble >> 2);
  if (pick.first_value == 0.0f && first_a != 0.0f) pick.first_value = first_a;
  if (pick.second_value == 0.0f && second_a != 0.0f) pick.second_value = second_a;
  return pick;
}

}  // namespace sparse24
