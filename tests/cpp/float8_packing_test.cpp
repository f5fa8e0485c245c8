// Packing, casts, MVUE and activation passes in 8 bits through the public API, on the CPU backend.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/format.h"
#include "common/mask_bits.h"
#include "matrices.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr DType k8[] = {DType::kFloat8E4M3, DType::kFloat8E5M2};
using Bytes = std::vector<uint8_t>;

float value_of(DType dtype, uint8_t code) {
  return dtype == DType::kFloat8E4M3 ? to_float(Float8E4M3{code}) : to_float(Float8E5M2{code});
}
uint8_t code_of(DType dtype, float x, float scale) {
  return dtype == DType::kFloat8E4M3 ? to_float8<Float8E4M3>(x, 1 / scale).bits
                                     : to_float8<Float8E5M2>(x, 1 / scale).bits;
}

/// The nibble of group (m, 4 * group ...) in the 8-bit order.
uint32_t nibble_at(const Bytes& E, int64_t rows_m, int64_t m, int64_t group) {
  return E[static_cast<size_t>(meta8_byte_offset(m, 4 * group, rows_m))] >> (group % 2 * 4) & 0xFu;
}

void check_padding(const Bytes& E, int64_t m, int64_t k) {
  for (int64_t row = 0; row < round_up(m, 64); ++row)
    for (int64_t group = 0; group < round_up(k, 128) / 4; ++group)
      if (row >= m || 4 * group >= k) CHECK_EQ(nibble_at(E, m, row, group), kPaddingNibble);
}

struct Packed8 {
  std::vector<uint16_t> mask;
  Bytes values, values_t, E, E_t;
  float scale = 0x1p-6f, amax = 0;
  int64_t counters[2] = {};

  Packed8(int64_t rows, int64_t cols)
      : mask(static_cast<size_t>(rows / 4 * (cols / 4))),
        values(static_cast<size_t>(rows * cols / 2), 0x5A),
        values_t(values),
        E(static_cast<size_t>(metadata_bytes(DType::kFloat8E4M3, rows, cols)), 0xFF),
        E_t(static_cast<size_t>(metadata_bytes(DType::kFloat8E4M3, cols, rows)), 0xFF) {}

  PackArgs args(const TestMatrix& w, DType dtype) {
    PackArgs args;
    args.w = w.const_view(), args.mask = mask.data(), args.out_dtype = dtype;
    args.packed = values.data(), args.E = E.data();
    args.packed_t = values_t.data(), args.E_t = E_t.data();
    args.scale = &scale, args.amax = &amax, args.counters = counters;
    return args;
  }
};

