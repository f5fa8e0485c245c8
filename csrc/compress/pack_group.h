// pack_group.h: the bits of a 4x4 mask, by row and by column, as positions of kept elements.
//
// One group at a time (mask_row, mask_column with meta_from_bits of metadata.h) is what the CPU backend does. The GPU
// does eight nibbles of a word at a time: the masks of an 8x8 patch become its eight bytes of E, and the bytes become
// selectors that pick both kept 16-bit values of a group in one byte permutation. Both ways agree on every mask
// (tests/cpp).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/metadata.h"

namespace sparse24 {

/// Four kept bits of row i of a block.
SP24_HD uint32_t mask_row(uint32_t mask, int i) { return (mask >> (4 * i)) & 0xFu; }

/// Four kept bits of column j of a block, bit i for row i.
SP24_HD uint32_t mask_column(uint32_t mask, int j) {
  const uint32_t column = mask >> j;
  return (column & 1u) | ((column >> 3) & 2u) | ((column >> 6) & 4u) | ((column >> 9) & 8u);
}

/// Transposes the masks of two blocks, one in each half of the word.
SP24_HD uint32_t transpose_masks(uint32_t masks) {
  // Swap bits (0,1) of each 2x2 quarter, then the off-diagonal quarters.
  uint32_t swap = (masks ^ (masks >> 3)) & 0x0A0A0A0Au;
  masks ^= swap ^ (swap << 3);
  swap = (masks ^ (masks >> 6)) & 0x00CC00CCu;
  return masks ^ swap ^ (swap << 6);
}

/// Four nibbles of the lower half and four of the upper become four bytes: byte i = low nibble i | high nibble i << 4.
SP24_HD uint32_t interleave_nibbles(uint32_t halves) {
  // As 2x4 nibbles in order 0 1 2 3 | 4 5 6 7; wanted 0 4 1 5 2 6 3 7: two exchanges of middle parts.
  uint32_t swap = (halves ^ (halves >> 8)) & 0x0000FF00u;
  halves ^= swap ^ (swap << 8);
  swap = (halves ^ (halves >> 4)) & 0x00F000F0u;
  return halves ^ swap ^ (swap << 4);
}

/// Kept bits to positions, for eight nibbles that have two bits set each (meta_from_bits).
SP24_HD uint32_t meta_from_bits8(uint32_t kept) {
  constexpr uint32_t kOnes = 0x11111111u;
  const uint32_t k0 = kept & kOnes, k1 = (kept >> 1) & kOnes, k2 = (kept >> 2) & kOnes, k3 = (kept >> 3) & kOnes;
  const uint32_t first_low = ~k0 & k1, first_high = kOnes & ~(k0 | k1);
  const uint32_t second_low = kOnes & (k3 | ~k2), second_high = k2 | k3;
  return first_low | (first_high << 1) | (second_low << 2) | (second_high << 3);
}

/// One byte of E (two groups) to two selectors for select_bytes, the lower group's in the lower half: applied to the
/// words (elements 0, 1) and (elements 2, 3) of a group of 16-bit values, it gives the pair (first kept, second kept).
SP24_HD uint32_t pair_selectors(uint32_t meta_byte) {
  uint32_t fields = (meta_byte | (meta_byte << 12)) & 0x000F000Fu;  // a group in each half,
  fields = (fields | (fields << 6)) & 0x03030303u;                  // a position in each byte
  return fields * 0x22u + 0x10101010u;                              // position p: bytes 2p and 2p + 1
}

}  // namespace sparse24
