// block_search.h: the transposable 2:4 mask of one 4x4 block that keeps the most magnitude, exact over all 90 patterns.
//
// A row (a, b, c, d) of magnitudes has three coordinates, v = (a+b-c-d, a+c-b-d, a+d-b-c). Each of its six ways to keep
// two is half the row's sum plus or minus half of one coordinate. Two kept in every column means that the four rows'
// choices cancel in pairs: rows i and j keep complementary halves along one coordinate, and so do the other two. So
//
//   best = sum / 2 + 1/2 max over the pairings {i,j},{k,l} of (max_c |v_i - v_j|[c] + max_c |v_k - v_l|[c])
//
// and about 100 instructions find it. Differences are fp32, in one fixed order on CPU and GPU.
//
// Ties     The first of equals wins, in this order: pairings (0,1)(2,3), then (0,2)(1,3), then (0,3)(1,2); within a
//          pair the coordinate {0,1}|{2,3}, then {0,2}|{1,3}, then {0,3}|{1,2}; at difference 0 the pair's first row
//          keeps the half that holds column 0. An all-equal block therefore gets 0xC3C3.
// Specials Magnitudes above 2^120, Inf among them, count as 2^120 and NaN as 2^121: nothing overflows, and what is not
//          finite is kept and stays visible. -0 counts as 0. Always 8 kept, two in every row and column.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"

namespace sparse24 {

constexpr uint16_t kFirstPattern = 0xC3C3;         // the pattern of a block without preferences
constexpr uint32_t kLargeBits = 0x7B800000u;       // 2^120
constexpr uint32_t kNanRankBits = 0x7C000000u;     // 2^121
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

/// How two rows part: the largest |difference| of their coordinates, and which half the first row keeps.
struct PairChoice {
  float gain;
  uint32_t kept;  // four bits, for the pair's first row; the second keeps the complement
};

SP24_HD PairChoice part_rows(const RowCoordinates& first, const RowCoordinates& second) {
  const float d0 = first.v[0] - second.v[0];
  const float d1 = first.v[1] - second.v[1];
  const float d2 = first.v[2] - second.v[2];
  float best = d0;
  uint32_t half = 0x3u;  // columns 0, 1
  if (abs_float(d1) > abs_float(best)) best = d1, half = 0x5u;
  if (abs_float(d2) > abs_float(best)) best = d2, half = 0x9u;
  return {abs_float(best), best >= 0.0f ? half : half ^ 0xFu};
}

SP24_HD uint16_t pair_bits(const PairChoice& choice, int first_row, int second_row) {
  return static_cast<uint16_t>((choice.kept << (4 * first_row)) | ((choice.kept ^ 0xFu) << (4 * second_row)));
}

/// The mask of a block of magnitudes, all at most 2^121. Bit 4*i + j: element (i, j) is kept.
SP24_HD uint16_t search_ranked_block(const float (&w)[4][4]) {
  RowCoordinates row[4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float sum_left = w[i][0] + w[i][1], sum_right = w[i][2] + w[i][3];
    const float step_left = w[i][0] - w[i][1], step_right = w[i][2] - w[i][3];
    row[i] = {{sum_left - sum_right, step_left + step_right, step_left - step_right}};
  }
  const PairChoice p01 = part_rows(row[0], row[1]), p23 = part_rows(row[2], row[3]);
  const PairChoice p02 = part_rows(row[0], row[2]), p13 = part_rows(row[1], row[3]);
  const PairChoice p03 = part_rows(row[0], row[3]), p12 = part_rows(row[1], row[2]);

  float best = p01.gain + p23.gain;
  uint16_t mask = pair_bits(p01, 0, 1) | pair_bits(p23, 2, 3);
  const float gain_02 = p02.gain + p13.gain, gain_03 = p03.gain + p12.gain;
  if (gain_02 > best) best = gain_02, mask = pair_bits(p02, 0, 2) | pair_bits(p13, 1, 3);
  if (gain_03 > best) best = gain_03, mask = pair_bits(p03, 0, 3) | pair_bits(p12, 1, 2);
  return mask;
}

/// The mask of a block of any fp32 values.
SP24_HD uint16_t search_block(const float (&w)[4][4]) {
  float magnitude[4][4];
  float total = 0.0f;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) magnitude[i][j] = abs_float(w[i][j]);
    total += (magnitude[i][0] + magnitude[i][1]) + (magnitude[i][2] + magnitude[i][3]);
  }
  // One test for the whole block: its sum is at most 2^120 only if no magnitude needs the map (NaN fails the test).
  if (!(total <= bits_float(kLargeBits))) {
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      SP24_UNROLL
      for (int j = 0; j < 4; ++j) magnitude[i][j] = ranked_magnitude(w[i][j]);
    }
  }
  return search_ranked_block(magnitude);
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