void check_pack(int64_t rows, int64_t cols, DType in, DType out, Order order) {
  std::mt19937 random(static_cast<uint32_t>(rows * 1000 + cols));
  TestMatrix w(rows, cols, in, order, 4);
  w.fill_normal(random);
  w.set(0, 0, 1e9f), w.set(rows - 1, cols - 1, 1e-9f), w.set(1, 1, std::nanf(""));
  w.set(2, 2, -std::numeric_limits<float>::infinity());
  Packed8 got(rows, cols);
  const PackArgs args = got.args(w, out);
  search_and_pack(&args, 1, kCpu);

  std::vector<uint16_t> mask(got.mask.size());
  PackArgs search = args;
  search.mask = mask.data(), search.scale = nullptr, search.amax = nullptr;
  search.counters = nullptr, search.out_dtype = DType::kBFloat16;
  search_mask(&search, 1, kCpu);
  CHECK(mask == got.mask);

  float amax = 0;
  int64_t clipped = 0, flushed = 0;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const float x = w.get(r, c);
      if (!std::isfinite(x)) continue;
      amax = std::max(amax, std::fabs(x));
      clipped += std::fabs(x / got.scale) > (out == DType::kFloat8E4M3 ? 448.0f : 57344.0f);
      flushed += x != 0 && (code_of(out, x, got.scale) & 0x7F) == 0;
    }
  CHECK_EQ(got.amax, amax);
  CHECK_EQ(got.counters[0], clipped);
  CHECK_EQ(got.counters[1], flushed);
  CHECK(clipped > 0 || in == DType::kFloat16);

  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t block = mask[static_cast<size_t>(r / 4 * (cols / 4) + c / 4)];
      const uint32_t along_row = meta_from_bits(mask_row(block, static_cast<int>(r % 4)));
      const uint32_t along_column = meta_from_bits(mask_column(block, static_cast<int>(c % 4)));
      CHECK_EQ(nibble_at(got.E, rows, r, c / 4), along_row);
      CHECK_EQ(nibble_at(got.E_t, cols, c, r / 4), along_column);
      for (int second = 0; second < 2; ++second) {
        const uint32_t row_place = second ? along_row >> 2 : along_row & 3u;
        const uint32_t column_place = second ? along_column >> 2 : along_column & 3u;
        const uint8_t code = code_of(out, w.get(r, c), got.scale);
        if (row_place == c % 4)
          CHECK_EQ(got.values[static_cast<size_t>(r * (cols / 2) + c / 4 * 2 + second)], code);
        if (column_place == r % 4)
          CHECK_EQ(got.values_t[static_cast<size_t>(c * (rows / 2) + r / 4 * 2 + second)], code);
      }
    }
  check_padding(got.E, rows, cols), check_padding(got.E_t, cols, rows);

  for (DType dense_type : {DType::kFloat32, DType::kBFloat16})
    for (bool transposed : {false, true}) {
      TestMatrix dense(rows, cols, dense_type), once(1, 1, dense_type);
      UnpackArgs back;
      back.packed = transposed ? got.values_t.data() : got.values.data();
      back.E = transposed ? got.E_t.data() : got.E.data();
      back.transposed = transposed, back.out = dense.view();
      back.packed_dtype = out, back.scale = &got.scale;
      unpack(back, kCpu);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < cols; ++c) {
          const uint32_t block = mask[static_cast<size_t>(r / 4 * (cols / 4) + c / 4)];
          const bool kept = block >> (4 * (r % 4) + c % 4) & 1;
          const float x = kept ? value_of(out, code_of(out, w.get(r, c), got.scale)) : 0.0f;
          once.set(0, 0, x * got.scale);
          const float expected = once.get(0, 0), is = dense.get(r, c);
          CHECK(is == expected || (std::isnan(is) && std::isnan(expected)));
        }
    }
}

/// Every output of quantize, element by element.
void check_float8(const TestMatrix& x, const Bytes& x8, int64_t ld, const Bytes& x8_t, int64_t ld_t,
                  float scale) {
  for (int64_t c = 0; c < x.cols(); ++c)
    for (int64_t r = 0; r < padded_tokens(DType::kFloat8E4M3, x.rows()); ++r) {
      const uint8_t code =
          r < x.rows() ? code_of(DType::kFloat8E4M3, x.get(r, c), scale) : uint8_t{0};
      if (r < x.rows()) CHECK_EQ(x8[static_cast<size_t>(r * ld + c)], code);
      CHECK_EQ(x8_t[static_cast<size_t>(c * ld_t + r)], code);
    }
}

struct Float8Memory {
  int64_t ld, ld_t;
  Bytes x8, x8_t;
  float scale = 0x1p-5f, amax = 0.25f;
  int64_t counters[2] = {};

  Float8Memory(int64_t rows, int64_t cols)
      : ld(cols + 3),
        ld_t(padded_tokens(DType::kFloat8E4M3, rows) + 16),
        x8(static_cast<size_t>(rows * ld), 0x5A),
        x8_t(static_cast<size_t>(cols * ld_t), 0x5A) {}
  Float8Output output() { return {x8.data(), ld, x8_t.data(), ld_t, &scale, &amax, counters}; }
};

}  // namespace

TEST(weights_pack_to_8_bits_both_ways) {
  const int64_t shapes[][2] = {{4, 4}, {8, 12}, {64, 128}, {68, 132}, {192, 64}, {60, 260}};
  for (const auto& [rows, cols] : shapes)
    for (DType in : kDTypes)
      for (DType out : k8)
        for (Order order : kOrders) check_pack(rows, cols, in, out, order);
}

