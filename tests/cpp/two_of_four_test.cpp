// two_of_four_test.cpp: which activations are kept, of fp32 values and of 16-bit ones in words: both
// against a plain sort, on every group of awkward values, and packing of whole matrices.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "activation/functions.h"
#include "common/float8_scale.h"
#include "common/metadata.h"
#include "matrices.h"
#include "pack/pack_group.h"
#include "pack/two_of_four.h"
#include "random.h"
#include "testing.h"

using namespace testing;

namespace {

/// Kept bits by sorting: NaN first, then by size; stable, so equal ones go by index.
uint32_t expected_bits(const float (&u)[4]) {
  int order[4] = {0, 1, 2, 3};
  const auto is_above = [&](int i, int j) {
    const float a = u[i], b = u[j];
    if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && !std::isnan(b);
    return std::max(a, 0.0f) > std::max(b, 0.0f);
  };
  std::stable_sort(order, order + 4, is_above);
  return 1u << order[0] | 1u << order[1];
}

constexpr float kAwkward[] = {-INFINITY, -2.0f,   -1e-40f, -0.0f, 0.0f,     6e-8f,
                              1e-40f,    0.9999f, 1.0f,    2.0f,  INFINITY, NAN};
constexpr int kValues = sizeof kAwkward / sizeof kAwkward[0];

/// Line `line` of four, with the same group twice and once turned: words against single values.
template <typename T>
void check_words(const uint16_t (&bits)[4], int line) {
  const auto value = [&](int i) { return to_float(T{bits[i & 3]}); };
  const float left[4] = {value(0), value(1), value(2), value(3)},
              right[4] = {value(1), value(2), value(3), value(0)};
  uint32_t words[4], ranks[4];
  for (int w = 0; w < 4; ++w) {
    const int i = 2 * w + w / 2;  // elements 0 to 3, then 1, 2, 3, 0
    words[w] = bits[i & 3] | static_cast<uint32_t>(bits[(i + 1) & 3]) << 16;
    ranks[w] = positive_pair<T>(words[w]);
  }
  const KeptPlaces kept = two_of_four(ranks);
  const uint32_t left_bits = two_of_four(left), right_bits = two_of_four(right);
  CHECK_EQ(left_bits, expected_bits(left));
  for (int i = 0; i < 4; ++i) {
    CHECK_EQ(kept.place[i] >> 15 & 1u, left_bits >> i & 1u);
    CHECK_EQ(kept.place[i] >> 31 & 1u, right_bits >> i & 1u);
  }
  const uint32_t nibbles = kept_nibbles(kept, line);
  CHECK_EQ(look_up<kMetaTable>(nibbles) >> (8 * line) & 0xFFu, meta_from_bits(left_bits));
  CHECK_EQ(look_up<kMetaTable>(nibbles >> 16) >> (8 * line) & 0xFFu, meta_from_bits(right_bits));
  CHECK_EQ(nibbles & ~(0x00070007u << (4 * line)), 0u);
  for (int w = 0; w < 4; ++w) {
    const uint32_t group = w < 2 ? left_bits : right_bits, both = group >> (w % 2 * 2);
    CHECK_EQ(kept_halves(kept, w), (both & 1u) * 0xFFFFu | (both >> 1 & 1u) * 0xFFFF0000u);
  }
}

template <typename T>
void check_awkward_words() {
  for (int n = 0; n < kValues * kValues * kValues * kValues; ++n) {
    uint16_t bits[4];
    for (int i = 0, rest = n; i < 4; ++i, rest /= kValues)
      bits[i] = from_float<T>(kAwkward[rest % kValues]).bits;
    check_words<T>(bits, n % 4);
  }
  Random random(3);
  for (int n = 0; n < 200000; ++n) {  // NaNs of any payload and either sign among them
    const uint32_t a = random.bits(), b = random.bits();
    const uint16_t bits[4] = {static_cast<uint16_t>(a), static_cast<uint16_t>(a >> 16),
                              static_cast<uint16_t>(b), static_cast<uint16_t>(b >> 16)};
    check_words<T>(bits, n % 4);
  }
}

std::vector<uint8_t> bytes_for(int64_t count, uint8_t value = 0xEE) {
  return std::vector<uint8_t>(static_cast<size_t>(count), value);
}

struct Results {
  std::vector<uint8_t> packed, E, packed_t, E_t;
};

Results forward(const TestMatrix& u, Activation kind, const int64_t* seed) {
  const int64_t bytes = bytes_of(u.dtype()), padded = padded_tokens(u.rows());
  Results r = {
      bytes_for(u.rows() * u.cols() / 2 * bytes), bytes_for(metadata_bytes(u.rows(), u.cols())),
      bytes_for(padded / 2 * u.cols() * bytes), bytes_for(metadata_bytes(u.cols(), padded))};
  ActivationPackArgs args;
  args.kind = kind, args.u = u.const_view(), args.packed = r.packed.data(), args.E = r.E.data();
  if (seed != nullptr) args.seed = seed, args.packed_t = r.packed_t.data(), args.E_t = r.E_t.data();
  activation_pack(args, kCpu);
  return r;
}

TestMatrix unpacked(std::vector<uint8_t>& packed, std::vector<uint8_t>& E, const TestMatrix& like) {
  TestMatrix dense(like.rows(), like.cols(), like.dtype());
  UnpackArgs args;
  args.packed = packed.data(), args.E = E.data(), args.out = dense.view();
  unpack(args, kCpu);
  return dense;
}

}  // namespace

