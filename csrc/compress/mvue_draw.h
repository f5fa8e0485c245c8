// mvue_draw.h: mvue_group for the GPU: the same picks and the same bits for nearly every group,
// without branches.
//
// A kernel that reads 2 bytes an element from HBM can afford some 20 instructions on it, and the
// GPU's pipe for comparisons, selects and logic half of that. So both cases of mvue_group.h, level
// and heavy, become one sequence of sums and comparisons, and conditional values are predicated
// additions (common/predicated.h). Positions are counted in the mantissa of a float: an addition to
// 2^23 + x leaves an integer in the low bits.
//
// Why the bits are those of mvue_group (tests/cpp/kernel_index_test.cpp compares them on millions
// of groups made to be difficult):
//
//   - Element i is heavy if and only if its magnitude exceeds the sum of the others, added in their
//     order; no two can. Leaving the heavy one out, three remain: r0, r1, r2. Leaving none out,
//     they are the first three. Their partial sums r01, r012 add in the order of draw_group's.
//   - The first draw compares r0 and r01 with u times the base: the sum of the three (heavy), or
//     half of all (level).
//   - draw_group's rules about zeros hold by themselves wherever rounding is relative:
//     v (1 - 2^-23) rounds below v and v (2 - 2^-23) below 2 v, so who comes last has all of the
//     sum. Two are left: a base of 0 (at most one element is not zero), and an element at index 2
//     that is zero must not be the second pick of a level group.
//   - The second pick of a heavy group is its heavy element. The level group's comparisons are
//     false there, because (u + 1) base is at least r012.
//   - Where rounding is not relative, or the sum is not finite, are_plain says so: the caller turns
//     to mvue_group.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/predicated.h"

namespace sparse24 {

constexpr float kCounter = 0x1p23f;    // plus an integer below 2^23: that integer in the low bits
constexpr float kPlainSum = 0x1p119f;  // sums from here on are not plain,
constexpr uint32_t kPlainBaseBits = 0x21800000u;  // nor are bases below 2^-60, except 0

struct MvueDraw {
  float drawn, other;  // what the two kept elements become
  bool other_first;    // their order
  float sum, base;
};

/// Adds the kept bits, times `unit`, to `kept`; unit is a power of two.
SP24_HD MvueDraw draw_plain(const float (&a)[4], uint32_t random, float unit, float& kept) {
  const float b0 = abs_float(a[0]), b1 = abs_float(a[1]), b2 = abs_float(a[2]),
              b3 = abs_float(a[3]);
  const float c1 = b0 + b1, c2 = c1 + b2, sum = c2 + b3;
  // Is the heavy element at index 0, up to 1, up to 2, anywhere?
  const bool heavy0 = b0 > (b1 + b2) + b3;
  const bool heavy1 = (b1 > (b0 + b2) + b3) | heavy0;
  const bool heavy2 = (b2 > c1 + b3) | heavy1;
  const bool heavy = (b3 > c2) | heavy2;
  const float r0 = heavy0 ? a[1] : a[0];
  const float r1 = heavy1 ? a[2] : a[1];
  const float r2 = heavy2 ? a[3] : a[2];
  const float r01 = abs_float(r0) + abs_float(r1), r012 = r01 + abs_float(r2);
  float base = 0.5f * sum;
  assign_if(heavy, base, r012);

  // mvue_uniform plus 1, put together from its bits: exact, as is the difference. Taking 2^-100
  // away makes a base of 0 negative, and so the target, below the zeros that are to be picked then;
  // it leaves plain bases as they are.
  const float u_plus_1 = bits_float(0x3F800001u | (random >> 9)), below = base - 0x1p-100f;
  const float target = (u_plus_1 - 1.0f) * below, next = u_plus_1 * below;
  const bool at0 = abs_float(r0) > target;
  const bool at1 = r01 > target;  // at 0 or 1
  float drawn = at1 ? r1 : r2, drawn_bit = 4.0f * unit;
  add_if(at1, drawn_bit, -2.0f * unit);
  assign_if(at0, drawn, r0);
  add_if(at0, drawn_bit, -1.0f * unit);

  // The other pick: at index 0, up to 1, up to 2?
  const bool other1 = heavy1 | (((r01 > next) & at0) & !heavy);
  const bool other2 = (heavy2 | other1) | (((r2 != 0.0f) & at1) & (r012 > next));
  float other = a[3], other_bit = 8.0f * unit;
  assign_if(other2, other, a[2]);
  add_if(other2, other_bit, -4.0f * unit);
  assign_if(other1, other, a[1]);
  add_if(other1, other_bit, -2.0f * unit);
  assign_if(heavy0, other, a[0]);
  add_if(heavy0, other_bit, -1.0f * unit);

  // A heavy element that is not behind the drawn one is before it: then the drawn one is a place
  // further than within r.
  const bool other_first = other_bit <= drawn_bit;
  kept += drawn_bit;
  kept += other_bit;
  add_if(other_first, kept, drawn_bit);

  set_magnitude_if(!heavy, other, base);
  // Adding 0 makes 0 of -0, in groups with fewer than two non-zero elements.
  set_magnitude_if(true, drawn, base);
  return {drawn + 0.0f, other + 0.0f, other_first, sum, base};
}

/// Are these two draws those of mvue_group?
SP24_HD bool are_plain(const MvueDraw& a, const MvueDraw& b) {
  const uint32_t base_a = float_bits(a.base) - 1u,
                 base_b = float_bits(b.base) - 1u;  // so that 0 counts as large
  const uint32_t smaller = base_a < base_b ? base_a : base_b;
  return (a.sum + b.sum < kPlainSum) & (smaller >= kPlainBaseBits);
}

}  // namespace sparse24
