// The block search against brute force over all 90 patterns, in double.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>

#include "common/convert.h"
#include "mask/block_search.h"
#include "mask/patterns.h"
#include "random.h"
#include "testing.h"

using namespace sparse24;
using testing::Random;

namespace {

struct Block {
  float w[4][4];
};

/// Blocks that are scored side by side, so that the compiler can use vectors.
constexpr int kLanes = 8;

/// What the best of all patterns keeps, of each of kLanes blocks. A pattern is four of the 24 sums
/// of two in a row.
void best_magnitudes(const Block (&blocks)[kLanes], double (&best)[kLanes]) {
  static constexpr int kPairs[6][2] = {{0, 1}, {0, 2}, {1, 2}, {0, 3}, {1, 3}, {2, 3}};
  static const auto choice = [] {  // of each pattern and row: which pair
    std::array<std::array<int, 4>, kPatterns> choices{};
    for (int p = 0; p < kPatterns; ++p)
      for (int i = 0; i < 4; ++i)
        for (int c = 0; c < 6; ++c)
          if ((kPatternTable.mask[p] >> (4 * i) & 0xF) == (1 << kPairs[c][0] | 1 << kPairs[c][1]))
            choices[p][i] = c;
    return choices;
  }();
  double sum[4][6][kLanes];
  for (int i = 0; i < 4; ++i)
    for (int c = 0; c < 6; ++c)
      for (int n = 0; n < kLanes; ++n)
        sum[i][c][n] = static_cast<double>(ranked_magnitude(blocks[n].w[i][kPairs[c][0]])) +
                       static_cast<double>(ranked_magnitude(blocks[n].w[i][kPairs[c][1]]));
  for (double& x : best) x = 0;
  for (const auto& row : choice)
    for (int n = 0; n < kLanes; ++n) {
      const double kept =
          (sum[0][row[0]][n] + sum[1][row[1]][n]) + (sum[2][row[2]][n] + sum[3][row[3]][n]);
      best[n] = kept > best[n] ? kept : best[n];
    }
}

double kept_magnitude(const Block& block, uint16_t mask) {
  double row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = 0;
    for (int j = 0; j < 4; ++j)
      if (mask >> (4 * i + j) & 1) row[i] += static_cast<double>(ranked_magnitude(block.w[i][j]));
  }
  return (row[0] + row[1]) + (row[2] + row[3]);
}

enum class Sums { kExact, kRounded };

/// Draws `count` blocks, element by element, and holds the search against the brute force: equal
/// where sums of magnitudes are exact in fp32; else within 4 ulp of fp32 at the scale of the
/// block's sum, since the search's differences are fp32.
template <typename Draw>
void check_many(int count, Sums sums, const Draw& draw) {
  const double least = sums == Sums::kExact ? 1.0 : 1.0 - 4 * std::ldexp(1.0, -23);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  if (count > 100000) count /= 20;  // they look for accesses, not values, ten times as slowly
#endif
  for (int n = 0; n < count; n += kLanes) {
    Block blocks[kLanes];
    double best[kLanes];
    for (Block& block : blocks)
      for (auto& row : block.w)
        for (float& x : row) x = draw();
    best_magnitudes(blocks, best);
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint16_t mask = search_block(blocks[lane].w);
      CHECK(is_transposable(mask));
      const double kept = kept_magnitude(blocks[lane], mask);
      if (!(kept >= best[lane] * least && kept <= best[lane])) {
        testing::fail(__FILE__, __LINE__,
                      "kept " + testing::show(kept) + " of " + testing::show(best[lane]) +
                          ", mask " + testing::show(mask));
      }
    }
  }
}

/// A sum of four uniforms, in [-2, 2): bell-shaped, with all bits of fp32 in use.
float bell(Random& random) {
  float sum = -2.0f;
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = random.bits();
    sum += static_cast<float>(word >> 16) * 0x1p-16f;
    sum += static_cast<float>(word * 2654435761u) * 0x1p-32f;
  }
  return sum;
}

}  // namespace

TEST(there_are_90_patterns_all_transposable_and_distinct) {
  for (int p = 0; p < kPatterns; ++p) {
    CHECK(is_transposable(kPatternTable.mask[p]));
    for (int q = 0; q < p; ++q) CHECK(kPatternTable.mask[p] != kPatternTable.mask[q]);
  }
  int transposable = 0;
  for (int mask = 0; mask < 65536; ++mask)
    transposable += is_transposable(static_cast<uint16_t>(mask));
  CHECK_EQ(transposable, kPatterns);
}

TEST(search_is_exact_on_all_blocks_of_zeros_and_ones) {
  int number = 0, element = 0;
  check_many(65536, Sums::kExact, [&] {
    const float x = number >> element & 1 ? 1.0f : 0.0f;
    element = (element + 1) % 16;
    if (element == 0) ++number;
    return x;
  });
  CHECK_EQ(number, 65536);
}

