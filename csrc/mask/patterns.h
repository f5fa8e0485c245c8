// patterns.h: all 90 transposable patterns of a 4x4 block, and the gap between the best and the
// second best.
//
// The search itself does not need the list (block_search.h). The gap statistic of the flip-rate
// monitor does: blocks whose two best patterns are nearly level are those that oscillate.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "mask/block_search.h"

namespace sparse24 {

constexpr int kPatterns = 90;

struct PatternTable {
  uint16_t mask[kPatterns];
};

/// Every choice of row pairs with two in each column, in ascending order of the rows' bits.
constexpr PatternTable make_pattern_table() {
  constexpr uint32_t kPairs[6] = {0x3, 0x5, 0x6, 0x9, 0xA, 0xC};
  PatternTable table{};
  int count = 0;
  for (uint32_t r0 : kPairs)
    for (uint32_t r1 : kPairs)
      for (uint32_t r2 : kPairs)
        for (uint32_t r3 : kPairs) {
          bool two_each = true;
          for (int j = 0; j < 4; ++j)
            two_each =
                two_each && ((r0 >> j & 1) + (r1 >> j & 1) + (r2 >> j & 1) + (r3 >> j & 1)) == 2;
          if (two_each)
            table.mask[count++] = static_cast<uint16_t>(r0 | r1 << 4 | r2 << 8 | r3 << 12);
        }
  return table;
}

constexpr PatternTable kPatternTable = make_pattern_table();
static_assert(kPatternTable.mask[0] == 0xCC33 && kPatternTable.mask[kPatterns - 1] == 0x33CC,
              "the table holds exactly 90 patterns, in order");

/// Sum of the kept magnitudes, row by row in fp32.
SP24_HD float kept_sum(const float (&w)[4][4], uint16_t mask) {
  float sum = 0.0f;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) sum += (mask >> (4 * i + j)) & 1 ? w[i][j] : 0.0f;
  }
  return sum;
}

/// L1 gap between the best and the second-best pattern of a block, at least 0.
SP24_HD float block_gap(const float (&w)[4][4], const PatternTable& table) {
  float magnitude[4][4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) magnitude[i][j] = ranked_magnitude(w[i][j]);
  }
  float best = -1.0f, second = -1.0f;
  for (int p = 0; p < kPatterns; ++p) {
    const float sum = kept_sum(magnitude, table.mask[p]);
    if (sum > best) {
      second = best;
      best = sum;
    } else if (sum > second) {
      second = sum;
    }
  }
  return best - second;
}

}  // namespace sparse24