TEST(fp32_groups_keep_what_a_sort_keeps) {
  for (int n = 0; n < kValues * kValues * kValues * kValues; ++n) {
    float u[4];
    for (int i = 0, rest = n; i < 4; ++i, rest /= kValues) u[i] = kAwkward[rest % kValues];
    CHECK_EQ(two_of_four(u), expected_bits(u));
  }
}

TEST(words_of_bfloat16_keep_what_single_values_keep) { check_awkward_words<BFloat16>(); }
TEST(words_of_float16_keep_what_single_values_keep) { check_awkward_words<Float16>(); }

TEST(packing_gives_h_at_the_two_largest_of_each_group) {
  Random random(7);
  for (DType dtype : kDTypes) {
    for (Order order : kOrders) {
      TestMatrix u(13, 72, dtype, order, 3);
      for (int64_t r = 0; r < u.rows(); ++r)
        for (int64_t c = 0; c < u.cols(); ++c)
          u.set(r, c, random.below(4) == 0 ? kAwkward[random.below(kValues)] : random.normal());
      Results results = forward(u, Activation::kSquaredRelu, nullptr);
      const TestMatrix dense = unpacked(results.packed, results.E, u);
      for (int64_t r = 0; r < u.rows(); ++r) {
        for (int64_t c = 0; c < u.cols(); ++c) {
          const int64_t group = c / 4 * 4;
          const float of_group[4] = {u.get(r, group), u.get(r, group + 1), u.get(r, group + 2),
                                     u.get(r, group + 3)};
          const bool kept = (expected_bits(of_group) >> (c - group) & 1u) != 0;
          TestMatrix h(1, 1, dtype);
          h.set(0, 0, kept ? activate<Activation::kSquaredRelu>(u.get(r, c)).value : 0.0f);
          const float got = dense.get(r, c), expected = h.get(0, 0);
          CHECK(got == expected || (std::isnan(got) && std::isnan(expected)));
          CHECK(!std::signbit(got) || std::isnan(got));
        }
      }
    }
  }
}

TEST(the_form_along_tokens_is_that_of_the_pruned_matrix) {
  const int64_t seed[2] = {5, -6};
  TestMatrix u(70, 24, DType::kFloat16);
  Random random(8);
  for (int64_t r = 0; r < u.rows(); ++r)
    for (int64_t c = 0; c < u.cols(); ++c) u.set(r, c, random.normal());
  Results results = forward(u, Activation::kRelu, seed);
  const PrunedGradient expected(unpacked(results.packed, results.E, u), seed);
  CHECK(results.packed_t == expected.packed.bytes());
  CHECK(results.E_t == expected.E);
}

TEST(sums_over_tokens_need_no_form_along_tokens) {
  TestMatrix u(130, 8, DType::kBFloat16), d_h(130, 8, DType::kBFloat16);
  Random random(9);
  for (int64_t r = 0; r < u.rows(); ++r)
    for (int64_t c = 0; c < u.cols(); ++c) u.set(r, c, random.normal()), d_h.set(r, c, 1.0f);
  std::vector<uint8_t> packed = bytes_for(130 * 4 * 2),
                       E = forward(u, Activation::kRelu, nullptr).E;
  std::vector<float> sums(3 * 8, -1.0f);
  ActivationPackBackwardArgs args;
  args.kind = Activation::kRelu, args.u = u.const_view(), args.d_h = d_h.const_view();
  args.packed = packed.data(), args.tile_sums = sums.data();
  activation_pack_backward(args, kCpu);
  const TestMatrix dense = unpacked(packed, E, u);
  for (int64_t c = 0; c < u.cols(); ++c) {
    float expected = 0.0f, got = sums[c] + sums[8 + c] + sums[16 + c];
    for (int64_t r = 0; r < u.rows(); ++r) expected += dense.get(r, c);
    CHECK_EQ(got, expected);  // of ones and zeros: exact
  }
}

