// Activations against double-precision formulas, their derivatives against finite differences.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "activation/functions.h"
#include "activation/tile_place.h"
#include "matrices.h"
#include "testing.h"

using namespace testing;

namespace {

constexpr Activation kKinds[] = {Activation::kSilu,        Activation::kGelu,
                                 Activation::kGeluTanh,    Activation::kRelu,
                                 Activation::kSquaredRelu, Activation::kIdentity};

double exact(Activation kind, double x) {
  switch (kind) {
    case Activation::kSilu: return x / (1 + std::exp(-x));
    case Activation::kGelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu: return x > 0 ? x : 0;
    case Activation::kSquaredRelu: return x > 0 ? x * x : 0;
    case Activation::kIdentity: return x;
  }
  return 0;
}

double exact_slope(Activation kind, double x) {
  const double step = 1e-4;
  // Fourth order: the error of the difference is far below fp32's.
  return (8 * (exact(kind, x + step) - exact(kind, x - step)) -
          (exact(kind, x + 2 * step) - exact(kind, x - 2 * step))) /
         (12 * step);
}

struct Evaluate {
  float x;
  bool for_16_bits;
  ValueAndSlope* result;
  template <Activation kKind>
  void operator()() const {
    *result = for_16_bits ? activate<kKind, true>(x) : activate<kKind>(x);
  }
};

ValueAndSlope evaluate(Activation kind, float x, bool for_16_bits = false) {
  ValueAndSlope result{};
  with_activation(kind, Evaluate{x, for_16_bits, &result});
  return result;
}

/// Every patch has one thread, and any eight lanes differ modulo 8 in both directions.
template <int kTokenPatches, int kFeaturePatches>
bool places_are_sound() {
  std::set<std::pair<int, int>> seen;
  bool banks_differ = true;
  for (uint32_t first = 0; first < kTokenPatches * kFeaturePatches; first += 8) {
    std::set<int> tokens, features;
    for (uint32_t lane = 0; lane < 8; ++lane) {
      const TilePlace at = tile_place<kTokenPatches, kFeaturePatches>(first + lane);
      if (at.token < kTokenPatches && at.feature < kFeaturePatches)
        seen.insert({at.token, at.feature});
      tokens.insert(at.token % 8), features.insert(at.feature % 8);
    }
    banks_differ = banks_differ && tokens.size() == 8 && features.size() == 8;
  }
  return banks_differ && seen.size() == kTokenPatches * kFeaturePatches;
}

}  // namespace

TEST(threads_share_a_tile_without_bank_conflicts) {
  CHECK((places_are_sound<8, 8>()));
  CHECK((places_are_sound<8, 16>()));
  CHECK((places_are_sound<16, 8>()));
  CHECK((places_are_sound<16, 16>()));
}

TEST(values_and_slopes_are_accurate) {
  for (Activation kind : kKinds)
    for (float x = -20.0f; x <= 20.0f; x += 0.0137f) {
      const ValueAndSlope got = evaluate(kind, x);
      const double value = exact(kind, x), slope = exact_slope(kind, x);
      CHECK(std::fabs(got.value - value) <= 2e-6 * std::fabs(value) + 1e-7);
      CHECK(std::fabs(got.slope - slope) <= 2e-6 * std::fabs(slope) + 1e-6);
    }
}

TEST(forms_for_16_bits_err_by_a_part_of_their_last_place) {
  // fp16 is the finer of the two: half of its last place is 2^-12 of a value, or 2^-25.
  for (Activation kind : kKinds)
    for (float x = -30.0f; x <= 30.0f; x += 0.00137f) {
      if (std::fabs(x) < 3e-4f) continue;  // the difference would straddle ReLU's corner
      const ValueAndSlope got = evaluate(kind, x, true);
      const double value = exact(kind, x), slope = exact_slope(kind, x);
      CHECK(std::fabs(got.value - value) <= 0x1p-13 * std::fabs(value) + 0x1p-25);
      // A slope is a sum of terms up to 1 which cancel where it crosses 0.
      CHECK(std::fabs(got.slope - slope) <= 0x1p-13 * std::fabs(slope) + 0x1p-16);
    }
}

TEST(limits_are_right_and_nan_stays) {
  const float inf = std::numeric_limits<float>::infinity();
  for (bool for_16_bits : {false, true})
    for (Activation kind : kKinds) {
      const auto at = [&](float x) { return evaluate(kind, x, for_16_bits); };
      CHECK_EQ(at(inf).value, inf);
      const bool identity = kind == Activation::kIdentity;
      CHECK_EQ(at(-inf).value, identity ? -inf : 0.0f);
      CHECK_EQ(at(-3e38f).value, identity ? -3e38f : 0.0f);
      CHECK_EQ(at(0.0f).value, 0.0f);
      CHECK(std::isnan(at(std::nanf("")).value));
      CHECK_EQ(at(-1e4f).slope, identity ? 1.0f : 0.0f);
      if (kind != Activation::kSquaredRelu) CHECK_EQ(at(1e4f).slope, 1.0f);
    }
}

