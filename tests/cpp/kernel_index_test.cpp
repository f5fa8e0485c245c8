// kernel_index_test.cpp: the index arithmetic and bit tricks of the GPU kernels, on the CPU: every
// tile and element once, every byte of E once, eight nibbles as one, and the branch-free MVUE draw
// against mvue_group.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "common/convert.h"
#include "common/mask_bits.h"
#include "common/metadata.h"
#include "common/pair16.h"
#include "common/raster.h"
#include "common/tensor_list.h"
#include "common/tile.h"
#include "compress/mvue_draw.h"
#include "compress/mvue_group.h"
#include "compress/pack_group.h"
#include "mask/patterns.h"

namespace {

using namespace sparse24;

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  if (failures <= 20) std::printf("FAILED: %s\n", what);
}

void test_raster_visits_every_tile_once() {
  for (uint32_t rows : {1u, 2u, 7u, 16u, 17u, 40u}) {
    for (uint32_t cols : {1u, 3u, 16u, 33u}) {
      for (uint32_t band : {1u, 2u, kMixedBand, 100u}) {
        std::vector<int> visits(rows * cols, 0);
        for (uint32_t i = 0; i < rows * cols; ++i) {
          const TileIndex tile = raster_tile(i, rows, cols, band);
          expect(tile.row < rows && tile.col < cols, "raster_tile stays inside");
          if (tile.row < rows && tile.col < cols) ++visits[tile.row * cols + tile.col];
        }
        for (int count : visits) expect(count == 1, "raster_tile visits every tile once");
      }
    }
  }
}

void test_patches_cover_the_tile_once() {
  for (Walk walk : {Walk::kRows, Walk::kSquare}) {
    for (bool paired : {false, true}) {
      std::vector<int> covered(kTileRows * kTileCols, 0);
      for (uint32_t thread = 0; thread < kTileThreads; ++thread) {
        const PatchOrigin origin = patch_origin(walk, paired, thread);
        for (int i = 0; i < kPatch; ++i)
          for (int j = 0; j < kPatch; ++j) ++covered[(origin.row + i) * kTileCols + origin.col + j];
      }
      for (int count : covered) expect(count == 1, "patches cover the tile once");
    }
  }
}

/// What load_patch32 reads and hands to the neighbouring lane, as element numbers along a line.
void test_paired_lanes_get_their_own_elements() {
  struct Case {
    Walk walk;
    int half_line, lanes;
  };
  for (const Case c :
       {Case{Walk::kRows, kTileCols / 2, 16}, Case{Walk::kSquare, kTileRows / 4, 4}}) {
    for (uint32_t thread = 0; thread < kTileThreads; thread += 2) {
      const PatchOrigin even = patch_origin(c.walk, true, thread),
                        odd = patch_origin(c.walk, true, thread + 1);
      const bool by_rows = c.walk == Walk::kRows;
      const int along_even = by_rows ? even.col : even.row, along_odd = by_rows ? odd.col : odd.row;
      expect(along_odd == along_even + c.half_line, "a pair's patches are half a line apart");
      expect((by_rows ? even.row : even.col) == (by_rows ? odd.row : odd.col),
             "a pair shares its lines");
      const int near_even = along_even, near_odd = along_odd - c.half_line + 4;
      expect(near_odd == near_even + 4, "a pair loads neighbouring vectors");
      // Even owns near of both, odd owns far of both.
      expect(near_odd == along_even + 4 && near_even + c.half_line == along_odd,
             "a pair exchanges halves");
    }
  }
}

