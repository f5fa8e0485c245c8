// block_search.h: the transposable 2:4 mask of one 4x4 block that keeps the most magnitude, exact
// over all 90 patterns.
//
// A row (a, b, c, d) of magnitudes has three coordinates, v = (a+b-c-d, a+c-b-d, a+d-b-c). Each of
// its six ways to keep two is half the row's sum plus or minus half of one coordinate. Two kept in
// every column means that the four rows' choices cancel in pairs: rows i and j keep complementary
// halves along one coordinate, and so do the other two. So
//
//   best = sum / 2 + 1/2 max over the pairings {i,j},{k,l} of
//                            (max_c |v_i - v_j|[c] + max_c |v_k - v_l|[c])
//
// and about 100 instructions find it. Differences are fp32, in one fixed order on CPU and GPU.
//
// Ties     The first of equals wins, in this order: pairings (0,1)(2,3), then (0,2)(1,3), then
//          (0,3)(1,2); within a pair the coordinate {0,1}|{2,3}, then {0,2}|{1,3}, then
//          {0,3}|{1,2}; at difference 0 the pair's first row keeps the half that holds column 0. An
//          all-equal block therefore gets 0xC3C3.
// Specials Magnitudes above 2^120, Inf among them, count as 2^120 and NaN as 2^121: nothing
//          overflows, and what is not finite is kept and stays visible. -0 counts as 0. Always 8
//          kept, two in every row and column.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"

namespace sparse24 {

constexpr uint16_t kFirstPattern = 0xC3C3;      // the pattern of a block without preferences
constexpr uint32_t kLargeBits = 0x7B800000u;    // 2^120
constexpr uint32_t kNanRankBits = 0x7C000000u;  // 2^121
constexpr uint32_t kInfinityBits = 0x7F800000u;

/// The magnitude that a value is ranked by.
SP24_HD float ranked_magnitude(float x) {
  const uint32_t bits = float_bits(x) & 0x7fffffffu;
  if (bits > kInfinityBits) return bits_float(kNanRankBits);
  return bits_float(bits < kLargeBits ? bits : kLargeBits);
}

struct RowCoordinates {
  float v[3];
};

/// How two rows part: the differences of their coordinates, first row minus second.
struct RowDifference {
  float d[3];
};

SP24_HD RowDifference difference(const RowCoordinates& first, const RowCoordinates& second) {
  return {{first.v[0] - second.v[0], first.v[1] - second.v[1], first.v[2] - second.v[2]}};
}

SP24_HD float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);  // one instruction, and no operand is NaN
#else
  return a > b ? a : b;
#endif
}

/// What parting two rows gains: the largest |difference|.
SP24_HD float gain(const RowDifference& difference) {
  return larger(larger(abs_float(difference.d[0]), abs_float(difference.d[1])),
                abs_float(difference.d[2]));
}

SP24_HD RowDifference choose(bool take_a, const RowDifference& a, const RowDifference& b) {
  return {{take_a ? a.d[0] : b.d[0], take_a ? a.d[1] : b.d[1], take_a ? a.d[2] : b.d[2]}};
}

/// Four bits: what the first of two rows keeps; the second keeps the complement.
SP24_HD uint32_t kept_by_first(const RowDifference& difference) {
  float best = difference.d[0];
  uint32_t half = 0x3u;  // columns 0, 1
  if (abs_float(difference.d[1]) > abs_float(best)) best = difference.d[1], half = 0x5u;
  if (abs_float(difference.d[2]) > abs_float(best)) best = difference.d[2], half = 0x9u;
  return best >= 0.0f ? half : half ^ 0xFu;
}

/// The bits of two rows that part: `kept` for the first, its complement for the second.
SP24_HD uint32_t pair_bits(uint32_t kept, int first_row, int second_row) {
  return (kept << (4 * first_row)) +
         ((0xFu - kept) << (4 * second_row));  // sums, which fuse into multiply-adds
}

SP24_HD RowCoordinates row_coordinates(float a, float b, float c, float d) {
  const float sum_left = a + b, sum_right = c + d, step_left = a - b, step_right = c - d;
  return {{sum_left - sum_right, step_left + step_right, step_left - step_right}};
}

/// The mask of four rows. Bit 4*i + j: element (i, j) is kept.
SP24_HD uint16_t search_rows(const RowCoordinates (&row)[4]) {
  // The first pair is row 0 and its partner; `rest` are the other two.
  const RowDifference with_1 = difference(row[0], row[1]), rest_1 = difference(row[2], row[3]);
  const RowDifference with_2 = difference(row[0], row[2]), rest_2 = difference(row[1], row[3]);
  const RowDifference with_3 = difference(row[0], row[3]), rest_3 = difference(row[1], row[2]);
  const float gain_1 = gain(with_1) + gain(rest_1);
  const float gain_2 = gain(with_2) + gain(rest_2);
  const float gain_3 = gain(with_3) + gain(rest_3);

  // Only the winning pairing needs to know which halves are kept.
  const bool is_2 = gain_2 > gain_1, is_3 = gain_3 > larger(gain_1, gain_2);
  const uint32_t kept = kept_by_first(choose(is_3, with_3, choose(is_2, with_2, with_1)));
  const uint32_t kept_rest = kept_by_first(choose(is_3, rest_3, choose(is_2, rest_2, rest_1)));
  const uint32_t mask_1 = pair_bits(kept, 0, 1) + pair_bits(kept_rest, 2, 3);
  const uint32_t mask_2 = pair_bits(kept, 0, 2) + pair_bits(kept_rest, 1, 3);
  const uint32_t mask_3 = pair_bits(kept, 0, 3) + pair_bits(kept_rest, 1, 2);
  return static_cast<uint16_t>(is_3 ? mask_3 : is_2 ? mask_2 : mask_1);
}

/// The coordinates of a block's rows, taken as they are, and the sum of its magnitudes.
SP24_HD float plain_rows(const float (&w)[4][4], RowCoordinates (&row)[4]) {
  float total = 0.0f;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float a = abs_float(w[i][0]), b = abs_float(w[i][1]), c = abs_float(w[i][2]),
                d = abs_float(w[i][3]);
    row[i] = row_coordinates(a, b, c, d);
    total += (a + b) + (c + d);
  }
  return total;
}

/// A sum of magnitudes is at most 2^120 only if none of them needs the map of specials (NaN fails
/// the test).
SP24_HD bool needs_ranking(float total) { return !(total <= bits_float(kLargeBits)); }

/// The mask of a block of any fp32 values.
SP24_HD uint16_t search_block(const float (&w)[4][4]) {
  RowCoordinates row[4];
  if (needs_ranking(plain_rows(w, row))) {
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      row[i] = row_coordinates(ranked_magnitude(w[i][0]), ranked_magnitude(w[i][1]),
                               ranked_magnitude(w[i][2]), ranked_magnitude(w[i][3]));
    }
  }
  return search_rows(row);
}

/// Two kept in every row and in every column?
SP24_HD bool is_transposable(uint16_t mask) {
  bool ok = true;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    int in_row = 0, in_column = 0;
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) {
      in_row += (mask >> (4 * i + j)) & 1;
      in_column += (mask >> (4 * j + i)) & 1;
    }
    ok = ok && in_row == 2 && in_column == 2;
  }
  return ok;
}

}  // namespace sparse24
