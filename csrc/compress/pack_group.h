// pack_group.h: the bits of a 4x4 mask, by row and by column, as positions of kept elements.
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

}  // namespace sparse24
