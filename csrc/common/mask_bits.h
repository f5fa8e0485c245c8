// mask_bits.h: rows and columns of 4x4 masks, one block at a time or two in the halves of a word.
#pragma once

#include <cstdint>

#include "common/host_device.h"

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

/// Four nibbles of the lower half and four of the upper become four bytes: nibble i of the lower
/// half is the low nibble of byte i, nibble i of the upper half its high one.
SP24_HD uint32_t interleave_nibbles(uint32_t halves) {
  // Nibbles 0 1 2 3 | 4 5 6 7 become 0 4 1 5 2 6 3 7 by two exchanges of middle parts.
  uint32_t swap = (halves ^ (halves >> 8)) & 0x0000FF00u;
  halves ^= swap ^ (swap << 8);
  swap = (halves ^ (halves >> 4)) & 0x00F000F0u;
  return halves ^ swap ^ (swap << 4);
}

}  // namespace sparse24
