// The 8-bit formats: every code, every bf16 number, rounding at random, the order of E, the table.
#include "common/float8.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "common/format.h"
#include "sparse24/formats.h"
#include "testing.h"

using namespace sparse24;

namespace {

/// The value of a code, from the definition of the format.
template <typename F>
double value_of(uint32_t code) {
  using Traits = Float8Traits<F>;
  const int exponent = static_cast<int>(code >> Traits::kMantissaBits);
  const double fraction = code & ((1u << Traits::kMantissaBits) - 1u);
  const double one = 1 << Traits::kMantissaBits;
  return exponent == 0 ? std::ldexp(fraction / one, 1 - Traits::kBias)
                       : std::ldexp(1 + fraction / one, exponent - Traits::kBias);
}

template <typename F>
constexpr uint32_t kLargestCode = Float8Traits<F>::kMantissaBits == 3 ? 0x7Eu : 0x7Bu;

/// The nearest code of a finite magnitude, the even one of two; by looking at all of them.
template <typename F>
uint32_t nearest_code(double magnitude) {
  uint32_t best = 0;
  magnitude = std::min(magnitude, value_of<F>(kLargestCode<F>));  // saturating
  for (uint32_t code = 1; code <= kLargestCode<F>; ++code) {
    const double now = std::fabs(value_of<F>(code) - magnitude);
    const double before = std::fabs(value_of<F>(best) - magnitude);
    if (now < before || (now == before && code % 2 == 0)) best = code;
  }
  return best;
}

template <typename F>
void check_all_codes() {
  for (uint32_t code = 0; code < 256; ++code) {
    const uint32_t magnitude = code & 0x7Fu;
    const float value = to_float(F{static_cast<uint8_t>(code)});
    if (magnitude > kLargestCode<F>) {
      const bool inf = Float8Traits<F>::kMantissaBits == 2 && magnitude == 0x7Cu;
      CHECK(inf ? std::isinf(value) : std::isnan(value));
      CHECK_EQ(from_float<F>(value).bits, kNan8);
      continue;
    }
    CHECK_EQ(static_cast<double>(std::fabs(value)), value_of<F>(magnitude));
    CHECK_EQ(std::signbit(value), code >= 0x80);
    CHECK_EQ(from_float<F>(value).bits, code);
    CHECK_EQ(to_float8<F>(value * 0x1p20f, 0x1p-20f).bits, code);
    for (uint32_t random : {0u, 1u, 0x8000u, 0xFFFFu})  // exact values never move
      CHECK_EQ(to_float8_random<F>(value, 1.0f, random).bits, code);
  }
}

template <typename F>
void check_all_bfloat16() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = to_float(BFloat16{static_cast<uint16_t>(bits)});
    const uint32_t code = from_float<F>(x).bits;
    if (!std::isfinite(x)) {
      CHECK_EQ(code, kNan8);
      CHECK_EQ(to_float8_random<F>(x, 1.0f, bits).bits, kNan8);
      continue;
    }
    CHECK_EQ(code, nearest_code<F>(std::fabs(static_cast<double>(x))) | (bits >> 8 & 0x80u));
  }
}

template <typename F>
void check_neighbours_of_ties() {
  // Halfway between two codes, and one fp32 step to either side.
  for (uint32_t code = 0; code < kLargestCode<F>; ++code) {
    const float middle =
        static_cast<float>((value_of<F>(code) + value_of<F>(code + 1)) / 2);  // exact in fp32
    CHECK_EQ(from_float<F>(middle).bits, code + code % 2);
    CHECK_EQ(from_float<F>(std::nextafter(middle, 0.0f)).bits, code);
    CHECK_EQ(from_float<F>(std::nextafter(middle, 1e9f)).bits, code + 1);
  }
  CHECK_EQ(from_float<F>(std::numeric_limits<float>::max()).bits, kLargestCode<F>);
  CHECK_EQ(to_float8<F>(-3e38f, 0x1p100f).bits, kLargestCode<F> | 0x80u);  // the product overflows
}