TEST(casts_write_both_layouts_and_count) {
  for (DType dtype : kDTypes)
    for (Order order : kOrders)
      for (int64_t rows : {1, 31, 32, 100}) {
        std::mt19937 random(1);
        TestMatrix x(rows, 70, dtype, order, 5);
        x.fill_normal(random, 3.0f);
        x.set(0, 0, 30000.0f), x.set(0, 1, 1e-6f);
        Float8Memory memory(rows, 70);
        quantize({x.const_view(), memory.output()}, kCpu);
        check_float8(x, memory.x8, memory.ld, memory.x8_t, memory.ld_t, memory.scale);
        CHECK_EQ(memory.amax, x.get(0, 0));
        CHECK_EQ(memory.counters[0], 1);
        CHECK_EQ(
            memory.counters[1], 1 + [&] {
              int64_t small = 0;
              for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < 70; ++c)
                  small += (r > 0 || c > 1) && x.get(r, c) != 0 &&
                           std::fabs(x.get(r, c)) / memory.scale <= 0x1p-10f;
              return small;
            }());
        for (size_t gap = 70; gap < memory.x8.size(); gap += 73) CHECK_EQ(memory.x8[gap], 0x5A);
      }
}

TEST(amax_alone_skips_what_is_not_finite_and_never_falls) {
  TestMatrix x(3, 5, DType::kBFloat16);
  for (int i = 0; i < 15; ++i) x.set(i / 5, i % 5, static_cast<float>(-i));
  x.set(2, 4, -std::numeric_limits<float>::infinity()), x.set(0, 0, std::nanf(""));
  float amax = 2.0f;
  Float8Output only;
  only.amax = &amax;
  quantize({x.const_view(), only}, kCpu);
  CHECK_EQ(amax, 13.0f);
  amax = 99.0f;
  quantize({x.const_view(), only}, kCpu);
  CHECK_EQ(amax, 99.0f);
}

TEST(gradients_pack_to_8_bits_by_rounding_the_16_bit_values_at_random) {
  const int64_t seed[2] = {11, -5};
  const PhiloxKey key = philox_key(seed[0], seed[1]);
  for (DType dtype : kDTypes)
    for (DType out : k8)
      for (int64_t tokens : {1, 33, 64, 130})
        for (int64_t features : {3, 64, 70}) {
          std::mt19937 random(3);
          TestMatrix dy(tokens, features, dtype);
          dy.fill_normal(random);
          const int64_t padded = padded_tokens(out, tokens);
          float scale = 0x1p-4f;
          Bytes packed(static_cast<size_t>(features * padded / 2), 0x5A);
          Bytes E(static_cast<size_t>(metadata_bytes(out, features, padded)), 0xFF);
          Float8Memory dense(tokens, features);
          MvueArgs args;
          args.dy = dy.const_view(), args.seed = seed, args.packed = packed.data();
          args.E = E.data(), args.packed_dtype = out, args.scale = &scale;
          args.float8 = dense.output();
          mvue_pack(args, kCpu);

          TestMatrix rounded(1, 1, dtype);
          for (int64_t group = 0; group < padded / 4; ++group)
            for (int64_t f = 0; f < features; ++f) {
              const Philox4 words = expected_words(key, group, f);
              const MvuePick pick = expected_pick(dy, words, group, f);
              const int half = static_cast<int>(group % 2), column = static_cast<int>(f % 4);
              const uint32_t bits = mvue_bits(words, half, column ^ 1);
              for (int second = 0; second < 2; ++second) {
                rounded.set(0, 0, second ? pick.second_value : pick.first_value);
                const float x = rounded.get(0, 0);
                const uint32_t r = second ? 0xFFFFu - bits : bits;
                const uint8_t code = out == DType::kFloat8E4M3
                                         ? to_float8_random<Float8E4M3>(x, 16.0f, r).bits
                                         : to_float8_random<Float8E5M2>(x, 16.0f, r).bits;
                CHECK_EQ(packed[static_cast<size_t>(f * (padded / 2) + 2 * group + second)], code);
              }
              CHECK_EQ(nibble_at(E, features, f, group), pick.nibble);
            }
          check_padding(E, features, padded);
          check_float8(dy, dense.x8, dense.ld, dense.x8_t, dense.ld_t, dense.scale);
        }
}

