// The parts of kernels that are plain functions of integers: word-wide packing, patches, tiles, the
// order of blocks, lists of tensors.
#include <cstdint>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "common/metadata.h"
#include "common/pair16.h"
#include "common/raster.h"
#include "common/tensor_list.h"
#include "common/tile.h"
#include "mask/patterns.h"
#include "pack/pack_group.h"
#include "testing.h"

using namespace sparse24;

TEST(two_masks_transpose_at_once) {
  for (uint32_t mask = 0; mask < 0x10000; ++mask) {
    const uint32_t other = (mask * 40503u + 12345u) & 0xFFFFu;
    const uint32_t got = transpose_masks(mask | other << 16);
    for (int j = 0; j < 4; ++j) {
      CHECK_EQ(mask_row(got & 0xFFFFu, j), mask_column(mask, j));
      CHECK_EQ(mask_row(got >> 16, j), mask_column(other, j));
    }
  }
}

TEST(nibbles_of_two_halves_interleave) {
  std::mt19937 random(1);
  for (int n = 0; n < 10000; ++n) {
    const uint32_t halves = static_cast<uint32_t>(random());
    const uint32_t got = interleave_nibbles(halves);
    for (int i = 0; i < 4; ++i) {
      CHECK_EQ(got >> (8 * i) & 0xFu, halves >> (4 * i) & 0xFu);
      CHECK_EQ(got >> (8 * i + 4) & 0xFu, halves >> (16 + 4 * i) & 0xFu);
    }
  }
}

TEST(four_lines_of_positions_at_once_are_those_of_one_at_a_time) {
  // The four rows of every pattern, beside those of another.
  for (int p = 0; p < kPatterns; ++p) {
    const uint32_t left = kPatternTable.mask[p],
                   right = kPatternTable.mask[(7 * p + 3) % kPatterns];
    const uint32_t got = meta_bytes_of(left | right << 16);
    for (int i = 0; i < 4; ++i) {
      CHECK_EQ(got >> (8 * i) & 0xFu, meta_from_bits(mask_row(left, i)));
      CHECK_EQ(got >> (8 * i + 4) & 0xFu, meta_from_bits(mask_row(right, i)));
    }
  }
}

TEST(whatever_a_mask_says_positions_rise) {
  for (uint32_t kept = 0; kept < 65536; ++kept)
    for (int i = 0; i < 4; ++i) CHECK(meta_is_valid(meta_bytes_of(kept) >> (8 * i) & 0xFu));
}

TEST(lines_that_do_not_keep_two_count_as_the_first_two) {
  for (uint32_t line : {0x0u, 0x7u, 0x8u, 0xFu}) CHECK_EQ(meta_bytes_of(line) & 0xFu, 0x4u);
}

TEST(selectors_pick_the_kept_pair) {
  const uint16_t values[4] = {0xA1A0, 0xB1B0, 0xC1C0, 0xD1D0};
  const uint32_t low = values[0] | static_cast<uint32_t>(values[1]) << 16;
  const uint32_t high = values[2] | static_cast<uint32_t>(values[3]) << 16;
  for (uint16_t mask : kPatternTable.mask) {
    const PairSelectors selectors = pair_selectors(mask);
    for (int i = 0; i < 4; ++i) {
      const uint32_t nibble = meta_from_bits(mask_row(mask, i));
      const uint32_t pair = kept_pair(low, high, selectors, i);
      CHECK_EQ(pair & 0xFFFFu, static_cast<uint32_t>(values[meta_first(nibble)]));
      CHECK_EQ(pair >> 16, static_cast<uint32_t>(values[meta_second(nibble)]));
    }
  }
}