template <typename F>
void check_mean_of_random_rounding() {
  std::mt19937 random(1);
  const double last_place =
      std::ldexp(1.0, 1 - Float8Traits<F>::kBias - Float8Traits<F>::kMantissaBits);
  for (int n = 0; n < 400; ++n) {
    // From far below the smallest subnormal to the largest value.
    const float x = std::ldexp(1.0f + static_cast<float>(random() % 4096) / 4096.0f,
                               static_cast<int>(random() % 34) - 26) *
                    (random() % 2 ? 1.0f : -1.0f);
    if (std::fabs(x) > Float8Traits<F>::kLargest) continue;
    double sum = 0;
    std::set<uint32_t> codes;
    for (uint32_t r = 0; r < 0x10000; ++r) {
      const F rounded = to_float8_random<F>(x * 0x1p-9f, 0x1p9f, r);
      codes.insert(rounded.bits);
      sum += to_float(rounded);
    }
    CHECK(codes.size() <= 2);
    const double step = std::max(last_place, std::fabs(static_cast<double>(x)) *
                                                 std::ldexp(1.0, -Float8Traits<F>::kMantissaBits));
    const double error = std::fabs(sum / 0x10000 - static_cast<double>(x));
    if (error > step * 0x1p-16)
      testing::fail(__FILE__, __LINE__,
                    "mean of " + testing::show(x) + " is off by " + testing::show(error));
  }
}

}  // namespace

TEST(all_codes_come_back) {
  check_all_codes<Float8E4M3>();
  check_all_codes<Float8E5M2>();
}

TEST(all_bfloat16_numbers_round_to_nearest_even) {
  check_all_bfloat16<Float8E4M3>();
  check_all_bfloat16<Float8E5M2>();
}

TEST(ties_and_their_neighbours) {
  check_neighbours_of_ties<Float8E4M3>();
  check_neighbours_of_ties<Float8E5M2>();
}

TEST(random_rounding_keeps_the_mean) {
  check_mean_of_random_rounding<Float8E4M3>();
  check_mean_of_random_rounding<Float8E5M2>();
}

TEST(random_rounding_saturates) {
  for (uint32_t r : {0u, 0xFFFFu}) {
    CHECK_EQ(to_float8_random<Float8E4M3>(-1e6f, 1.0f, r).bits, 0xFEu);
    CHECK_EQ(to_float8_random<Float8E4M3>(447.9f, 1.0f, r).bits, r == 0 ? 0x7Du : 0x7Eu);
    CHECK_EQ(to_float8_random<Float8E5M2>(3e38f, 0x1p100f, r).bits, 0x7Bu);
  }
}

TEST(e_of_8_bits_has_a_byte_for_every_octet) {
  for (int64_t rows : {64, 100, 192})
    for (int64_t k : {128, 200, 384}) {
      std::vector<int> owners(static_cast<size_t>(meta8_bytes(rows, k)));
      const int64_t padded_m = round_up(rows, 64), padded_k = round_up(k, 128);
      for (int64_t m = 0; m < padded_m; ++m)
        for (int64_t at = 0; at < padded_k; at += 8) {
          // The formula of the GPU's trial, written out.
          const int64_t expected =
              ((at / 128) * (padded_m / 64) + m / 64) * 1024 + m % 64 * 16 + at % 128 / 8;
          CHECK_EQ(meta8_byte_offset(m, at, rows), expected);
          ++owners[static_cast<size_t>(expected)];
        }
      for (int count : owners) CHECK_EQ(count, 1);
    }
}

TEST(the_table_has_every_format_once) {
  const std::vector<FormatInfo> all = packed_formats();
  CHECK_EQ(all.size(), 4u);
  std::set<std::string> names;
  for (const FormatInfo& f : all) {
    names.insert(f.name);
    CHECK_EQ(f.bytes, bytes_of(f.dtype));
    CHECK_EQ(f.per_vector * f.bytes, 16);
    CHECK_EQ(f.scaled, is_float8(f.dtype));
    CHECK_EQ(f.mn_major, !is_float8(f.dtype));
    CHECK_EQ(f.meta_tile_k, is_float8(f.dtype) ? 128 : 64);
    CHECK_EQ(f.token_step, is_float8(f.dtype) ? 32 : 8);
  }
  CHECK(names == (std::set<std::string>{"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"}));
}

TEST(what_is_no_packed_format_is_refused) {
  CHECK_THROWS(with_packed_format(DType::kFloat32, [](auto) {}), "got float32");
  CHECK_THROWS(with_packed16(DType::kFloat8E4M3, [](auto) {}), "got float8_e4m3fn");
  CHECK_THROWS(with_type(DType::kFloat8E5M2, [](auto) {}), "got float8_e5m2");
  CHECK_THROWS(bytes_of(static_cast<DType>(9)), "unknown dtype code 9");
}

TEST_MAIN()
