// kernel_index_test.cpp: arithmetic of the GPU kernels that is no plain function of its own,
// replayed on the CPU: what paired lanes load and exchange, where the bytes of E wait, and the
// branch-free MVUE draw against mvue_group.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "common/convert.h"
#include "common/metadata.h"
#include "common/tile.h"
#include "compress/mvue_draw.h"
#include "compress/mvue_group.h"
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

// Groups made to be difficult: few mantissa bits (ties, exact sums), values around 1, zeros of
// both signs, one element equal to the sum of the others, all magnitudes, and uniforms at both
// ends and around the running sums.
TEST(plain_draws_have_the_bits_of_mvue_group) {
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
    CHECK(meta_from_bits(float_bits(kept) & 0xFu) ==
          pick.nibble);  // draw_plain keeps what mvue_group keeps
    CHECK(float_bits(first) == float_bits(pick.first_value) &&
          float_bits(second) ==
              float_bits(pick.second_value));  // draw_plain gives the values of mvue_group
  }
  CHECK(plain > kGroups / 2);  // most groups are plain
}

TEST_MAIN()
