// mvue8_patch.cuh: MVUE pruning of one thread's 8x8 patch (mvue_patch.cuh), and what it keeps in 8
// bits: the 16-bit values rounded at random (float8.h), as they lie along tokens.
//
// Random   A group's draw takes 16 bits of a Philox word, its neighbour's the other half. Rounding
//          takes the neighbour's half, and the second kept value its complement (mvue_group.h): no
//          further Philox call.
// Work     About ten instructions a kept value: to fp32, two multiplications that put it where the
//          format's exponent and mantissa are bits of it, a sum with the random bits. Codes of a
//          line are gathered by byte permutations, their signs likewise.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float8.h"
#include "common/stage8.cuh"
#include "pack/mvue_patch.cuh"

namespace sparse24 {

/// How a pass rounds: the format, as numbers so that one kernel serves both, and 1 / scale.
struct PackedRounding {
  RandomRounding rounding;
  float inverse_scale;
};

/// The kept values of a pair of features over eight tokens: words (first, second) of the upper
/// group, then of the lower one. And the groups' random words.
struct KeptPair {
  uint32_t word[4];
  uint32_t random[2];
};

/// Random bits of value i of the lower or upper feature of a pair.
SP24_HD uint32_t rounding_bits(const KeptPair& kept, int i, bool upper) {
  const uint32_t neighbour = upper ? kept.random[i / 2] & 0xFFFFu : kept.random[i / 2] >> 16;
  return i % 2 == 0 ? neighbour : neighbour ^ 0xFFFFu;
}

/// The four codes of a feature, in the order of its line of packed. All values are finite.
template <typename T>
__device__ __forceinline__ uint32_t kept_codes(const KeptPair& kept, bool upper,
                                               const PackedRounding& to) {
  const int to_top_byte = 24 - to.rounding.dropped;
  uint32_t code[4];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float x = upper ? high_value<T>(kept.word[i]) : low_value<T>(kept.word[i]);
    code[i] = to.rounding(fabsf(x), to.inverse_scale, rounding_bits(kept, i, upper)) << to_top_byte;
  }
  const uint32_t codes =
      pair_of_lows(select_bytes(code[0], code[1], 0x73u), select_bytes(code[2], code[3], 0x73u));
  const uint32_t top = upper ? 0x73u : 0x51u;  // the bytes with the signs
  const uint32_t signs = pair_of_lows(select_bytes(kept.word[0], kept.word[1], top),
                                      select_bytes(kept.word[2], kept.word[3], top));
  return codes | (signs & 0x80808080u);
}

/// The same where values may be infinite or NaN. A call: it is rare.
template <typename T>
static __device__ __noinline__ uint32_t kept_codes_with_care(KeptPair kept, bool upper,
                                                             PackedRounding to) {
  uint32_t codes = 0;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float x = upper ? high_value<T>(kept.word[i]) : low_value<T>(kept.word[i]);
    const uint32_t code = to.rounding(fabsf(x), to.inverse_scale, rounding_bits(kept, i, upper)) >>
                          to.rounding.dropped;
    codes |= (is_finite(x) ? code | (float_bits(x) >> 24 & 0x80u) : uint32_t{kNan8}) << (8 * i);
  }
  return codes;
}

/// Is one of the halves Inf or NaN? Of fp16, a kept value may be though its group's sum was finite.
SP24_HD bool overflows_fp16(uint32_t word) {
  return (((word & 0x7FFF7FFFu) + 0x04000400u) & 0x80008000u) != 0;
}

/// `octet` is the patch's first token / 8, `quad` its first feature / 4. Lines are features.
template <typename T>
__device__ __forceinline__ PackedLines prune_patch8(const Patch16& gradient, const PhiloxKey& key,
                                                    uint32_t octet, uint32_t quad,
                                                    const PackedRounding& to) {
  PackedLines out;
  SP24_UNROLL
  for (int q = 0; q < 2; ++q) {
    const Philox4 random = mvue_random(key, octet, quad + q);
    PairWords words[4];
    PrunedPair pruned[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = pair_of<true>(gradient, i / 2, 2 * q + i % 2);
    bool with_care = prune_pairs<T>(words, random.word, pruned);
    SP24_UNROLL
    for (int p = 0; p < 2; ++p) {
      const PrunedPair &up = pruned[p], &down = pruned[2 + p];
      const KeptPair kept = {{up.first, up.second, down.first, down.second},
                             {random.word[p], random.word[2 + p]}};
      if constexpr (std::is_same_v<T, Float16>) {
        SP24_UNROLL
        for (int i = 0; i < 4; ++i) with_care |= overflows_fp16(kept.word[i]);
      }
      SP24_UNROLL
      for (int f = 0; f < 2; ++f) {
        out.kept[4 * q + 2 * p + f] =
            with_care ? kept_codes_with_care<T>(kept, f == 1, to) : kept_codes<T>(kept, f == 1, to);
      }
    }
    (q == 0 ? out.meta_low : out.meta_high) =
        choose(0x0F0F0F0Fu, meta_of(pruned[0], pruned[1]), meta_of(pruned[2], pruned[3]));
  }
  return out;
}

}  // namespace sparse24
