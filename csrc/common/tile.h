// tile.h: how the 128 threads of a block share a tile of 64 x 128 elements: 8 x 16 patches of 8x8.
//
// A patch is what one thread needs to make whole bytes of E (two groups of four) in both
// directions, and to transpose 16-bit values without shared memory. Which thread takes which patch
// decides what a warp's memory instructions touch; for 16-bit elements, in one line of a
// row-major / of a column-major matrix:
//
//   kRows     a warp is 2 x 16 patches: 256 B of a row / 32 B of a column    all row-major
//   kSquare   a warp is 4 x 8 patches:  128 B of a row / 64 B of a column    one side column-major
//   kTall     a warp is 8 x 4 patches:  64 B of a row / 128 B of a column    the same, if tall
//
// All are whole DRAM sectors, so no layout needs a pass through shared memory.
//
// fp32 elements: a thread's 16-byte loads cover four of its eight columns only. Two loads that a
// thread makes at once would each use half of a sector; instead neighbouring lanes load whole
// sectors and exchange halves (patch.cuh), for which the even lane owns a patch in the first half
// of the warp's line and the odd lane the same in the second.
//
// Metadata of the tile: blocks of 64x64 elements are staged in shared memory and stored as whole
// blocks (stage_offset).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/metadata.h"

namespace sparse24 {

constexpr int kPatch = 8;
constexpr int kTileRows = 64;
constexpr int kTileCols = 128;
constexpr int kTileThreads = (kTileRows / kPatch) * (kTileCols / kPatch);
constexpr int kTileMetaBlocks = kTileRows * kTileCols / (kMetaBlock * kMetaBlock);

static_assert(kTileThreads == 128 && kTileMetaBlocks == 2, "see the table above");

// Kernels that go by rows alone, with four features a thread: a warp takes eight tokens.
constexpr int kRowThreads = 256;
static_assert(kRowThreads / 32 * 8 == kTileRows && 32 * 4 == kTileCols);

enum class Walk { kRows, kSquare, kTall };

/// First element of a thread's patch, within the tile.
struct PatchOrigin {
  int row, col;
};

/// `paired`: lanes 2i and 2i + 1 own patches half a line apart, along rows of the matrix (kRows) or
/// columns (kSquare).
SP24_HD PatchOrigin patch_origin(Walk walk, bool paired, uint32_t thread) {
  uint32_t row, col;
  if (walk == Walk::kRows) {
    const uint32_t along = thread % 16;
    row = thread / 16;
    col = paired ? along % 2 * 8 + along / 2 : along;
  } else if (walk == Walk::kTall) {  // never paired
    row = thread % 8;
    col = thread / 8;
  } else {  // 2 x 2 warps, lanes along columns of the matrix first
    const uint32_t warp = thread / 32, lane = thread % 32, along = lane % 4;
    row = warp % 2 * 4 + (paired ? along % 2 * 2 + along / 2 : along);
    col = warp / 2 * 8 + lane / 4;
  }
  return {static_cast<int>(row * kPatch), static_cast<int>(col * kPatch)};
}

constexpr int kRowPatch = 4;  // rows of half a patch, which is 4x8 (row_patch.cuh)

/// Tiles of row-major matrices in half patches: 64 rows of 64 to 256 elements. A warp takes up to
/// 16 patches along a row, 256 B of 16-bit elements, and as many below them as fill it.
template <int kTileWidth>
struct RowTile {
  static constexpr int kCols = kTileWidth, kMetaBlocks = kCols / kMetaBlock;
  static constexpr int kThreads = kTileRows / kRowPatch * kCols / kPatch;
  static constexpr int kWide = kCols / kPatch < 16 ? kCols / kPatch : 16, kHigh = 32 / kWide;
  static constexpr int kAcross = kCols / kPatch / kWide;  // warps along a row

  SP24_HD static PatchOrigin origin(bool paired, uint32_t thread) {
    const uint32_t lane = thread % 32, warp = thread / 32, along = lane % kWide;
    const uint32_t patch = paired ? along % 2 * (kWide / 2) + along / 2 : along;
    return {static_cast<int>((warp / kAcross * kHigh + lane / kWide) * kRowPatch),
            static_cast<int>((warp % kAcross * kWide + patch) * kPatch)};
  }
};

/// Staged metadata blocks lie 528 bytes apart: neighbours written at the same time fall into
/// different banks.
constexpr int kStageStride = kMetaBlockBytes + 16;

/// Where a tile's byte for elements (m, k..k+7) waits: m < 64 along one of the tile's blocks
/// `block`.
SP24_HD uint32_t stage_offset(uint32_t block, uint32_t m, uint32_t k) {
  return block * kStageStride + meta_block_offset(static_cast<int>(m), static_cast<int>(k));
}

}  // namespace sparse24
