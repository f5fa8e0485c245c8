// pruned_lines.cuh: a (squared) ReLU's result, or its gradient, in a patch of 8 tokens x 8 features,
// pruned to two of four along features.
#pragma once

#include <cstdint>

#include "common/pair16.h"
#include "common/tile.h"
#include "pack/two_of_four.h"

namespace sparse24 {

/// Four tokens of a patch from `first_line` on. positive(line, word) tells their ranks, of which two
/// of each four are kept; result(line, word, rank) makes the values. kDense: what is not kept becomes
/// 0. Returns kept_nibbles of the lines.
template <bool kDense, typename Positive, typename Result>
__device__ __forceinline__ uint32_t prune_lines(Patch16& patch, int first_line,
                                                const Positive& positive, const Result& result) {
  uint32_t nibbles = 0;
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int line = first_line + i;
    uint32_t ranks[4];
    SP24_UNROLL
    for (int w = 0; w < 4; ++w) ranks[w] = positive(line, w);
    const KeptPlaces kept = two_of_four(ranks);
    nibbles |= kept_nibbles(kept, i);
    SP24_UNROLL
    for (int w = 0; w < 4; ++w) {
      patch.line[line][w] = result(line, w, ranks[w]);
      if constexpr (kDense) patch.line[line][w] &= kept_halves(kept, w);
    }
  }
  return nibbles;
}

}  // namespace sparse24
