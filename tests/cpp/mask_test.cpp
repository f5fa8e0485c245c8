// The block search against brute force over all 90 patterns, in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>

#include "mask/block_search.h"
#include "mask/patterns.h"
#include "testing.h"

using namespace sparse24;

namespace {

struct Block {
  float w[4][4];
};

double kept_magnitude(const Block& block, uint16_t mask) {
  double sum = 0;
  for (int e = 0; e < 16; ++e)
    if (mask >> e & 1) sum += ranked_magnitude(block.w[e / 4][e % 4]);
  return sum;
}

double best_magnitude(const Block& block) {
  double best = 0;
  for (uint16_t pattern : kPatternTable.mask) best = std::max(best, kept_magnitude(block, pattern));
  return best;
}

/// Within 4 ulp of fp32 at the scale of the block's sum: the search's differences are fp32.
void check_best(const Block& block) {
  const uint16_t mask = search_block(block.w);
  CHECK(is_transposable(mask));
  const double best = best_magnitude(block), kept = kept_magnitude(block, mask);
  if (kept < best * (1 - 4 * std::ldexp(1.0, -23))) {
    testing::fail(__FILE__, __LINE__,
                  "kept " + testing::show(kept) + " of " + testing::show(best) + ", mask " +
                      testing::show(mask));
  }
}

template <typename Draw>
void check_many(int count, const Draw& draw) {
  for (int n = 0; n < count; ++n) {
    Block block;
    for (auto& row : block.w)
      for (float& x : row) x = draw();
    check_best(block);
  }
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
  for (int bits = 0; bits < 65536; ++bits) {
    Block block;
    for (int e = 0; e < 16; ++e) block.w[e / 4][e % 4] = bits >> e & 1 ? 1.0f : 0.0f;
    const uint16_t mask = search_block(block.w);
    CHECK(is_transposable(mask));
    CHECK_EQ(kept_magnitude(block, mask), best_magnitude(block));
  }
}

TEST(search_is_exact_on_small_integers) {
  std::mt19937 random(1);
  for (int n = 0; n < 100000; ++n) {
    Block block;
    for (auto& row : block.w)
      for (float& x : row) x = static_cast<float>(static_cast<int>(random() % 15) - 7);
    const uint16_t mask = search_block(block.w);
    CHECK(is_transposable(mask));
    CHECK_EQ(kept_magnitude(block, mask), best_magnitude(block));
  }
}

TEST(search_keeps_the_most_magnitude_of_gaussian_blocks) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  check_many(100000, [&] { return normal(random); });
  check_many(50000, [&] { return std::exp(8 * normal(random)); });
}

TEST(search_takes_any_value) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const float values[] = {0.0f,          -0.0f,          1e-45f, 1.0f, -1.0f,
                          3.4028235e38f, -3.4028235e38f, inf,    -inf, nan};
  std::mt19937 random(3);
  check_many(200000, [&] { return values[random() % 10]; });
}

TEST(nan_is_kept_before_everything_else) {
  std::mt19937 random(4);
  for (int at = 0; at < 16; ++at) {
    Block block;
    for (auto& row : block.w)
      for (float& x : row) x = random() % 2 ? std::numeric_limits<float>::infinity() : 1.0f;
    block.w[at / 4][at % 4] = std::nanf("");
    CHECK(search_block(block.w) >> at & 1);
  }
}

TEST(ties_go_by_the_documented_order) {
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
