// One group of MVUE: what it keeps, at both ends of the uniform number and on average.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>

#include "pack/mvue_group.h"
#include "testing.h"

using namespace sparse24;

namespace {

struct Group {
  float a[4];
};

int nonzeros(const Group& group) {
  return static_cast<int>(std::count_if(group.a, group.a + 4, [](float x) { return x != 0; }));
}

constexpr uint32_t kLowest = 0, kHighest = 0xFFFF;

/// What holds for any group of finite values and any uniform number.
void check_pick(const Group& group, float u) {
  const MvuePick pick = mvue_group(group.a, u);
  const uint32_t first = pick.nibble & 3u, second = pick.nibble >> 2;
  CHECK(first < second && second < 4);
  CHECK_EQ((pick.first_value != 0) + (pick.second_value != 0), std::min(2, nonzeros(group)));
  const float values[2] = {pick.first_value, pick.second_value};
  const uint32_t places[2] = {first, second};
  for (int i = 0; i < 2; ++i) {
    const float original = group.a[places[i]];
    CHECK((values[i] == 0) == (original == 0));
    if (original != 0) CHECK(std::signbit(values[i]) == std::signbit(original));
    // Nothing is scaled down: 1/p >= 1, up to rounding of the sum.
    CHECK(std::fabs(values[i]) >= std::fabs(original) * (1 - 1e-6f));
  }
}

Group random_group(std::mt19937& random, int kind) {
  std::normal_distribution<float> normal;
  Group group;
  for (float& x : group.a) {
    switch (kind) {
      case 0: x = normal(random); break;
      case 1: x = std::exp(4 * normal(random)) * (random() % 2 ? 1.0f : -1.0f); break;
      case 2: x = random() % 2 ? normal(random) : 0.0f; break;
      case 3: x = static_cast<float>(static_cast<int>(random() % 5) - 2); break;
      case 4: x = 1e-44f * static_cast<float>(random() % 4); break;
      default: x = 1.5e38f * (static_cast<float>(random() % 2001) / 1000.0f - 1.0f); break;
    }
  }
  return group;
}
constexpr int kKinds = 6;

}  // namespace

TEST(uniforms_are_the_middles_of_a_grid) {
  for (uint32_t k = kLowest; k <= kHighest; ++k)
    CHECK_EQ(mvue_uniform(k), std::ldexp(2.0f * static_cast<float>(k) + 1.0f, -17));
}

TEST(products_round_towards_zero) {
  std::mt19937 random(3);
  for (int n = 0; n < 100000; ++n) {
    const float u = mvue_uniform(random() & 0xFFFFu);
    const float b = bits_float(random() % 0x7F800000u);
    const float down = multiply_down(u, b);
    const double exact = static_cast<double>(u) * static_cast<double>(b);
    CHECK(down <= exact && bits_float(float_bits(down) + 1u) > exact);
  }
}

TEST(two_are_picked_wherever_two_are_nonzero) {
  std::mt19937 random(1);
  for (int n = 0; n < 300000; ++n) {
    const Group group = random_group(random, n % kKinds);
    for (uint32_t bits : {kLowest, kHighest, static_cast<uint32_t>(random()) & 0xFFFFu})
      check_pick(group, mvue_uniform(bits));
  }
}

TEST(every_uniform_leaves_two_picks_in_awkward_groups) {
  // Magnitudes whose running sums meet the points u base and (1 - u) base as closely as possible:
  // p = 1 beside small neighbours, ties, zeros in each place, the smallest denormals.
  const float eps = 0x1p-23f, low = 0x1p-149f, low16 = 0x1p-133f;
  const Group groups[] = {
      {{1, 1, 1, 1}},         {{2, 1, 1, 0}},         {{1 + eps, 1, 0x1p-17f, 0}},
      {{1, 0, 2, 0x1p-17f}},  {{3, 1, 1, 1}},         {{5, 1, 1, 1 + eps}},
      {{low, low, low, 0}},   {{low, low, 0, 0}},     {{low16, low16, 0, 0}},
      {{low16, 0, low16, 1}}, {{255, 0, 256, 1}},     {{0.1f, 0.2f, 0.3f, 0.6f}},
      {{1, 0x1p-16f, 1, 0}},  {{1, 0x1p-24f, 1, 1}},  {{1e30f, 3e38f, 3e38f, 1}},
      {{65535, 1, 65536, 0}}, {{65535, 1, 65536, 1}}, {{1 - eps / 2, 0x1p-25f, 1, 0x1p-24f}}};
  for (const Group& base : groups) {
    Group group = base;
    std::sort(group.a, group.a + 4);
    do {
      for (uint32_t k = kLowest; k <= kHighest; k += k < 256 || k >= kHighest - 256 ? 1 : 17)
        check_pick(group, mvue_uniform(k));
    } while (std::next_permutation(group.a, group.a + 4));
  }
}