TEST(slopes_at_zero_and_at_infinity) {
  const float inf = std::numeric_limits<float>::infinity();
  for (bool for_16_bits : {false, true}) {
    for (float zero : {0.0f, -0.0f}) {
      CHECK_EQ(evaluate(Activation::kRelu, zero, for_16_bits).slope, 0.0f);
      CHECK_EQ(evaluate(Activation::kSquaredRelu, zero, for_16_bits).slope, 0.0f);
      CHECK_EQ(evaluate(Activation::kSquaredRelu, zero, for_16_bits).value, 0.0f);
    }
    for (Activation kind : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
      CHECK_EQ(evaluate(kind, inf, for_16_bits).slope, 1.0f);
      CHECK_EQ(evaluate(kind, -inf, for_16_bits).slope, 0.0f);
    }
    // Exact zeros stay: where a squared ReLU gives 0, its gradient is 0.
    CHECK_EQ(evaluate(Activation::kSquaredRelu, -1e-45f, for_16_bits).slope, 0.0f);
    CHECK_EQ(evaluate(Activation::kSquaredRelu, 3.0f, for_16_bits).slope, 6.0f);
  }
}

TEST(forward_takes_every_layout) {
  std::mt19937 random(1);
  for (bool gated : {true, false})
    for (DType dtype : kDTypes)
      for (Order in : kOrders)
        for (Order out : kOrders) {
          const int64_t tokens = 37, width = 70;
          TestMatrix gate_up(tokens, gated ? 2 * width : width, dtype, in, 2);
          TestMatrix h(tokens, width, dtype, out, 1), rounded(1, 1, dtype);
          gate_up.fill_normal(random, 2.0f);
          ActivationArgs args;
          args.gated = gated;
          args.gate_up = gate_up.const_view();
          args.h = h.view();
          activation_forward(args, kCpu);
          for (int64_t r = 0; r < tokens; ++r)
            for (int64_t c = 0; c < width; ++c) {
              const float act = evaluate(args.kind, gate_up.get(r, c)).value;
              rounded.set(0, 0, gated ? act * gate_up.get(r, c + width) : act);
              CHECK_EQ(h.get(r, c), rounded.get(0, 0));
            }
        }
}

TEST(backward_is_the_derivative_and_packs_like_mvue) {
  std::mt19937 random(2);
  const int64_t seed[2] = {11, 12};
  for (bool gated : {true, false})
    for (Activation kind : kKinds)
      for (Order layout : kOrders) {
        const DType dtype = DType::kBFloat16;
        const int64_t tokens = 21, width = 36, cols = gated ? 2 * width : width;
        TestMatrix gate_up(tokens, cols, dtype, layout), d_h(tokens, width, dtype);
        TestMatrix d_in(tokens, cols, dtype, layout), h(tokens, width, dtype), rounded(1, 1, dtype);
        gate_up.fill_normal(random);
        d_h.fill_normal(random);
        const int64_t padded = padded_tokens(tokens);
        TestMatrix packed(padded / 2, cols, dtype), expected_packed(padded / 2, cols, dtype);
        std::vector<uint8_t> E(static_cast<size_t>(metadata_bytes(cols, padded))), expected_E(E);

        ActivationBackwardArgs args;
        args.kind = kind;
        args.gated = gated;
        args.d_h = d_h.const_view();
        args.gate_up = gate_up.const_view();
        args.d_gate_up = d_in.view();
        args.h = h.view();
        args.seed = seed;
        args.packed = packed.data();
        args.E = E.data();
        activation_backward(args, kCpu);

        for (int64_t r = 0; r < tokens; ++r)
          for (int64_t c = 0; c < width; ++c) {
            const ValueAndSlope act = evaluate(kind, gate_up.get(r, c));
            const float up = gated ? gate_up.get(r, c + width) : 1.0f;
            rounded.set(0, 0, d_h.get(r, c) * up * act.slope);
            CHECK_EQ(d_in.get(r, c), rounded.get(0, 0));
            rounded.set(0, 0, act.value * up);
            CHECK_EQ(h.get(r, c), rounded.get(0, 0));
            if (!gated) continue;
            rounded.set(0, 0, d_h.get(r, c) * act.value);
            CHECK_EQ(d_in.get(r, c + width), rounded.get(0, 0));
          }

        MvueArgs mvue;
        mvue.dy = d_in.const_view();
        mvue.seed = seed;
        mvue.packed = expected_packed.data();
        mvue.E = expected_E.data();
        mvue_pack(mvue, kCpu);
        CHECK(packed.bytes() == expected_packed.bytes());
        CHECK(E == expected_E);
      }
}

TEST(an_extent_of_one_may_have_any_stride) {
  float gate_up[2] = {1.5f, 3.0f}, h = 0;
  ActivationArgs args;
  args.gate_up = {gate_up, DType::kFloat32, 1, 2, 77, 1};
  args.h = {&h, DType::kFloat32, 1, 1, 55, 66};
  activation_forward(args, kCpu);
  CHECK_EQ(h, evaluate(args.kind, 1.5f).value * 3.0f);
}

TEST(bad_activation_arguments_are_named) {
  TestMatrix gate_up(4, 10, DType::kFloat32), h(4, 4, DType::kFloat32);
  ActivationArgs args;
  args.gate_up = gate_up.const_view();
  args.h = h.view();
  CHECK_THROWS(activation_forward(args, kCpu),
               "gate_up must be [4, 8] for gated h of [4, 4], got [4, 10]");
}

TEST_MAIN()
