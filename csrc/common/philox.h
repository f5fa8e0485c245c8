// philox.h: Philox4x32-10, a counter-based generator: the same four words for the same key and
// counter, everywhere.
//
// Source   Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011),
//          section 4.3.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24 {

struct Philox4 {
  uint32_t word[4];
};

SP24_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __umulhi(a, b);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
#endif
}

SP24_HD Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;  // golden ratio, sqrt(3) - 1
  SP24_UNROLL
  for (uint32_t round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(kMultiplier0, counter.word[0]);
    const uint32_t low0 = kMultiplier0 * counter.word[0];
    const uint32_t high1 = multiply_high(kMultiplier1, counter.word[2]);
    const uint32_t low1 = kMultiplier1 * counter.word[2];
    counter = {{high1 ^ counter.word[1] ^ (key0 + round * kWeyl0), low1,
                high0 ^ counter.word[3] ^ (key1 + round * kWeyl1), low0}};
  }
  return counter;
}

/// The Philox key of a seed pair (two int64): both halves of both numbers enter it.
struct PhiloxKey {
  uint32_t key0, key1;        // the key proper, from the first number
  uint32_t stream0, stream1;  // the upper half of the counter, from the second
};

SP24_HD PhiloxKey philox_key(int64_t seed0, int64_t seed1) {
  const uint64_t first = static_cast<uint64_t>(seed0), second = static_cast<uint64_t>(seed1);
  return {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32),
          static_cast<uint32_t>(second), static_cast<uint32_t>(second >> 32)};
}

}  // namespace sparse24