TEST(packed_gradients_keep_their_mean_far_below_the_smallest_number_of_the_format) {
  // Values over 12 binades below the scale; the mean of many draws, against its standard error.
  constexpr int kDraws = 4000;
  constexpr int64_t kTokens = 32, kFeatures = 8;
  for (DType out : k8) {
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    TestMatrix dy(kTokens, kFeatures, DType::kBFloat16);
    for (int64_t t = 0; t < kTokens; ++t)
      for (int64_t f = 0; f < kFeatures; ++f)
        dy.set(t, f, normal(random) * std::ldexp(1.0f, -static_cast<int>(random() % 12)));
    const float scale = out == DType::kFloat8E4M3 ? 1.0f : 32.0f;
    Bytes packed(static_cast<size_t>(kFeatures * kTokens / 2));
    Bytes E(static_cast<size_t>(metadata_bytes(out, kFeatures, kTokens)));
    TestMatrix dense(kTokens, kFeatures, DType::kFloat32);
    std::vector<double> sum(kTokens * kFeatures), squares(sum);
    for (int64_t draw = 0; draw < kDraws; ++draw) {
      const int64_t seed[2] = {draw, 77};
      MvueArgs args;
      args.dy = dy.const_view(), args.seed = seed, args.packed = packed.data();
      args.E = E.data(), args.packed_dtype = out, args.scale = &scale;
      mvue_pack(args, kCpu);
      UnpackArgs back;
      back.packed = packed.data(), back.E = E.data(), back.transposed = true;
      back.out = dense.view(), back.packed_dtype = out, back.scale = &scale;
      unpack(back, kCpu);
      for (int64_t i = 0; i < kTokens * kFeatures; ++i) {
        const double x = dense.get(i / kFeatures, i % kFeatures);
        sum[static_cast<size_t>(i)] += x, squares[static_cast<size_t>(i)] += x * x;
      }
    }
    for (int64_t i = 0; i < kTokens * kFeatures; ++i) {
      const double mean = sum[static_cast<size_t>(i)] / kDraws;
      const double variance = squares[static_cast<size_t>(i)] / kDraws - mean * mean;
      const double x = dy.get(i / kFeatures, i % kFeatures);
      // Kept values were rounded to bf16 before: 2^-9 of what they may be, at most.
      const double bound = 5 * std::sqrt(variance / kDraws) + std::fabs(x) * 0x1p-8 + 1e-7;
      if (std::fabs(mean - x) > bound)
        testing::fail(__FILE__, __LINE__,
                      "mean " + testing::show(mean) + " of " + testing::show(x) + ", bound " +
                          testing::show(bound));
    }
  }
}

TEST(activation_passes_write_what_the_single_ops_write) {
  const int64_t seed[2] = {5, 6}, tokens = 40, d_ff = 72;
  for (bool gated : {true, false})
    for (std::optional<DType> packed_dtype :
         {std::optional<DType>{}, std::optional<DType>{DType::kFloat8E5M2}})
      for (bool backward : {false, true}) {
        const int64_t width = gated ? 2 * d_ff : d_ff, cols = backward ? width : d_ff;
        const DType packed_type = packed_dtype.value_or(DType::kBFloat16);
        const int64_t padded = padded_tokens(packed_type, tokens);
        std::mt19937 random(4);
        TestMatrix gate_up(tokens, width, DType::kBFloat16), d_h(tokens, d_ff, DType::kBFloat16);
        gate_up.fill_normal(random), d_h.fill_normal(random);
        TestMatrix plain(tokens, cols, DType::kBFloat16);
        ActivationArgs forward;
        forward.kind = Activation::kSquaredRelu, forward.gated = gated;
        forward.gate_up = gate_up.const_view(), forward.h = plain.view();
        ActivationBackwardArgs back;
        back.kind = forward.kind, back.gated = gated, back.d_h = d_h.const_view();
        back.gate_up = gate_up.const_view(), back.d_gate_up = plain.view();
        backward ? activation_backward(back, kCpu) : activation_forward(forward, kCpu);

        Float8Memory expected(tokens, cols), got(tokens, cols);
        Bytes packed(static_cast<size_t>(cols * padded / 2 * bytes_of(packed_type)));
        Bytes E(static_cast<size_t>(metadata_bytes(packed_type, cols, padded)));
        Bytes got_packed(packed), got_E(E);
        MvueArgs mvue;
        mvue.dy = plain.const_view(), mvue.seed = seed, mvue.packed = packed.data();
        mvue.E = E.data(), mvue.packed_dtype = packed_dtype, mvue.float8 = expected.output();
        mvue_pack(mvue, kCpu);

        const auto ask = [&](auto& args) {
          args.seed = seed, args.packed = got_packed.data(), args.E = got_E.data();
          args.packed_dtype = packed_dtype, args.float8 = got.output();
        };
        ask(forward), ask(back);
        forward.h.data = nullptr, back.d_gate_up.data = nullptr;  // made, and not written
        backward ? activation_backward(back, kCpu) : activation_forward(forward, kCpu);
        CHECK(got_packed == packed && got_E == E);
        CHECK(got.x8 == expected.x8 && got.x8_t == expected.x8_t);
        CHECK_EQ(got.amax, expected.amax);
      }
}