TEST(search_is_exact_on_small_integers) {
  Random random(1);
  check_many(2000000, Sums::kExact, [&] { return static_cast<float>(random.below(15) - 7); });
}

// Ten million blocks, in these four.

TEST(search_keeps_the_most_magnitude_of_bell_shaped_blocks) {
  Random random(2);
  check_many(5000000, Sums::kRounded, [&] { return bell(random); });
}

TEST(search_keeps_the_most_magnitude_of_16_bit_blocks) {  // fault 3: fp16 sums past its range
  Random random(3);
  check_many(2000000, Sums::kRounded, [&] { return to_float(from_float<BFloat16>(bell(random))); });
  check_many(1000000, Sums::kRounded, [&] {
    return to_float(Float16{static_cast<uint16_t>((random.bits() & 0x83FF) | 0x7800)});
  });
}

TEST(search_keeps_the_most_magnitude_of_blocks_with_a_wide_range) {
  Random random(4);
  check_many(2000000, Sums::kRounded,
             [&] { return std::ldexp(bell(random), random.below(40) - 20); });
}

TEST(magnitudes_are_clamped_at_2_to_the_120) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (float huge : {0x1p120f, std::nextafter(0x1p120f, inf), 0x1p121f, 3.4028235e38f, inf})
    for (float sign : {1.0f, -1.0f}) CHECK_EQ(ranked_magnitude(sign * huge), 0x1p120f);
  CHECK_EQ(ranked_magnitude(std::nextafter(0x1p120f, 0.0f)), std::nextafter(0x1p120f, 0.0f));
  CHECK_EQ(ranked_magnitude(nan), 0x1p121f);
  CHECK_EQ(ranked_magnitude(-0.0f), 0.0f);
}

TEST(search_takes_any_value) {  // faults 1, 2, 4, 5, 6
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const float values[] = {0.0f,          -0.0f,          1e-45f, 1.0f, -1.0f,
                          3.4028235e38f, -3.4028235e38f, inf,    -inf, nan};
  Random random(5);
  check_many(3000000, Sums::kRounded, [&] { return values[random.below(10)]; });
}

TEST(search_ranks_what_16_bits_cannot_tell_apart) {  // fault 7
  Random random(6);
  check_many(1000000, Sums::kRounded,
             [&] { return 1.0f + static_cast<float>(random.bits() >> 20) * 0x1p-23f; });
  Block block;
  for (auto& row : block.w)
    for (float& x : row) x = 1.0f;
  for (int e : {0, 2, 5, 7, 8, 10, 13, 15}) block.w[e / 4][e % 4] += 0x1p-20f;
  CHECK_EQ(search_block(block.w), 0xA5A5);
}

TEST(denormals_are_ranked) {  // fault 6
  Block block{};
  for (int e : {1, 2, 4, 7, 9, 10, 12, 15}) block.w[e / 4][e % 4] = 1e-45f;
  CHECK_EQ(search_block(block.w), 0x9696);
}

TEST(nan_is_kept_before_everything_else) {  // fault 1
  std::mt19937 random(4);
  for (int at = 0; at < 16; ++at) {
    Block block;
    for (auto& row : block.w)
      for (float& x : row) x = random() % 2 ? std::numeric_limits<float>::infinity() : 1.0f;
    block.w[at / 4][at % 4] = std::nanf("");
    CHECK(search_block(block.w) >> at & 1);
  }
}

TEST(ties_go_by_the_documented_order) {  // faults 4, 5
  Block block{};
  CHECK_EQ(search_block(block.w), kFirstPattern);
  for (float level : {1.0f, -3.0f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    for (auto& row : block.w)
      for (float& x : row) x = level;
    CHECK_EQ(search_block(block.w), kFirstPattern);
  }
  for (auto& row : block.w)
    for (float& x : row) x = -0.0f;
  CHECK_EQ(search_block(block.w), kFirstPattern);
}

TEST(sign_does_not_matter) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (int n = 0; n < 1000; ++n) {
    Block block, flipped;
    for (int e = 0; e < 16; ++e) {
      block.w[e / 4][e % 4] = normal(random);
      flipped.w[e / 4][e % 4] = random() % 2 ? -block.w[e / 4][e % 4] : block.w[e / 4][e % 4];
    }
    CHECK_EQ(search_block(block.w), search_block(flipped.w));
  }
}

TEST(gap_is_the_distance_to_the_second_best_pattern) {
  std::mt19937 random(6);
  for (int n = 0; n < 20000; ++n) {
    Block block;
    for (auto& row : block.w)
      for (float& x : row) x = static_cast<float>(static_cast<int>(random() % 31) - 15);
    double best = -1, second = -1;
    for (uint16_t pattern : kPatternTable.mask) {
      const double kept = kept_magnitude(block, pattern);
      if (kept > best) {
        second = best, best = kept;
      } else {
        second = std::max(second, kept);
      }
    }
    CHECK_EQ(block_gap(block.w, kPatternTable), best - second);  // integers: exact
  }
}

TEST_MAIN()