TEST(pairs_hold_two_values) {
  for (uint32_t code = 0; code < 0x10000; code += 7) {
    const uint32_t pair = code | (0xFFFFu - code) << 16;
    CHECK_EQ(float_bits(low_value<BFloat16>(pair)),
             float_bits(to_float(BFloat16{static_cast<uint16_t>(code)})));
    CHECK_EQ(float_bits(high_value<BFloat16>(pair)),
             float_bits(to_float(BFloat16{static_cast<uint16_t>(0xFFFFu - code)})));
    CHECK_EQ(float_bits(low_value<Float16>(pair)),
             float_bits(to_float(Float16{static_cast<uint16_t>(code)})));
    CHECK_EQ(float_bits(high_value<Float16>(pair)),
             float_bits(to_float(Float16{static_cast<uint16_t>(0xFFFFu - code)})));
  }
  CHECK_EQ(make_pair16<BFloat16>(1.0f, -2.0f), 0xC0003F80u);
  CHECK_EQ(make_pair16<Float16>(1.0f, -2.0f), 0xC0003C00u);
}

TEST(patches_transpose) {
  Patch16 patch;
  const auto value = [](int row, int col) { return static_cast<uint32_t>(row * 8 + col); };
  for (int i = 0; i < 8; ++i)
    for (int p = 0; p < 4; ++p) patch.line[i][p] = value(i, 2 * p) | value(i, 2 * p + 1) << 16;
  const Patch16 got = transpose(patch);
  for (int i = 0; i < 8; ++i)
    for (int p = 0; p < 4; ++p)
      CHECK_EQ(got.line[i][p], value(2 * p, i) | value(2 * p + 1, i) << 16);
}

TEST(threads_share_a_tile_without_gaps) {
  for (Walk walk : {Walk::kRows, Walk::kSquare, Walk::kTall})
    for (bool paired : {false, true}) {
      std::set<std::pair<int, int>> seen;
      for (int thread = 0; thread < kTileThreads; ++thread) {
        const PatchOrigin origin = patch_origin(walk, paired, thread);
        CHECK(origin.row >= 0 && origin.row < kTileRows && origin.row % kPatch == 0);
        CHECK(origin.col >= 0 && origin.col < kTileCols && origin.col % kPatch == 0);
        CHECK(seen.insert({origin.row, origin.col}).second);
      }
      CHECK_EQ(seen.size(), static_cast<size_t>(kTileThreads));
    }
}

TEST(a_warp_takes_as_many_rows_and_columns_of_patches_as_the_table_says) {
  const auto check = [](Walk walk, bool paired, size_t high, size_t wide) {
    for (uint32_t warp = 0; warp < kTileThreads / 32; ++warp) {
      std::set<int> rows, cols;
      for (uint32_t lane = 0; lane < 32; ++lane) {
        const PatchOrigin origin = patch_origin(walk, paired, 32 * warp + lane);
        rows.insert(origin.row / kPatch), cols.insert(origin.col / kPatch);
      }
      CHECK_EQ(rows.size(), high);
      CHECK_EQ(cols.size(), wide);
      CHECK_EQ(*rows.rbegin() - *rows.begin(), static_cast<int>(high) - 1);
      CHECK_EQ(*cols.rbegin() - *cols.begin(), static_cast<int>(wide) - 1);
    }
  };
  for (bool paired : {false, true}) {
    check(Walk::kRows, paired, 2, 16);
    check(Walk::kSquare, paired, 4, 8);
  }
  check(Walk::kTall, false, 8, 4);
}

TEST(paired_lanes_own_patches_half_a_line_apart) {
  for (uint32_t lane = 0; lane < kTileThreads; lane += 2) {
    const auto apart = [lane](const auto& origin) {
      const PatchOrigin even = origin(lane), odd = origin(lane + 1);
      return std::make_pair(odd.row - even.row, odd.col - even.col);
    };
    const auto of = [](Walk walk) {
      return [walk](uint32_t thread) { return patch_origin(walk, true, thread); };
    };
    CHECK(apart(of(Walk::kRows)) == std::make_pair(0, 64));
    CHECK(apart(of(Walk::kSquare)) == std::make_pair(16, 0));
    CHECK(apart([](uint32_t t) { return RowTile<64>::origin(true, t); }) == std::make_pair(0, 32));
    CHECK(apart([](uint32_t t) { return RowTile<256>::origin(true, t); }) == std::make_pair(0, 64));
  }
}

TEST(staged_blocks_are_aligned_for_vectors_and_lie_in_different_banks) {
  CHECK_EQ(kStageStride % 16, 0);
  CHECK(kStageStride / 4 % 32 != 0);
}

