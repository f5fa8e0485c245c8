// mvue_pair.h: two neighbouring features' groups at once, as 16-bit values lie in words: without a
// branch, and with the bits of mvue_group wherever the sums are finite.
//
// A GPU that reads 2 bytes an element from HBM can afford some 20 instructions on it, and half of
// that in the pipe that compares, selects and permutes. So
//
//   - only the draw itself (draw_group) is done in fp32, one group at a time: sums and products;
//   - its four decisions are signs of differences; one byte permutation makes a mask out of those
//     of two groups, all ones in the half of a group that is past its point;
//   - values are chosen, and positions put together, by masks: both groups in one instruction;
//   - max(|a|, base) with the sign of a is one instruction for two 16-bit values, three on an A100.
//     It may be done after base was rounded: rounding keeps order, and |a| is its own rounding.
//
// tests/cpp/kernel_index_test.cpp compares with mvue_group on millions of groups made to be
// difficult.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/pair16.h"
#include "pack/mvue_group.h"

namespace sparse24 {

/// Ones in the lower half if `low` is negative, in the upper half if `high` is.
SP24_HD uint32_t sign_masks(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t mask;  // nibbles of 8 and more repeat the sign of a byte: of bytes 3 and 7
  asm("prmt.b32 %0, %1, %2, 0xFFBB;" : "=r"(mask) : "r"(float_bits(low)), "r"(float_bits(high)));
  return mask;
#else
  return (float_bits(low) >> 31) * 0xFFFFu | (float_bits(high) >> 31) * 0xFFFF0000u;
#endif
}

/// Bits of a where the mask has ones, else of b.
SP24_HD uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) { return (mask & a) | (~mask & b); }

/// Both halves: the larger magnitude of a and b >= 0, with the sign of a. Not for NaN.
template <typename T>
SP24_HD uint32_t raise_magnitudes(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
  constexpr uint32_t kSigns = 0x80008000u;
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a & ~kSigns), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a & ~kSigns), "r"(b));
  }
  return result | (a & kSigns);
#elif defined(__CUDA_ARCH__)
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
#else
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint32_t x = a >> shift & 0xFFFFu, y = b >> shift & 0x7FFFu, magnitude = x & 0x7FFFu;
    result |= ((x & 0x8000u) | (magnitude > y ? magnitude : y)) << shift;
  }
  return result;
#endif
}

#if defined(__CUDACC__)
/// Both halves: the larger magnitude, with a sign that means nothing. NaN counts as nothing.
template <typename T>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
  return raise_magnitudes<T>(a, b & 0x7FFF7FFFu);
#else
  return raise_magnitudes<T>(a, b);
#endif
}
#endif

/// Both groups pruned.
struct PrunedPair {
  uint32_t first, second;  // a word of each packed row
  uint32_t nibbles;        // each half has its group's nibble four times
};

/// Words are four tokens of two features. `check` stays as it is, unless a sum is not finite: then
/// it becomes NaN.
template <typename T>
SP24_HD PrunedPair prune_pair(const uint32_t (&words)[4], float u_low, float u_high, float& check) {
  float a[4], b[4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) a[i] = low_value<T>(words[i]), b[i] = high_value<T>(words[i]);
  const MvueDraw low = draw_group(a, u_low), high = draw_group(b, u_high);
  check = multiply_add(low.sum, 0.0f, check);
  check = multiply_add(high.sum, 0.0f, check);

  const uint32_t past3 = sign_masks(low.past3, high.past3);
  const uint32_t past2 = sign_masks(low.past2, high.past2);
  const uint32_t short0 = sign_masks(low.short0, high.short0);
  const uint32_t short1 =
      sign_masks(low.short1, high.short1);  // implies short0, as past3 does past2
  const uint32_t base = make_pair16<T>(low.base, high.base);
  PrunedPair out;
  out.first =
      raise_magnitudes<T>(choose(short1, words[2], choose(short0, words[1], words[0])), base);
  out.second =
      raise_magnitudes<T>(choose(past3, words[3], choose(past2, words[2], words[1])), base);

  static_assert(kIsIn<T, TypeList<BFloat16, Float16>>, "raise_magnitudes has these two alone");

  // Bits 0 and 1 of a nibble are the first index, bits 2 and 3 the second.
  const uint32_t first = choose(0x55555555u, short0 & ~short1, short1);
  const uint32_t second = choose(0x55555555u, past3 | ~past2, past2);
  out.nibbles = choose(0x33333333u, first, second);
  return out;
}

}  // namespace sparse24
