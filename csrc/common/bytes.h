// bytes.h: 8-bit values, four in a 32-bit word (lower addresses in lower bytes), and 8x8 patches.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/pair16.h"

namespace sparse24 {

/// 8x8 values: line i, as two words of four neighbours along the line.
struct Patch8 {
  uint32_t line[8][2];
};

/// Four lines of one word each become four lines of the other direction: eight byte permutations.
SP24_HD void transpose_words(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t low01 = select_bytes(in[0], in[1], 0x5140u);  // bytes 0, 1 of lines 0 and 1
  const uint32_t low23 = select_bytes(in[2], in[3], 0x5140u);
  const uint32_t high01 = select_bytes(in[0], in[1], 0x7362u);  // bytes 2, 3
  const uint32_t high23 = select_bytes(in[2], in[3], 0x7362u);
  out[0] = pair_of_lows(low01, low23), out[1] = pair_of_highs(low01, low23);
  out[2] = pair_of_lows(high01, high23), out[3] = pair_of_highs(high01, high23);
}

/// Lines become the other direction: 32 byte permutations.
SP24_HD Patch8 transpose(const Patch8& in) {
  Patch8 out;
  SP24_UNROLL
  for (int i = 0; i < 2; ++i) {
    SP24_UNROLL
    for (int j = 0; j < 2; ++j) {
      const uint32_t block[4] = {in.line[4 * i][j], in.line[4 * i + 1][j], in.line[4 * i + 2][j],
                                 in.line[4 * i + 3][j]};
      uint32_t turned[4];
      transpose_words(block, turned);
      SP24_UNROLL
      for (int n = 0; n < 4; ++n) out.line[4 * j + n][i] = turned[n];
    }
  }
  return out;
}

}  // namespace sparse24
