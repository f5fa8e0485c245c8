// kernel_index_test.cpp: arithmetic of the GPU kernels that is no plain function of its own,
// replayed on the CPU: what paired lanes load and exchange, where the bytes of E wait, and the
// branch-free MVUE draw of two groups side by side against mvue_group.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "activation/tile_place.h"
#include "common/convert.h"
#include "common/metadata.h"
#include "common/tile.h"
#include "pack/mvue_group.h"
#include "pack/mvue_pair.h"
#include "testing.h"

using namespace sparse24;

// As load_patch32 does, in element numbers along a line.
TEST(paired_lanes_end_up_with_their_own_elements) {
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
      CHECK(along_odd == along_even + c.half_line);  // a pair's patches are half a line apart
      CHECK((by_rows ? even.row : even.col) ==
            (by_rows ? odd.row : odd.col));  // a pair shares its lines
      const int near_even = along_even, near_odd = along_odd - c.half_line + 4;
      CHECK(near_odd == near_even + 4);  // a pair loads neighbouring vectors
      // Even owns near of both, odd owns far of both.
      CHECK(near_odd == along_even + 4 &&
            near_even + c.half_line == along_odd);  // a pair exchanges halves
    }
  }
}

TEST(every_patch_of_a_tile_has_one_thread) {
  for (const Walk walk : {Walk::kRows, Walk::kSquare, Walk::kTall}) {
    std::vector<int> taken(kTileThreads, 0);
    for (uint32_t thread = 0; thread < kTileThreads; ++thread) {
      const PatchOrigin origin = patch_origin(walk, false, thread);
      CHECK(origin.row % kPatch == 0 && origin.row < kTileRows);
      CHECK(origin.col % kPatch == 0 && origin.col < kTileCols);
      ++taken[origin.row / kPatch * (kTileCols / kPatch) + origin.col / kPatch];
    }
    for (const int count : taken) CHECK_EQ(count, 1);
  }
}

TEST(every_byte_of_E_is_staged_once) {
  std::vector<int> written(2 * kTileMetaBlocks * kStageStride, 0);
  for (uint32_t thread = 0; thread < kTileThreads; ++thread) {
    const PatchOrigin origin = patch_origin(Walk::kRows, false, thread);
    const uint32_t block = origin.col / kMetaBlock, col = origin.col % kMetaBlock;
    for (int i = 0; i < kPatch; ++i) {
      const uint32_t row_byte = stage_offset(block, origin.row, col) + 8 * i;
      const uint32_t col_byte = stage_offset(kTileMetaBlocks + block, col, origin.row) + 8 * i;
      CHECK(row_byte ==
            stage_offset(block, origin.row + i, col));  // lines of a patch are 8 bytes apart in E
      CHECK(col_byte == stage_offset(kTileMetaBlocks + block, col + i, origin.row));  // and in E_t
      ++written[row_byte], ++written[col_byte];
    }
  }
  for (size_t i = 0; i < written.size(); ++i) {
    const bool in_block = i % kStageStride < kMetaBlockBytes;
    CHECK(written[i] == (in_block ? 1 : 0));  // every byte of the staged blocks is written once
  }
}

// backward_tiles.cuh: both halves of a tile, in the order of its loop, and what a warp stores of
// packed.
TEST(threads_of_a_tile_stage_every_byte_of_both_halves_once) {
  constexpr int kTokenPatches = kTileRows / kPatch, kFeaturePatches = kTileCols / kPatch;
  std::vector<int> written(2 * kTileMetaBlocks * kStageStride, 0);
  for (uint32_t thread = 0; thread < kTileThreads; ++thread) {
    const TilePlace at = tile_place<kTokenPatches, kFeaturePatches>(thread);
    const uint32_t row = at.token * kPatch, col = at.feature * kPatch;
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t block = col / kMetaBlock + half * kTileMetaBlocks;
      for (uint32_t i = 0; i < kPatch; ++i) {
        const uint32_t byte = stage_offset(block, col % kMetaBlock, row) + 8 * i;
        CHECK(byte == stage_offset(block, col % kMetaBlock + i, row));
        ++written[byte];
      }
    }
  }
  for (size_t i = 0; i < written.size(); ++i)
    CHECK(written[i] == (i % kStageStride < kMetaBlockBytes ? 1 : 0));
}

TEST(warps_of_a_tile_store_aligned_pieces_of_64_bytes) {
  constexpr int kTokenPatches = kTileRows / kPatch, kFeaturePatches = kTileCols / kPatch;
  for (uint32_t warp = 0; warp < kTileThreads / 32; ++warp) {
    std::vector<int> lanes(kTokenPatches * kFeaturePatches / 4, 0);  // of four patches of a token
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const TilePlace at = tile_place<kTokenPatches, kFeaturePatches>(warp * 32 + lane);
      ++lanes[at.token * (kFeaturePatches / 4) + at.feature / 4];
    }
    for (const int count : lanes) CHECK(count == 0 || count == 4);
  }
}

