// Philox, conversions and the order of metadata.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/convert.h"
#include "common/metadata.h"
#include "common/philox.h"
#include "pack/pack_group.h"
#include "testing.h"

using namespace sparse24;

namespace {

/// The nearest 16-bit value by search among all of them: ties to the even code, overflow as IEEE
/// has it.
template <typename T>
class NearestByTable {
 public:
  NearestByTable() {
    for (uint32_t code = 0; code < 0x8000; ++code) {
      const float value = to_float(T{static_cast<uint16_t>(code)});
      if (std::isfinite(value)) finite_.push_back(value);
    }
  }

  uint16_t round(float x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::fabs(static_cast<double>(x));
    size_t above = std::lower_bound(finite_.begin(), finite_.end(), magnitude) - finite_.begin();
    const size_t last = finite_.size() - 1;  // the code of infinity follows that of the largest
    const double upper = above <= last ? finite_[above] : 2.0 * finite_[last] - finite_[last - 1];
    if (above > last) above = last + 1;
    if (above == 0 || upper == magnitude) return sign | static_cast<uint16_t>(above);
    const double down = magnitude - finite_[above - 1], up = upper - magnitude;
    const bool go_up = up < down || (up == down && above % 2 == 0);
    return sign | static_cast<uint16_t>(go_up ? above : above - 1);
  }

 private:
  std::vector<double> finite_;
};

template <typename T>
void check_rounding(uint32_t seed) {
  const NearestByTable<T> table;
  std::mt19937 random(seed);
  const auto check = [&](uint32_t bits) {
    const float x = bits_float(bits);
    if (std::isnan(x)) {
      CHECK_EQ(from_float<T>(x).bits, 0x7FFFu);  // which is what a GPU writes
    } else {
      CHECK_EQ(from_float<T>(x).bits, table.round(x));
    }
  };
  for (int n = 0; n < 1000000; ++n) check(random());
  // Around every representable value and every midpoint between two.
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const float value = to_float(T{static_cast<uint16_t>(code)});
    const float next = to_float(T{static_cast<uint16_t>(code + 1)});
    for (float x : {value, 0.5f * value + 0.5f * next})
      for (int step = -1; step <= 1; ++step) check(float_bits(x) + static_cast<uint32_t>(step));
  }
}

template <typename T>
void check_round_trip() {
  for (uint32_t code = 0; code < 0x10000; ++code) {
    const T x{static_cast<uint16_t>(code)};
    if (!std::isnan(to_float(x))) CHECK_EQ(from_float<T>(to_float(x)).bits, x.bits);
  }
}

}  // namespace

TEST(philox_gives_the_published_vectors) {
  // Random123's known answers for philox4x32-10.
  struct Known {
    uint32_t counter[4], key[2], expected[4];
  };
  const Known known[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const Known& k : known) {
    const Philox4 got = philox4x32_10({{k.counter[0], k.counter[1], k.counter[2], k.counter[3]}},
                                      k.key[0], k.key[1]);
    for (int i = 0; i < 4; ++i) CHECK_EQ(got.word[i], k.expected[i]);
  }
}

TEST(every_bit_of_a_seed_pair_reaches_the_key) {
  const PhiloxKey key = philox_key(0x0123456789abcdef, static_cast<int64_t>(0xfedcba9876543210u));
  CHECK_EQ(key.key0, 0x89abcdefu);
  CHECK_EQ(key.key1, 0x01234567u);
  CHECK_EQ(key.stream0, 0x76543210u);
  CHECK_EQ(key.stream1, 0xfedcba98u);
}

TEST(sixteen_bit_values_survive_a_round_trip) {
  check_round_trip<BFloat16>();
  check_round_trip<Float16>();
}

TEST(float16_means_what_ieee_says) {
  for (uint32_t code = 0; code < 0x8000; ++code) {
    const int exponent = static_cast<int>(code >> 10), fraction = static_cast<int>(code & 0x3ff);
    const float got = to_float(Float16{static_cast<uint16_t>(code)});
    if (exponent == 31) {
      CHECK(fraction == 0 ? std::isinf(got) : std::isnan(got));
    } else {
      const double expected =
          exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      CHECK_EQ(got, expected);
    }
    const float negative = to_float(Float16{static_cast<uint16_t>(code | 0x8000)});
    CHECK(std::isnan(got) ? std::isnan(negative) : float_bits(negative) == float_bits(-got));
  }
}

TEST(bfloat16_rounds_to_nearest_even) { check_rounding<BFloat16>(1); }
TEST(float16_rounds_to_nearest_even) { check_rounding<Float16>(2); }

TEST(metadata_bytes_follow_the_hardware_order) {
  // The order told the other way round: walk through memory, and count up what changes fastest.
  for (const int64_t rows : {64, 128, 192, 320}) {
    const int64_t cols = 192;
    int64_t address = 0;
    for (int64_t block_k = 0; block_k < cols; block_k += 64)
      for (int64_t block_m = 0; block_m < rows; block_m += 64)
        for (int64_t m16 = 0; m16 < 64; m16 += 16)          // one warp's rows of wgmma
          for (int64_t k16 = 0; k16 < 32; k16 += 16)        // halves of a 32-wide step
            for (int64_t m1 = 0; m1 < 8; ++m1)              // rows of an 8-row matrix
              for (int64_t k32 = 0; k32 < 64; k32 += 32)    // steps of a 64-wide tile
                for (int64_t m8 = 0; m8 < 16; m8 += 8)      // upper and lower 8 rows
                  for (int64_t k8 = 0; k8 < 16; k8 += 8) {  // two bytes make 16 elements
                    const int64_t m = block_m + m16 + m8 + m1, k = block_k + k32 + k16 + k8;
                    CHECK_EQ(meta_byte_offset(m, k, rows), address);
                    ++address;
                  }
    CHECK_EQ(address, meta_bytes(rows, cols));
  }
}

TEST(metadata_of_ragged_extents_fill_whole_blocks) {
  CHECK_EQ(meta_bytes(4, 8), 512);
  CHECK_EQ(meta_bytes(65, 64), 1024);
  CHECK_EQ(meta_bytes(0, 64), 0);
  for (int64_t m = 0; m < 68; ++m)
    CHECK_EQ(meta_byte_offset(m, 0, 68), meta_byte_offset(m, 0, 128));
}

TEST(positions_come_from_kept_bits) {
  for (uint32_t kept = 0; kept < 16; ++kept) {
    if (__builtin_popcount(kept) != 2) continue;
    const uint32_t nibble = meta_from_bits(kept);
    CHECK(meta_is_valid(nibble));
    CHECK_EQ(1u << meta_first(nibble) | 1u << meta_second(nibble), kept);
  }
  CHECK_EQ(meta_from_bits(0x3), kPaddingNibble);
}

TEST(rows_and_columns_of_a_mask_are_those_of_its_bits) {
  for (uint32_t mask = 0; mask < 0x10000; ++mask)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) {
        const uint32_t bit = mask >> (4 * i + j) & 1;
        CHECK_EQ(mask_row(mask, i) >> j & 1, bit);
        CHECK_EQ(mask_column(mask, j) >> i & 1, bit);
      }
}

TEST_MAIN()