TEST(picks_are_unbiased) {
  // The mean over all uniforms differs from the value by less than one cell of their grid times the
  // largest jump of the estimate.
  std::mt19937 random(2);
  for (int n = 0; n < 200; ++n) {
    const Group group = random_group(random, n % kKinds);
    constexpr int kDraws = 1 << 16;
    double mean[4] = {};
    double sum = 0;
    for (float x : group.a) sum += std::fabs(x);
    for (uint32_t draw = 0; draw < kDraws; ++draw) {
      const MvuePick pick = mvue_group(group.a, mvue_uniform(draw));
      mean[pick.nibble & 3u] += static_cast<double>(pick.first_value) / kDraws;
      mean[pick.nibble >> 2] += static_cast<double>(pick.second_value) / kDraws;
    }
    for (int i = 0; i < 4; ++i) {
      const double error = std::fabs(mean[i] - group.a[i]);
      // A kept denormal is rounded to its last place, 2^-149.
      if (error > 3.0 / kDraws * sum + std::ldexp(1.0, -149)) {
        testing::fail(__FILE__, __LINE__,
                      "mean " + testing::show(mean[i]) + " of element " +
                          testing::show(group.a[i]) + ", kind " + testing::show(n % kKinds));
      }
    }
  }
}

TEST(a_level_group_keeps_half_its_sum) {
  const Group group{{1.0f, -2.0f, 3.0f, 4.0f}};
  for (uint32_t bits = 0; bits < 1024; ++bits) {
    const MvuePick pick = mvue_group(group.a, mvue_uniform(bits << 6));
    CHECK_EQ(std::fabs(pick.first_value), 5.0f);
    CHECK_EQ(std::fabs(pick.second_value), 5.0f);
  }
}

TEST(a_dominating_element_is_kept_as_it_is) {
  const Group group{{0.5f, -100.0f, 0.25f, 0.25f}};
  for (uint32_t bits = 0; bits < 1024; ++bits) {
    const MvuePick pick = mvue_group(group.a, mvue_uniform(bits << 6));
    const bool is_first = (pick.nibble & 3u) == 1u;
    CHECK(is_first || (pick.nibble >> 2) == 1u);
    CHECK_EQ(is_first ? pick.first_value : pick.second_value, -100.0f);
    CHECK_EQ(is_first ? pick.second_value : pick.first_value, 1.0f);
  }
}

TEST(zeros_keep_the_padding_positions) {
  for (uint32_t bits : {kLowest, kHighest}) {
    for (float zero : {0.0f, -0.0f}) {
      const Group group{{zero, zero, zero, zero}};
      const MvuePick pick = mvue_group(group.a, mvue_uniform(bits));
      CHECK_EQ(pick.nibble, 0x4u);
      CHECK_EQ(pick.first_value, 0.0f);
      CHECK_EQ(pick.second_value, 0.0f);
    }
  }
}

TEST(inf_and_nan_survive) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (float special : {inf, -inf, nan})
    for (int at = 0; at < 4; ++at)
      for (uint32_t bits : {kLowest, kHighest}) {
        Group group{{1.0f, 2.0f, 3e38f, 0.0f}};
        group.a[at] = special;
        const MvuePick pick = mvue_group(group.a, mvue_uniform(bits));
        const bool is_first = static_cast<int>(pick.nibble & 3u) == at;
        CHECK(is_first || static_cast<int>(pick.nibble >> 2) == at);
        const float kept = is_first ? pick.first_value : pick.second_value;
        CHECK(std::isnan(special) ? std::isnan(kept) : kept == special);
      }
}