TEST(results_do_not_depend_on_threads) {
  std::mt19937 random(5);
  TestMatrix w(7 * 64 - 4, 11 * 64 - 12, DType::kFloat32);  // 7 x 11 tiles: uneven shares
  w.fill_normal(random);
  std::vector<Packed8> packed;
  std::vector<Float8Memory> casts;
  std::vector<Bytes> drawn;
  for (int threads : {1, 2, 5, 16}) {
    set_cpu_threads(threads);
    packed.emplace_back(w.rows(), w.cols());
    const PackArgs args = packed.back().args(w, DType::kFloat8E4M3);
    search_and_pack(&args, 1, kCpu);
    casts.emplace_back(w.rows(), w.cols());
    quantize({w.const_view(), casts.back().output()}, kCpu);
    const int64_t seed[2] = {1, 2};
    Bytes values(static_cast<size_t>(w.cols() * padded_tokens(DType::kFloat8E4M3, w.rows()) / 2));
    Bytes E(static_cast<size_t>(metadata_bytes(DType::kFloat8E4M3, w.cols(), w.rows())));
    MvueArgs draw;
    draw.dy = w.const_view(), draw.seed = seed, draw.packed = values.data(), draw.E = E.data();
    draw.packed_dtype = DType::kFloat8E4M3;
    mvue_pack(draw, kCpu);
    drawn.push_back(values), drawn.push_back(E);
  }
  set_cpu_threads(1);
  for (size_t i = 1; i < packed.size(); ++i) {
    const Packed8 &a = packed[i], &b = packed[0];
    CHECK(a.mask == b.mask && a.values == b.values && a.values_t == b.values_t);
    CHECK(a.E == b.E && a.E_t == b.E_t && a.amax == b.amax);
    CHECK(a.counters[0] == b.counters[0] && a.counters[1] == b.counters[1]);
    CHECK(casts[i].x8 == casts[0].x8 && casts[i].x8_t == casts[0].x8_t);
    CHECK(drawn[2 * i] == drawn[0] && drawn[2 * i + 1] == drawn[1]);
  }
}

TEST(bad_arguments_are_named) {
  TestMatrix w(8, 8, DType::kBFloat16);
  Packed8 packed(8, 8);
  PackArgs bad = packed.args(w, DType::kBFloat16);
  CHECK_THROWS(search_and_pack(&bad, 1, kCpu), "go with a float8 out_dtype, got bfloat16");
  Float8Output to;
  CHECK_THROWS(quantize({w.const_view(), to}, kCpu),
               "must be asked for x8, x8_t, amax or own_scale");
  uint8_t bytes[256];
  to.x8_t = bytes, to.x8_t_ld = 8;
  CHECK_THROWS(quantize({w.const_view(), to}, kCpu), "padded to a multiple of 32, 32, got 8");
  to = {}, to.x8 = bytes, to.x8_ld = 7;
  CHECK_THROWS(quantize({w.const_view(), to}, kCpu), "x8_ld must be at least cols, 8, got 7");
  ConstMatrix codes = w.const_view();
  codes.dtype = DType::kFloat8E4M3;
  to.x8_ld = 8;
  CHECK_THROWS(quantize({codes, to}, kCpu), "must be float32, bfloat16 or float16, got float8");
  const int64_t seed[2] = {};
  MvueArgs mvue;
  mvue.dy = w.const_view(), mvue.seed = seed, mvue.packed = bytes, mvue.E = bytes;
  mvue.packed_dtype = DType::kFloat16;
  CHECK_THROWS(mvue_pack(mvue, kCpu), "packed_dtype must be that of dy, bfloat16, or a float8");
}

TEST_MAIN()
