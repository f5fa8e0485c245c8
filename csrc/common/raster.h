// raster.h: the order in which thread blocks walk the tiles of a matrix. Plain integers, tested on
// the CPU.
//
// Blocks start in the order of their index, some hundreds at a time. Walking bands of `band` tile
// rows, column by column inside a band, keeps that moving front compact in both directions: about
// `band` tiles deep, and as many wide as fit. So an operand that is contiguous along rows and one
// that is contiguous along columns both see runs of a few kilobytes in flight, and no DRAM page or
// L2 line is visited twice. band = 1 walks row by row, band = rows column by column.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24 {

struct TileIndex {
  uint32_t row, col;
};

/// Tiles deep of a band for matrices of mixed layouts: 16 tiles of 64 rows are 2 KB of a 16-bit
/// column.
constexpr uint32_t kMixedBand = 16;

/// Tile number `index` of tile_rows x tile_cols. Every tile has one index; the last band may be
/// less deep.
SP24_HD TileIndex raster_tile(uint32_t index, uint32_t tile_rows, uint32_t tile_cols,
                              uint32_t band) {
  const uint32_t per_band = band * tile_cols;
  const uint32_t band_index = index / per_band, within = index - band_index * per_band;
  const uint32_t first_row = band_index * band;
  const uint32_t depth = tile_rows - first_row < band ? tile_rows - first_row : band;
  const uint32_t col = within / depth;
  return {first_row + (within - col * depth), col};
}

}  // namespace sparse24