// Where there is no copy engine, threads copy a tile as it would: whole lines, one behind the other.
TEST(threads_copy_each_vector_of_a_tile_once_and_stage_it_where_its_patch_is_read) {
  constexpr int kSide = 8, kTokenPatches = kTileRows / kPatch, kFeaturePatches = kTileCols / kPatch;
  constexpr int kThreads = kTokenPatches * kFeaturePatches;
  for (const bool column_major : {false, true}) {
    const int per_line = column_major ? kTokenPatches : kFeaturePatches;
    std::vector<int> staged(kThreads * kSide, -1);  // line and place, by vector of shared memory
    for (int i = 0; i < kSide; ++i)
      for (uint32_t thread = 0; thread < kThreads; ++thread) {
        const TileVector v = tile_vector(thread, kThreads, i, per_line);
        CHECK(v.staged % 16 == 0 && staged[v.staged / 16] == -1);
        staged[v.staged / 16] = v.line * per_line + v.along;
      }
    for (uint32_t thread = 0; thread < kThreads; ++thread) {
      const TilePlace at = tile_place<kTokenPatches, kFeaturePatches>(thread);
      const int lines = kSide * (column_major ? at.feature : at.token);
      for (int i = 0; i < kSide; ++i) {  // PatchTile::Place: the patch's i-th line
        const int along = column_major ? at.token : at.feature;
        CHECK_EQ(staged[(lines + i) * per_line + along], (lines + i) * per_line + along);
      }
    }
  }
}

// Groups made to be difficult: few mantissa bits (ties, exact sums), zeros of both signs,
// denormals, Inf and NaN, one element equal to the sum of the others, all magnitudes, and uniforms
// at both ends and around the running sums.
template <typename T>
struct DifficultGroups {
  std::mt19937_64 random{20240407};
  std::normal_distribution<float> normal;
  int count = 0;

  uint16_t element() {
    const uint64_t r = random();
    const auto rounded = [](float x) { return from_float<T>(x).bits; };
    const uint16_t special[] = {0,      0x8000, 1,      0x8001, 2,      0x7F80, 0xFF80, 0x7FC0,
                                0x7F7F, 0x0080, 0x007F, 0x3F80, 0xBF80, 0x4000, 0x7C00, 0x7BFF};
    switch (count % 8) {
      case 0: return rounded(normal(random));
      case 1: return rounded(normal(random) * (r & 1 ? 1.0f : 1e-3f));
      case 2: return rounded(static_cast<float>(static_cast<int>(r % 5) - 2));
      case 3: return special[r % 16];
      case 4: return static_cast<uint16_t>(r);
      case 5: return r >> 21 & 3 ? static_cast<uint16_t>(r % 9) : 0;
      case 6: return static_cast<uint16_t>(r & 0x80FFu);
      default: return rounded(std::ldexp(normal(random), static_cast<int>(r % 60) - 30));
    }
  }

  /// The next group, and the 16 random bits to prune it with.
  uint32_t next(uint16_t (&bits)[4]) {
    ++count;
    float b[4];
    for (int i = 0; i < 4; ++i) bits[i] = element(), b[i] = abs_float(to_float(T{bits[i]}));
    const uint64_t r = random();
    if (r & 1) {
      const int at = r >> 1 & 3;
      b[at] = 0;
      bits[at] = from_float<T>(b[0] + b[1] + b[2] + b[3]).bits;
      b[at] = abs_float(to_float(T{bits[at]}));
    }
    switch (r >> 4 & 7) {
      case 0: return 0;
      case 1: return 0xFFFF;
      case 2:
      case 3: {  // a point next to a running sum
        const double sum = double{b[0]} + b[1] + b[2] + b[3];
        const double base =
            std::fmin(sum / 2, sum - std::fmax(std::fmax(b[0], b[1]), std::fmax(b[2], b[3])));
        const double passed[] = {b[3] / base, (double{b[2]} + b[3]) / base, 1 - b[0] / base,
                                 1 - (double{b[0]} + b[1]) / base};
        const double k = passed[r >> 8 & 3] * 65536 + static_cast<double>(r >> 10 & 3) - 2;
        if (k >= 0 && k <= 65535) return static_cast<uint32_t>(k);
        break;
      }
      default: break;
    }
    return static_cast<uint32_t>(r >> 32) & 0xFFFFu;
  }
};

template <typename T>
void check_pairs_against_groups() {
  DifficultGroups<T> groups;
  constexpr int kPairs = 2000000;
  int finite = 0;
  for (int n = 0; n < kPairs; ++n) {
    uint16_t bits[2][4];
    const uint32_t k[2] = {groups.next(bits[0]), groups.next(bits[1])};
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = bits[0][i] | static_cast<uint32_t>(bits[1][i]) << 16;
    float check = 0.0f;
    const PrunedPair pair = prune_pair<T>(words, mvue_uniform(k[0]), mvue_uniform(k[1]), check);
    bool all_finite = true;
    for (int f = 0; f < 2; ++f) {
      float a[4];
      for (int i = 0; i < 4; ++i) a[i] = to_float(T{bits[f][i]});
      const float sum = (abs_float(a[0]) + abs_float(a[1])) + (abs_float(a[2]) + abs_float(a[3]));
      all_finite = all_finite && has_finite_sum(sum);
      if (check != 0.0f) continue;
      const MvuePick pick = mvue_group(a, mvue_uniform(k[f]));
      CHECK((pair.nibbles >> (16 * f) & 0xFFFFu) == pick.nibble * 0x1111u);  // the same positions
      CHECK((pair.first >> (16 * f) & 0xFFFFu) == from_float<T>(pick.first_value).bits &&
            (pair.second >> (16 * f) & 0xFFFFu) == from_float<T>(pick.second_value).bits);
    }
    CHECK((check == 0.0f) == all_finite);  // the check sees what is not finite, and nothing else
    finite += all_finite;
  }
  CHECK(finite > kPairs / 2);  // most groups are compared
}

TEST(pairs_have_the_bits_of_mvue_group_bf16) { check_pairs_against_groups<BFloat16>(); }
TEST(pairs_have_the_bits_of_mvue_group_fp16) { check_pairs_against_groups<Float16>(); }

TEST_MAIN()