TEST(groups_that_are_not_finite_keep_two_as_they_are_what_is_not_finite_first) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (int code = 0; code < 81; ++code) {
    Group group;
    uint32_t order[4], count = 0;  // places: those of Inf and NaN, then the others
    for (int i = 0, rest = code; i < 4; ++i, rest /= 3)
      group.a[i] = rest % 3 == 0 ? -1.5f - static_cast<float>(i) : rest % 3 == 1 ? -inf : nan;
    for (bool finite : {false, true})
      for (uint32_t i = 0; i < 4; ++i)
        if (std::isfinite(group.a[i]) == finite) order[count++] = i;
    if (std::isfinite(group.a[order[0]])) continue;
    const uint32_t first = std::min(order[0], order[1]), second = std::max(order[0], order[1]);
    for (uint32_t bits : {kLowest, 0x5555u, kHighest}) {
      const MvuePick pick = mvue_group(group.a, mvue_uniform(bits));
      CHECK_EQ(pick.nibble, first | second << 2);
      CHECK_EQ(float_bits(pick.first_value), float_bits(group.a[first]));
      CHECK_EQ(float_bits(pick.second_value), float_bits(group.a[second]));
    }
  }
}

TEST(a_power_of_two_times_a_group_is_that_power_times_its_picks) {
  // Denormals, and groups with an infinite sum, take ways of their own; denormals of bf16, whose
  // lower bits are zeros, take none. Even numbers, so that half a sum of them is exact wherever
  // they lie: below 2^11, and below 2^6 as bf16 takes them.
  const int fp32[] = {-149, -140, -120, -112, -80, -20, 40, 80, 110, 116};
  const int bf16[] = {-133, -130, -126, -118};
  std::mt19937 random(4);
  for (int n = 0; n < 20000; ++n) {
    const int limit = n % 2 ? 31 : 1023;
    Group group;
    for (float& x : group.a)
      x = 2.0f * static_cast<float>(static_cast<int>(random() % (2 * limit + 1)) - limit);
    const float u = mvue_uniform(random() & 0xFFFFu);
    const MvuePick pick = mvue_group(group.a, u);
    const auto check = [&](int power) {
      Group scaled;
      for (int i = 0; i < 4; ++i) scaled.a[i] = std::ldexp(group.a[i], power);
      const MvuePick other = mvue_group(scaled.a, u);
      CHECK_EQ(other.nibble, pick.nibble);
      CHECK_EQ(other.first_value, std::ldexp(pick.first_value, power));
      CHECK_EQ(other.second_value, std::ldexp(pick.second_value, power));
    };
    if (n % 2)
      for (int power : bf16) check(power);
    else
      for (int power : fp32) check(power);
  }
}

TEST(eight_groups_share_the_halves_of_four_words) {
  Philox4 random;  // its halves are 0xA001, 0xA002, ... 0xA008, the lower half of each word first
  for (uint32_t i = 0; i < 4; ++i) random.word[i] = (0xA002u + 2 * i) << 16 | (0xA001u + 2 * i);
  for (int group = 0; group < 2; ++group)
    for (int feature = 0; feature < 4; ++feature) {
      CHECK_EQ(mvue_bits(random, group, feature), 0xA001u + 4 * group + feature);
      CHECK_EQ(mvue_rounding_bits(random, group, feature), 0xA001u + 4 * group + (feature ^ 1));
    }
}

TEST(neighbouring_features_draw_different_numbers) {
  const PhiloxKey key = philox_key(7, 8);
  const Philox4 a = mvue_random(key, 0, 0), b = mvue_random(key, 0, 1), c = mvue_random(key, 1, 0);
  for (int i = 0; i < 4; ++i) CHECK(a.word[i] != b.word[i] && a.word[i] != c.word[i]);
}

TEST_MAIN()
