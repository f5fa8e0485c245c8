// mvue_patch.cuh: MVUE pruning of what one thread holds of a gradient: quads of 8 tokens by 4
// features.
//
// One Philox call serves the eight groups of a quad. A quad with a sum that is not finite is rare:
// it is pruned again, group by group.
#pragma once

#include <cstdint>

#include "common/pair16.h"
#include "common/patch.cuh"
#include "pack/mvue_group.h"
#include "pack/mvue_pair.h"

namespace sparse24 {

/// What a quad becomes: four rows of packed, and a byte of E a feature.
struct MvueQuad {
  uint2 row[4];
  uint32_t meta;
};

/// Two features of four tokens.
struct PairWords {
  uint32_t token[4];
};

/// Through mvue_group. A call, not inlined: it is rare, and the code around it stays short.
template <typename T>
static __device__ __noinline__ PrunedPair prune_with_care(PairWords words, uint32_t bits) {
  PrunedPair out = {0, 0, 0};
  SP24_UNROLL
  for (int f = 0; f < 2; ++f) {
    float a[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i)
      a[i] = f == 0 ? low_value<T>(words.token[i]) : high_value<T>(words.token[i]);
    const MvuePick pick = mvue_group(a, mvue_uniform(bits >> (16 * f) & 0xFFFFu));
    out.first |= make_pair16<T>(pick.first_value, 0.0f) << (16 * f);
    out.second |= make_pair16<T>(pick.second_value, 0.0f) << (16 * f);
    out.nibbles |= (pick.nibble * 0x1111u) << (16 * f);
  }
  return out;
}

/// mvue_uniform of half a word, one byte permutation.
__device__ __forceinline__ float uniform_of(uint32_t bits, bool upper) {
  return __uint_as_float(select_bytes(bits, 0x43000000u, upper ? 0x7632u : 0x7610u)) -
         (128.0f - 0x1p-17f);
}

/// Pairs side by side, each with a word of random bits. Those with a sum that is not finite are
/// rare: all are pruned again then, group by group, and the result is true.
template <typename T, int kPairs>
__device__ __forceinline__ bool prune_pairs(const PairWords (&words)[kPairs],
                                            const uint32_t (&bits)[kPairs],
                                            PrunedPair (&out)[kPairs]) {
  float check = 0.0f;
  SP24_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    out[i] =
        prune_pair<T>(words[i].token, uniform_of(bits[i], false), uniform_of(bits[i], true), check);
  }
  const bool with_care = check != 0.0f;
  if (with_care) {
    SP24_UNROLL
    for (int i = 0; i < kPairs; ++i) out[i] = prune_with_care<T>(words[i], bits[i]);
  }
  return with_care;
}

/// Bytes of E of four features from two pairs' nibbles, right in the half of each byte that is the
/// pairs' token group's.
__device__ __forceinline__ uint32_t meta_of(const PrunedPair& low, const PrunedPair& high) {
  return select_bytes(low.nibbles, high.nibbles, 0x6420u);
}

/// Four bytes of E of neighbouring features, 8 apart where they wait to be stored (stage.cuh).
__device__ __forceinline__ void stage_meta(uint8_t* first, uint32_t meta) {
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) first[8 * i] = static_cast<uint8_t>(meta >> (8 * i));
}

/// A pair of a patch that is held by tokens, or by features.
template <bool kByTokens>
__device__ __forceinline__ PairWords pair_of(const Patch16& patch, int group, int pair) {
  PairWords words;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kByTokens) {
      words.token[i] = patch.line[4 * group + i][pair];
    } else {
      const uint32_t a = patch.line[2 * pair][2 * group + i / 2];
      const uint32_t b = patch.line[2 * pair + 1][2 * group + i / 2];
      words.token[i] = i % 2 == 0 ? pair_of_lows(a, b) : pair_of_highs(a, b);
    }
  }
  return words;
}

/// Both quads of an 8x8 patch. `octet` is its first token / 8, `quad` its first feature / 4.
struct MvuePatch {
  MvueQuad quad[2];
};

template <typename T, bool kByTokens>
__device__ __forceinline__ MvuePatch prune_patch(const Patch16& gradient, const PhiloxKey& key,
                                                 uint32_t octet, uint32_t quad) {
  MvuePatch out;
  SP24_UNROLL
  for (int q = 0; q < 2; ++q) {
    const Philox4 random = mvue_random(key, octet, quad + q);
    PairWords words[4];
    PrunedPair pruned[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) words[i] = pair_of<kByTokens>(gradient, i / 2, 2 * q + i % 2);
    prune_pairs<T>(words, random.word, pruned);
    SP24_UNROLL
    for (int group = 0; group < 2; ++group) {
      const PrunedPair &low = pruned[2 * group], &high = pruned[2 * group + 1];
      out.quad[q].row[2 * group] = make_uint2(low.first, high.first);
      out.quad[q].row[2 * group + 1] = make_uint2(low.second, high.second);
    }
    out.quad[q].meta =
        choose(0x0F0F0F0Fu, meta_of(pruned[0], pruned[1]), meta_of(pruned[2], pruned[3]));
  }
  return out;
}

/// Stores the rows of a patch into packed [padded_tokens/2, features].
__device__ __forceinline__ void store_mvue(uint16_t* first, uint32_t stride,
                                           const MvuePatch& patch) {
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint2 low = patch.quad[0].row[i], high = patch.quad[1].row[i];
    store16(advance(first, stride, i), make_uint4(low.x, low.y, high.x, high.y));
  }
}

}  // namespace sparse24
