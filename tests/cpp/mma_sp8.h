// mma_sp8.h: the sparse instruction of 8 bits on the host, as the PTX manual has it.
#pragma once

#include <array>
#include <cstdint>

#include "common/float8.h"
#include "common/metadata.h"

namespace testing {

using namespace sparse24;

/// Four registers of each lane of a warp, four e4m3 codes each: [lane][register][byte].
using Registers = std::array<std::array<std::array<uint8_t, 4>, 4>, 32>;

/// mma.sp m16n8k64 by the PTX manual. Of lhs a lane 4g + q has in registers 0 to 3 the kept values of rows g, g + 8,
/// g, g + 8; of columns 8q to 8q + 7, in registers 2 and 3 of those 32 further on. Of rhs it has column g, rows 4q to
/// 4q + 3 and those 16, 32 and 48 further on. Its word has the positions of row g, of q = 1 and 3 row g + 8; of columns
/// 0 to 31, of q = 2 and 3 of 32 to 63.
inline void multiply_sparse8(float (&sums)[16][8], const Registers& lhs, const Registers& rhs,
                             const std::array<uint32_t, 32>& meta) {
  const auto value = [](uint8_t code) { return to_float(Float8E4M3{code}); };
  float dense_lhs[16][64] = {}, dense_rhs[64][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int of = 0; of < 4; ++of)
      for (int i = 0; i < 4; ++i) {
        dense_rhs[of * 16 + 4 * q + i][g] = value(rhs[lane][of][i]);
        const int row = g + of % 2 * 8, far = of / 2, group = 2 * q + i / 2;  // of a half of k
        const uint32_t nibble = meta[g * 4 + far * 2 + of % 2] >> (group * 4) & 0xF;
        const int position = i % 2 == 0 ? meta_first(nibble) : meta_second(nibble);
        dense_lhs[row][far * 32 + group * 4 + position] = value(lhs[lane][of][i]);
      }
  }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 64; ++k) sums[m][n] += dense_lhs[m][k] * dense_rhs[k][n];
}

}  // namespace testing
