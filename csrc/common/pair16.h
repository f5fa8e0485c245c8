// pair16.h: two 16-bit values in one 32-bit word (the lower address in the lower half), and 8x8
// patches of them.
//
// Kernels move 16-bit matrices as words and never unpack what they only copy: choosing, pairing and
// transposing values are byte permutations, one instruction each on the GPU.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/convert.h"
#include "common/host_device.h"

namespace sparse24 {

/// Bytes 0-3 are `low`, 4-7 are `high`; nibble i < 4 of the selector (0-7 each) names byte i of the
/// result. Its upper half is ignored.
SP24_HD uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;  // __byte_perm would first mask a selector that it cannot see through
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
#else
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7u)) & 0xFFu) << (8 * i);
  }
  return result;
#endif
}

SP24_HD uint32_t pair_of_lows(uint32_t a, uint32_t b) { return select_bytes(a, b, 0x5410u); }
SP24_HD uint32_t pair_of_highs(uint32_t a, uint32_t b) { return select_bytes(a, b, 0x7632u); }

template <typename T>
SP24_HD float low_value(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair & 0xFFFFu)});
}
template <typename T>
SP24_HD float high_value(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}
template <>
SP24_HD float low_value<BFloat16>(uint32_t pair) {
  return bits_float(pair << 16);
}
template <>
SP24_HD float high_value<BFloat16>(uint32_t pair) {
  return bits_float(pair & 0xFFFF0000u);
}

/// Both values rounded once, as from_float does.
template <typename T>
SP24_HD uint32_t make_pair16(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
#if defined(__CUDA_ARCH__)
template <>
SP24_HD uint32_t make_pair16<BFloat16>(float low, float high) {
  uint32_t pair;  // one instruction for both
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
SP24_HD uint32_t make_pair16<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

/// 8x8 values: line i, as pairs of neighbours along the line.
struct Patch16 {
  uint32_t line[8][4];
};

/// Lines become the other direction: 32 byte permutations.
SP24_HD Patch16 transpose(const Patch16& in) {
  Patch16 out;
  SP24_UNROLL
  for (int i = 0; i < 8; ++i) {
    SP24_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t a = in.line[2 * p][i / 2], b = in.line[2 * p + 1][i / 2];
      out.line[i][p] = i % 2 == 0 ? pair_of_lows(a, b) : pair_of_highs(a, b);
    }
  }
  return out;
}

}  // namespace sparse24
