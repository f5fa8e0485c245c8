// pack_group.h: from the bits of a mask to positions of kept elements, and to the kept values
// themselves.
//
// One group at a time (mask_row, mask_column, and meta_from_bits of metadata.h) is what the CPU
// backend does. The GPU does eight nibbles of a word at a time: the masks of an 8x8 patch become
// its eight bytes of E, and the bytes become selectors that pick both kept 16-bit values of a group
// in one byte permutation. Both ways agree on every mask (tests/cpp).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/mask_bits.h"
#include "common/metadata.h"

namespace sparse24 {

/// Kept bits to positions, for eight nibbles that have two bits set each (meta_from_bits).
SP24_HD uint32_t meta_from_bits8(uint32_t kept) {
  constexpr uint32_t kOnes = 0x11111111u;
  const uint32_t k0 = kept & kOnes, k1 = (kept >> 1) & kOnes, k2 = (kept >> 2) & kOnes,
                 k3 = (kept >> 3) & kOnes;
  const uint32_t first_low = ~k0 & k1, first_high = kOnes & ~(k0 | k1);
  const uint32_t second_low = kOnes & (k3 | ~k2), second_high = k2 | k3;
  return first_low | (first_high << 1) | (second_low << 2) | (second_high << 3);
}

/// Nibbles k and k + 4 of a word of positions, k < 4, to two selectors for select_bytes, nibble k's
/// in the lower half (the only one that select_bytes looks at). Applied to the words (elements 0,
/// 1) and (elements 2, 3) of a group of 16-bit values, a selector gives the pair (first kept,
/// second kept).
SP24_HD uint32_t pair_selectors(uint32_t meta, int k) {
  uint32_t fields = (meta >> (4 * k)) & 0x000F000Fu;  // a group in each half,
  fields = (fields | (fields << 6)) & 0x03030303u;    // a position in each byte
  return fields * 0x22u + 0x10101010u;                // position p: bytes 2p and 2p + 1
}

}  // namespace sparse24
