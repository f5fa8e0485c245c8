// two_of_four.h: which two of four activations are kept: the largest of max(u, 0).
//
// Equal ones go by the lower index. NaN of either sign is above Inf. A group without a positive
// value keeps places 0 and 1. Any two are compared once, and an element is kept that wins at least
// two of its three comparisons: a majority.
//
// The CPU takes a group of fp32 values. The GPU takes eight neighbouring 16-bit ones as they lie in
// four words: positive values order like the integers that their bits are, so a comparison of two
// groups side by side is one subtraction. tests/cpp/two_of_four_test.cpp compares both ways.
//
// Source  Haziza et al., arXiv 2503.16672: activations behind a squared ReLU, pruned to 2:4.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"
#include "common/pair16.h"

namespace sparse24 {

SP24_HD uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (c & (a | b)); }

/// What values are compared by; 31 bits.
SP24_HD uint32_t rank_of(float u) { return u > 0.0f ? float_bits(u) : u == u ? 0u : 0x7FFFFFFFu; }

/// Four bits, of which two are set: the kept elements of a group.
SP24_HD uint32_t two_of_four(const float (&u)[4]) {
  uint32_t rank[4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) rank[i] = rank_of(u[i]);
  const uint32_t c01 = rank[0] >= rank[1], c02 = rank[0] >= rank[2], c03 = rank[0] >= rank[3],
                 c12 = rank[1] >= rank[2], c13 = rank[1] >= rank[3], c23 = rank[2] >= rank[3];
  return (majority(c01, c02, c03) | majority(c01 ^ 1u, c12, c13) << 1 |
          majority(c02 ^ 1u, c12 ^ 1u, c23) << 2 | majority(c03 ^ 1u, c13 ^ 1u, c23 ^ 1u) << 3);
}

// ---- pairs of 16-bit values -------------------------------------------------------------------

constexpr uint32_t kTopBits = 0x80008000u;

/// max(u, 0) of both halves: -0 becomes 0, and NaN of either sign 0x7FFF. Its bits are the rank.
template <typename T>
SP24_HD uint32_t positive_pair(uint32_t u) {
#if defined(__CUDA_ARCH__)
  static_assert(kIsIn<T, TypeList<BFloat16, Float16>>, "there are instructions for these two");
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(u), "r"(0u));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(u), "r"(0u));
  }
  return result;
#else
  const float low = low_value<T>(u), high = high_value<T>(u);
  const uint32_t low_bits = low > 0.0f ? u & 0xFFFFu : low == low ? 0u : uint32_t{kNan16};
  const uint32_t high_bits = high > 0.0f ? u >> 16 : high == high ? 0u : uint32_t{kNan16};
  return low_bits | high_bits << 16;
#endif
}

/// Two groups of four, neighbours in memory: bit 15 of place[i] says whether element i of the left
/// group is kept, bit 31 whether that of the right one is. Other bits mean nothing.
struct KeptPlaces {
  uint32_t place[4];
};

/// Of eight positive values.
SP24_HD KeptPlaces two_of_four(const uint32_t (&rank)[4]) {
  const uint32_t e0 = pair_of_lows(rank[0], rank[2]), e1 = pair_of_highs(rank[0], rank[2]),
                 e2 = pair_of_lows(rank[1], rank[3]), e3 = pair_of_highs(rank[1], rank[3]);
  // Ranks have 15 bits: the top bit of a half stays set where no borrow takes it, that is a >= b.
  const uint32_t c01 = (e0 + kTopBits) - e1, c02 = (e0 + kTopBits) - e2, c03 = (e0 + kTopBits) - e3,
                 c12 = (e1 + kTopBits) - e2, c13 = (e1 + kTopBits) - e3, c23 = (e2 + kTopBits) - e3;
  return {{majority(c01, c02, c03), majority(~c01, c12, c13), majority(~c02, ~c12, c23),
           majority(~c03, ~c13, ~c23)}};
}

/// The lower three bits of both groups' kept nibbles, at nibble `line` < 4 of the halves: as
/// look_up and meta_bytes_of of pack_group.h take them, for which three are enough.
SP24_HD uint32_t kept_nibbles(const KeptPlaces& kept, int line) {
  return ((kept.place[0] >> (15 - 4 * line)) & (0x00010001u << (4 * line))) |
         ((kept.place[1] >> (14 - 4 * line)) & (0x00020002u << (4 * line))) |
         ((kept.place[2] >> (13 - 4 * line)) & (0x00040004u << (4 * line)));
}

/// Ones in the halves of the line's word `word` that hold a kept value.
SP24_HD uint32_t kept_halves(const KeptPlaces& kept, int word) {
  const uint32_t first = kept.place[word % 2 * 2], second = kept.place[word % 2 * 2 + 1];
#if defined(__CUDA_ARCH__)
  uint32_t mask;  // nibbles of 8 and more repeat the sign of a byte
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(mask)
      : "r"(first), "r"(second), "r"(word < 2 ? 0xDD99u : 0xFFBBu));
  return mask;
#else
  const int bit = word < 2 ? 15 : 31;
  return (first >> bit & 1u) * 0xFFFFu | (second >> bit & 1u) * 0xFFFF0000u;
#endif
}

}  // namespace sparse24