void test_every_byte_of_E_is_staged_once() {
  std::vector<int> written(2 * kTileMetaBlocks * kStageStride, 0);
  for (uint32_t thread = 0; thread < kTileThreads; ++thread) {
    const PatchOrigin origin = patch_origin(Walk::kRows, false, thread);
    const uint32_t block = origin.col / kMetaBlock, col = origin.col % kMetaBlock;
    for (int i = 0; i < kPatch; ++i) {
      const uint32_t row_byte = stage_offset(block, origin.row, col) + 8 * i;
      const uint32_t col_byte = stage_offset(kTileMetaBlocks + block, col, origin.row) + 8 * i;
      expect(row_byte == stage_offset(block, origin.row + i, col),
             "lines of a patch are 8 bytes apart in E");
      expect(col_byte == stage_offset(kTileMetaBlocks + block, col + i, origin.row), "and in E_t");
      ++written[row_byte], ++written[col_byte];
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    const bool in_block = i % kStageStride < kMetaBlockBytes;
    expect(written[i] == (in_block ? 1 : 0), "every byte of the staged blocks is written once");
  }
}

void test_eight_nibbles_as_one() {
  for (int a = 0; a < kPatterns; ++a) {
    for (int b = 0; b < kPatterns; ++b) {
      const uint32_t first = kPatternTable.mask[a], second = kPatternTable.mask[b];
      const uint32_t turned = transpose_masks(first | second << 16);
      const uint32_t meta = meta_from_bits8(interleave_nibbles(first | second << 16));
      for (int i = 0; i < 4; ++i) {
        expect(mask_row(turned & 0xFFFFu, i) == mask_column(first, i),
               "transpose_masks, lower half");
        expect(mask_row(turned >> 16, i) == mask_column(second, i), "transpose_masks, upper half");
        const uint32_t byte =
            meta_from_bits(mask_row(first, i)) | meta_from_bits(mask_row(second, i)) << 4;
        expect((meta >> (8 * i) & 0xFFu) == byte, "meta_from_bits8 of interleaved nibbles");
        for (int group = 0; group < 2; ++group) {
          const int n = 2 * i + group;
          const uint32_t selectors = pair_selectors(meta, n % 4),
                         nibble = byte >> (4 * group) & 0xFu;
          const uint32_t pair =
              select_bytes(0xBBBBAAAAu, 0xDDDDCCCCu, n < 4 ? selectors : selectors >> 16);
          const uint32_t value[4] = {0xAAAAu, 0xBBBBu, 0xCCCCu, 0xDDDDu};
          expect(pair == (value[meta_first(nibble)] | value[meta_second(nibble)] << 16),
                 "pair_selectors");
        }
      }
    }
  }
  Patch16 patch;
  for (uint32_t i = 0; i < 64; i += 2) patch.line[i / 8][i % 8 / 2] = i | (i + 1) << 16;
  const Patch16 turned = transpose(patch);
  for (uint32_t i = 0; i < 8; ++i)
    for (uint32_t j = 0; j < 8; ++j)
      expect((turned.line[i][j / 2] >> (16 * (j % 2)) & 0xFFFFu) == j * 8 + i,
             "transpose of a patch");
}

void test_a_tile_finds_its_tensor() {
  TensorList<int> list;
  const uint32_t tiles[] = {3, 1, 0, 7, 2};
  for (int i = 0; i < 5; ++i) list.add(i, tiles[i]);
  uint32_t tile = 0;
  for (int i = 0; i < 5; ++i)
    for (uint32_t t = 0; t < tiles[i]; ++t)
      expect(list.find(tile++) == i, "find gives the tensor of a tile");
  expect(tile == list.tiles(), "tiles counts all");
}

/// Groups made to be difficult: few mantissa bits (ties, exact sums), values around 1, zeros of
/// both signs, one element equal to the sum of the others, all magnitudes, and uniforms at both
/// ends and around the running sums.
void test_plain_draw_has_the_bits_of_mvue_group() {
  std::mt19937_64 random(20240407);
  std::normal_distribution<float> normal;
  const float special[] = {0.0f,     -0.0f, 1e-45f,   1.0f,     -1.0f,    3.4e38f,
                           INFINITY, NAN,   0x1p120f, 0x1p-60f, 0x1p-61f, 2.0f};
  const auto from_bits = [](uint32_t bits) { return bits_float(bits); };
  int plain = 0;
  constexpr int kGroups = 4000000;
  for (int n = 0; n < kGroups; ++n) {
    float a[4];
    for (float& x : a) {
      const uint64_t r = random();
      switch (n % 8) {
        case 0: x = normal(random); break;
        case 1: x = to_float(from_float<BFloat16>(normal(random))); break;
        case 2: x = static_cast<float>(static_cast<int>(r % 5) - 2); break;
        case 3: x = special[r % 12]; break;
        case 4: x = from_bits(static_cast<uint32_t>(r)); break;
        case 5:
          x = r >> 21 & 3 ? from_bits(0x3F800000u + static_cast<uint32_t>(r % 9) - 4) : 0.0f;
          break;
        case 6:
          x = from_bits(0x3F800000u + (r & 0xFFFFFFu)) * (r >> 40 & 3 ? 1.0f : 0x1p-20f);
          break;
        default: x = std::ldexp(normal(random), static_cast<int>(r % 140) - 70); break;
      }
    }
    const uint64_t r = random();
    if (r & 1) a[r >> 1 & 3] = a[0] + a[1] + a[2];
    uint32_t bits = static_cast<uint32_t>(r >> 32);
    switch (r >> 4 & 7) {
      case 0: bits = 0; break;
      case 1: bits = 0xFFFFFFFFu; break;
      case 2: {  // a target next to a running sum
        const double sum = std::fabs(a[0]) + std::fabs(a[1]) + std::fabs(a[2]) + std::fabs(a[3]);
        const double at = (std::fabs(a[0]) + (r >> 8 & 1 ? std::fabs(a[1]) : 0.0)) / (sum / 2);
        const double u = at >= 1 ? at - 1 : at;
        if (u >= 0 && u < 1)
          bits = (static_cast<uint32_t>(u * 4194304.0) + static_cast<uint32_t>(r >> 9 & 3)) << 10;
        break;
      }
      default: break;
    }
    float kept = kCounter;
    const MvueDraw draw = draw_plain(a, bits, 1.0f, kept);
    if (!are_plain(draw, draw)) continue;
    ++plain;
    const MvuePick pick = mvue_group(a, mvue_uniform(bits));
    const float first = draw.other_first ? draw.other : draw.drawn,
                second = draw.other_first ? draw.drawn : draw.other;
    expect(meta_from_bits(float_bits(kept) & 0xFu) == pick.nibble,
           "draw_plain keeps what mvue_group keeps");
    expect(float_bits(first) == float_bits(pick.first_value) &&
               float_bits(second) == float_bits(pick.second_value),
           "draw_plain gives the values of mvue_group");
  }
  expect(plain > kGroups / 2, "most groups are plain");
}

}  // namespace

int main() {
  test_raster_visits_every_tile_once();
  test_patches_cover_the_tile_once();
  test_paired_lanes_get_their_own_elements();
  test_every_byte_of_E_is_staged_once();
  test_eight_nibbles_as_one();
  test_a_tile_finds_its_tensor();
  test_plain_draw_has_the_bits_of_mvue_group();
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
