// mvue_patch.cuh: MVUE pruning of one thread's 8x8 patch of a gradient, 8 tokens by 8 features.
//
// Four Philox calls serve the sixteen groups (two of tokens by eight features): one call a feature
// quad and token group. Groups that draw_plain does not cover are rare, and are pruned again with
// care.
#pragma once

#include <cstdint>

#include "common/pair16.h"
#include "common/patch.cuh"
#include "compress/mvue_draw.h"
#include "compress/mvue_group.h"
#include "compress/pack_group.h"

namespace sparse24 {

/// What a patch becomes: rows of packed (two a token group), eight features each; and a byte of E a
/// feature.
struct MvuePatch {
  uint32_t row[4][4];
  uint32_t meta_low, meta_high;
};

/// Two features' groups of one token group: what both kernels and the careful path start from.
struct GroupPair {
  uint32_t words[4];  // by tokens: four tokens of both features; else two words of the first
                      // feature, two of the second
  uint32_t random[2];
};

template <typename T, bool kByTokens>
__device__ __forceinline__ float group_value(const GroupPair& groups, int feature, int token) {
  if (kByTokens)
    return feature == 0 ? low_value<T>(groups.words[token]) : high_value<T>(groups.words[token]);
  const uint32_t pair = groups.words[2 * feature + token / 2];
  return token % 2 == 0 ? low_value<T>(pair) : high_value<T>(pair);
}

/// Both groups pruned: a word of each packed row, and their kept bits in bits 0-3 and 8-11 (what is
/// above is noise).
struct PrunedPair {
  uint32_t first, second, kept;
};

/// Through mvue_group. A call, not inlined: it is rare, and keeps the code between two of them
/// short to schedule.
template <typename T, bool kByTokens>
static __device__ __noinline__ PrunedPair prune_with_care(GroupPair groups) {
  PrunedPair out = {0, 0, 0};
  SP24_UNROLL
  for (int f = 0; f < 2; ++f) {
    float a[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = group_value<T, kByTokens>(groups, f, i);
    const MvuePick pick = mvue_group(a, mvue_uniform(groups.random[f]));
    out.first |= make_pair16<T>(pick.first_value, 0.0f) << (16 * f);
    out.second |= make_pair16<T>(pick.second_value, 0.0f) << (16 * f);
    out.kept |= (1u << meta_first(pick.nibble) | 1u << meta_second(pick.nibble)) << (8 * f);
  }
  return out;
}

template <typename T, bool kByTokens>
__device__ __forceinline__ PrunedPair prune_pair(const GroupPair& groups) {
  uint32_t values[2];               // a feature's: drawn, other
  float order = kCounter + 0x5410;  // the selector of both features' first values
  float kept = kCounter;
  MvueDraw draw[2];
  SP24_UNROLL
  for (int f = 0; f < 2; ++f) {
    float a[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = group_value<T, kByTokens>(groups, f, i);
    draw[f] = draw_plain(a, groups.random[f], f == 0 ? 1.0f : 0x1p8f, kept);
    values[f] = make_pair16<T>(draw[f].drawn, draw[f].other);
    add_if(draw[f].other_first, order, f == 0 ? 0x22 : 0x2200);
  }
  const float reverse = (2 * kCounter + (0x5410 + 0x7632)) - order;
  PrunedPair out = {select_bytes(values[0], values[1], __float_as_uint(order)),
                    select_bytes(values[0], values[1], __float_as_uint(reverse)),
                    __float_as_uint(kept)};
  if (!are_plain(draw[0], draw[1])) out = prune_with_care<T, kByTokens>(groups);
  return out;
}

template <typename T, bool kByTokens>
__device__ __forceinline__ MvuePatch prune_patch(const Patch16& gradient, const PhiloxKey& key,
                                                 uint32_t token_group, uint32_t feature_quad) {
  // All calls at once share their round keys.
  Philox4 random[2][2];
  SP24_UNROLL
  for (int i = 0; i < 4; ++i)
    random[i / 2][i % 2] = mvue_random(key, token_group + i / 2, feature_quad + i % 2);

  MvuePatch out;
  SP24_UNROLL
  for (int quad = 0; quad < 2; ++quad) {
    uint32_t kept[2] = {
        0,
        0};  // of two features each: feature f of a pair in byte f, the token groups in its halves
    SP24_UNROLL
    for (int group = 0; group < 2; ++group) {
      SP24_UNROLL
      for (int p = 0; p < 2; ++p) {
        GroupPair groups;
        const int pair = 2 * quad + p;
        SP24_UNROLL
        for (int i = 0; i < 4; ++i) {
          groups.words[i] = kByTokens ? gradient.line[4 * group + i][pair]
                                      : gradient.line[2 * pair + i / 2][2 * group + i % 2];
        }
        groups.random[0] = random[group][quad].word[2 * p];
        groups.random[1] = random[group][quad].word[2 * p + 1];
        const PrunedPair pruned = prune_pair<T, kByTokens>(groups);
        out.row[2 * group][pair] = pruned.first;
        out.row[2 * group + 1][pair] = pruned.second;
        kept[p] += pruned.kept << (4 * group);
      }
    }
    (quad == 0 ? out.meta_low : out.meta_high) = meta_from_bits8(pair_of_lows(kept[0], kept[1]));
  }
  return out;
}

/// Stores the rows of a patch into packed [padded_tokens/2, features]; `valid` token groups of it
/// lie inside.
__device__ __forceinline__ void store_mvue(uint16_t* first, uint32_t stride, int valid_groups,
                                           const MvuePatch& patch) {
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i / 2 < valid_groups) {
      store16(advance(first, stride, i),
              make_uint4(patch.row[i][0], patch.row[i][1], patch.row[i][2], patch.row[i][3]));
    }
  }
}

}  // namespace sparse24
