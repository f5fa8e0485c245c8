// tile_place.h: which patch of a staged tile a thread takes, and which vectors it copies. Plain
// integers, tested on the CPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24 {

/// A patch of a tile, counted in patches.
struct TilePlace {
  int token, feature;
};

/// Thread `thread` of token_patches x feature_patches, both multiples of 8. Every patch has one
/// thread. Any eight lanes that shared memory serves at a time differ, modulo 8, in `token` and in
/// `feature`. Patches have lines of 16 bytes, so whichever way a tile lies, their accesses fall
/// into different banks, without padding or swizzle. A warp has four neighbouring features of each
/// of its tokens: 64 contiguous, aligned bytes of what threads store to global memory themselves.
template <int kTokenPatches, int kFeaturePatches>
SP24_HD TilePlace tile_place(uint32_t thread) {
  static_assert(kTokenPatches % 8 == 0 && kFeaturePatches % 8 == 0, "squares of 8 x 8");
  const uint32_t lane = thread % 8, eight = thread / 8 % 8, square = thread / 64;
  return {static_cast<int>(square % (kTokenPatches / 8) * 8 + lane),
          static_cast<int>(square / (kTokenPatches / 8) * 8 + (lane ^ eight))};
}

/// A vector of 16 bytes of a tile: its line, its place in it, and where it is staged, in bytes.
struct TileVector {
  int line, along, staged;
};

/// The i-th vector that thread `thread` of `threads` copies, of a tile with `per_line` in each
/// line: neighbouring threads take neighbours.
SP24_HD TileVector tile_vector(uint32_t thread, int threads, int i, int per_line) {
  const int number = i * threads + static_cast<int>(thread);
  return {number / per_line, number % per_line, 16 * number};
}

}  // namespace sparse24