template <typename Tile>
void check_row_tile() {
  for (bool paired : {false, true}) {
    std::set<std::pair<int, int>> seen;
    for (uint32_t thread = 0; thread < Tile::kThreads; ++thread) {
      const PatchOrigin origin = Tile::origin(paired, thread);
      CHECK(origin.row >= 0 && origin.row < kTileRows && origin.row % kRowPatch == 0);
      CHECK(origin.col >= 0 && origin.col < Tile::kCols && origin.col % kPatch == 0);
      CHECK(seen.insert({origin.row, origin.col}).second);
      const PatchOrigin other = Tile::origin(paired, thread ^ Tile::kWide);  // of the same 8 rows
      CHECK_EQ(other.col, origin.col);
      CHECK_EQ(other.row, origin.row ^ kRowPatch);
      CHECK_EQ((thread & Tile::kWide) != 0, origin.row % kPatch != 0);
    }
    CHECK_EQ(seen.size(), static_cast<size_t>(Tile::kThreads));
  }
}

TEST(threads_share_a_row_tile_without_gaps) {
  check_row_tile<RowTile<64>>();
  check_row_tile<RowTile<128>>();
  check_row_tile<RowTile<256>>();
}

TEST(staged_metadata_bytes_do_not_overlap) {
  std::set<int> seen;
  for (int block = 0; block < kTileMetaBlocks; ++block)
    for (int m = 0; m < 64; ++m)
      for (int k = 0; k < 64; k += 8) {
        const int offset = stage_offset(block, m, k);
        CHECK(offset >= 0 && offset < kTileMetaBlocks * kStageStride);
        CHECK(seen.insert(offset).second);
      }
}

TEST(every_tile_is_visited_once) {
  for (uint32_t rows : {1u, 2u, 15u, 16u, 17u, 33u, 100u})
    for (uint32_t cols : {1u, 3u, 64u})
      for (uint32_t band : {1u, kMixedBand, rows}) {
        std::vector<int> visits(rows * cols, 0);
        for (uint32_t index = 0; index < rows * cols; ++index) {
          const TileIndex tile = raster_tile(index, rows, cols, band);
          CHECK(tile.row < rows && tile.col < cols);
          ++visits[tile.row * cols + tile.col];
        }
        for (int count : visits) CHECK_EQ(count, 1);
      }
}

template <int kCapacity>
void check_that_tiles_find_their_tensors() {
  std::mt19937 random(2);
  for (int count = 1; count <= kCapacity; ++count) {
    TensorList<int, kCapacity> list;
    std::vector<int> owner;
    for (int i = 0; i < count; ++i) {
      const uint32_t tiles = 1 + static_cast<uint32_t>(random() % 5);
      list.add(i, tiles);
      owner.insert(owner.end(), tiles, i);
    }
    CHECK_EQ(list.full(), count == kCapacity);
    CHECK_EQ(list.tiles(), static_cast<uint32_t>(owner.size()));
    for (uint32_t tile = 0; tile < list.tiles(); ++tile) {
      const int found = list.find(tile);
      CHECK_EQ(found, owner[tile]);
      CHECK_EQ(list.within(tile, found), kCapacity == 1 ? tile : tile - list.first_tile[found]);
    }
  }
}

TEST(a_tile_finds_its_tensor_whatever_the_capacity) {
  check_that_tiles_find_their_tensors<1>();
  check_that_tiles_find_their_tensors<2>();
  check_that_tiles_find_their_tensors<7>();
  check_that_tiles_find_their_tensors<30>();  // of lists whose items are larger
  check_that_tiles_find_their_tensors<kTensorsPerLaunch>();
  check_that_tiles_find_their_tensors<33>();
}

TEST(a_single_tensor_has_its_tiles) {
  TensorList<int> list;
  list.add(7, 5);
  const TensorList<int, 1> single = list.single();
  CHECK_EQ(single.tensor[0], 7);
  CHECK_EQ(single.tiles(), 5u);
  CHECK(single.full());
  for (uint32_t tile = 0; tile < 5; ++tile) {
    CHECK_EQ(single.find(tile), 0);
    CHECK_EQ(single.within(tile, 0), tile);
  }
}

TEST_MAIN()