TEST(packing_to_e4m3_casts_what_16_bits_hold_by_its_own_scale) {
  const int64_t seed[2] = {5, -6};
  Random random(10);
  TestMatrix u(37, 72, DType::kBFloat16), d_h(37, 72, DType::kBFloat16);
  for (int64_t r = 0; r < u.rows(); ++r)
    for (int64_t c = 0; c < u.cols(); ++c)
      u.set(r, c, random.normal()), d_h.set(r, c, 1e-3f * random.normal());
  Results half = forward(u, Activation::kSquaredRelu, seed);
  const TestMatrix h = unpacked(half.packed, half.E, u);
  float scale = 0.0f, largest = 0.0f;
  for (int64_t r = 0; r < u.rows(); ++r)
    for (int64_t c = 0; c < u.cols(); ++c) largest = std::max(largest, h.get(r, c));

  constexpr DType kOut = DType::kFloat8E4M3;
  const int64_t padded = padded_tokens(kOut, u.rows());
  Results eight = {bytes_for(37 * 36), bytes_for(metadata_bytes(kOut, 37, 72)),
                   bytes_for(72 * padded / 2), bytes_for(metadata_bytes(kOut, 72, padded))};
  ActivationPackArgs args;
  args.u = u.const_view(), args.packed = eight.packed.data(), args.E = eight.E.data();
  args.seed = seed, args.packed_t = eight.packed_t.data(), args.E_t = eight.E_t.data();
  args.packed_dtype = kOut, args.scale = &scale;
  activation_pack(args, kCpu);
  CHECK_EQ(scale, scale_of(largest));
  CHECK(2 * largest <= 448 * scale && 2 * largest > 224 * scale);

  UnpackArgs back;
  TestMatrix dense(37, 72, DType::kFloat32);
  back.packed = eight.packed.data(), back.E = eight.E.data(), back.out = dense.view();
  back.packed_dtype = kOut, back.scale = &scale;
  unpack(back, kCpu);
  for (int64_t r = 0; r < u.rows(); ++r)
    for (int64_t c = 0; c < u.cols(); ++c)
      CHECK_EQ(dense.get(r, c), scale * to_float(to_float8<Float8E4M3>(h.get(r, c), 1 / scale)));

  Results along = eight;
  MvueArgs mvue;
  mvue.dy = h.const_view(), mvue.seed = seed, mvue.packed_dtype = kOut, mvue.scale = &scale;
  mvue.packed = along.packed_t.data(), mvue.E = along.E_t.data();
  mvue_pack(mvue, kCpu);
  CHECK(along.packed_t == eight.packed_t && along.E_t == eight.E_t);
}

TEST(a_scale_is_the_least_power_of_two_that_leaves_room) {
  for (float amax : {0.0f, -1.0f, NAN}) CHECK_EQ(scale_of(amax), 1.0f);
  CHECK_EQ(scale_of(224.0f), 1.0f);
  CHECK_EQ(scale_of(std::nextafter(224.0f, 225.0f)), 2.0f);
  CHECK_EQ(scale_of(112.0f), 0.5f);
  CHECK_EQ(scale_of(1e-45f), 0x1p-126f);
  CHECK_EQ(scale_of(3e38f), 0x1p121f);
}

TEST(wrong_arguments_are_named) {
  TestMatrix u(8, 8, DType::kBFloat16), odd(8, 6, DType::kBFloat16), other(8, 8, DType::kFloat16);
  ActivationPackArgs args;
  args.u = u.const_view();
  CHECK_THROWS(activation_pack(args, kCpu), "packed must not be null");
  args.kind = Activation::kGelu;
  CHECK_THROWS(activation_pack(args, kCpu), "kind must be relu or squared_relu");
  args.kind = Activation::kRelu, args.u = odd.const_view();
  CHECK_THROWS(activation_pack(args, kCpu), "columns in multiples of 4, got 6");
  std::vector<uint8_t> room = bytes_for(4096);
  const int64_t seed[2] = {1, 2};
  args.u = u.const_view(), args.packed = room.data(), args.E = room.data(), args.seed = seed;
  CHECK_THROWS(activation_pack(args, kCpu), "seed, packed_t and E_t must be given together");
  args.seed = nullptr, args.packed_dtype = DType::kFloat16;
  CHECK_THROWS(activation_pack(args, kCpu), "packed_dtype must be that of u, bfloat16, or float8_");
  args.packed_dtype = DType::kFloat8E4M3;
  CHECK_THROWS(activation_pack(args, kCpu), "scale goes with a packed_dtype of float8_e4m3fn");
  ActivationPackBackwardArgs backward;
  backward.u = u.const_view(), backward.d_h = other.const_view(), backward.packed = room.data();
  CHECK_THROWS(activation_pack_backward(backward, kCpu), "same dtype");
}

TEST_MAIN()
