// The CPU's sparse GEMM of 8-bit operands, of the gradient whose input was pruned, and of pruned
// activations: each pass, in both orientations of both operands, against dense sums of small
// integers, which are exact.
#include <cstdint>
#include <vector>

#include "common/format.h"
#include "elements.h"
#include "random.h"
#include "sparse24/sparse24.h"
#include "testing.h"

using namespace testing;

namespace {

const Context kCpu{};
constexpr float kLhsScale = 0.25f, kRhsScale = 8.0f;

struct Spec {
  GemmPass pass;
  GemmEpilogue epilogue;
  int m, n, k;
  DType format, out_dtype;
  Orientation lhs, rhs;
  bool bias, accumulate, scaled;
};

DType rhs_dtype(const Spec& c) { return is_float8(c.format) ? DType::kFloat8E4M3 : c.format; }

/// The operands of a case, and out before and after.
struct Product {
  explicit Product(const Spec& c) : random(c.m + c.n + c.k) {
    const auto draw = [&] { return static_cast<float>(random.below(7) - 3); };
    const int padded = static_cast<int>(padded_tokens_for(c.format, c.k));
    lhs =
        make_packed(c.m, c.k, is_grad_weight(c.pass) ? padded : c.k, c.format, c.lhs, random, draw);
    rhs = Elements(static_cast<size_t>(c.n) * c.k, rhs_dtype(c));
    for (size_t i = 0; i < rhs.size(); ++i) rhs.set(i, draw());
    const size_t size = static_cast<size_t>(c.m) * c.n;
    before = out = h = Elements(size, c.out_dtype, 5.0f);
    bias = Elements(c.m, is_float8(c.format) ? c.out_dtype : c.format);
    for (int m = 0; m < c.m; ++m) bias.set(m, draw());
  }

  SparseGemmArgs args(const Spec& c) {
    const bool k_major = c.rhs == Orientation::kKMajor;
    SparseGemmArgs a;
    a.pass = c.pass, a.epilogue = c.epilogue;
    a.m = c.m, a.n = c.n, a.k = c.k;
    a.lhs = {lhs.values.data(), lhs.E.data(), c.format, c.lhs, c.scaled ? &kLhsScale : nullptr};
    a.rhs = {rhs.data(), k_major ? c.k : c.n, c.rhs, c.scaled ? &kRhsScale : nullptr};
    a.out_dtype = c.out_dtype;
    a.out = out.data(), a.out_ld = is_m_by_n(c.pass) ? c.n : c.m;
    a.bias = c.bias ? bias.data() : nullptr;
    a.accumulate = c.accumulate;
    a.h = h.data(), a.h_ld = c.epilogue == GemmEpilogue::kGate ? c.m / 2 : c.m;
    a.activation = Activation::kIdentity;
    return a;
  }

  float expected(const Spec& c, int m, int n) const {
    double sum = 0;
    for (const auto& kept : lhs.rows[m]) {
      const size_t at = c.rhs == Orientation::kKMajor ? static_cast<size_t>(n) * c.k + kept.k
                                                      : static_cast<size_t>(kept.k) * c.n + n;
      sum += static_cast<double>(kept.value) * rhs.get(at);
    }
    if (c.scaled) sum *= kLhsScale * kRhsScale;
    if (c.bias) sum += bias.get(m);
    if (c.accumulate) sum += before.get(0);
    return out.rounded(static_cast<float>(sum));
  }

  static size_t at(const Spec& c, int m, int n) {
    return is_m_by_n(c.pass) ? static_cast<size_t>(m) * c.n + n : static_cast<size_t>(n) * c.m + m;
  }

  Random random;
  PackedOperand lhs;
  Elements rhs, bias, before, out, h;
};

void check(const Spec& c) {
  Product p(c);
  sparse_gemm(p.args(c), kCpu);
  for (int m = 0; m < c.m; ++m)
    for (int n = 0; n < c.n; ++n) CHECK_EQ(p.out.get(Product::at(c, m, n)), p.expected(c, m, n));
}

constexpr GemmPass kPasses[] = {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight,
                                GemmPass::kGradWeightOfInput};
constexpr Orientation kBoth[] = {Orientation::kKMajor, Orientation::kMnMajor};
constexpr GemmEpilogue kPlain = GemmEpilogue::kPlain;

}  // namespace

TEST(float8_products_of_small_integers_are_exact) {
  for (GemmPass pass : kPasses)
    for (DType format : {DType::kFloat8E4M3, DType::kFloat8E5M2})
      for (DType out : {DType::kBFloat16, DType::kFloat32})
        for (Orientation lhs : kBoth)
          for (Orientation rhs : kBoth)
            for (bool accumulate : {false, true}) {
              const bool bias = pass == GemmPass::kForward && !accumulate;
              check({pass, kPlain, 68, 12, 160, format, out, lhs, rhs, bias, accumulate, true});
              check({pass, kPlain, 8, 20, 32, format, out, lhs, rhs, false, accumulate, false});
            }
}

TEST(tokens_of_float8_products_may_end_within_the_padding) {
  for (GemmPass pass : {GemmPass::kGradWeight, GemmPass::kGradWeightOfInput})
    for (int tokens : {1, 30, 33, 130})
      check({pass, kPlain, 16, 8, tokens, DType::kFloat8E4M3, DType::kFloat32, Orientation::kKMajor,
             Orientation::kKMajor, false, true, true});
}

TEST(the_gradient_of_a_pruned_input_is_stored_as_that_of_the_weight) {
  for (DType format : {DType::kBFloat16, DType::kFloat16, DType::kFloat32})
    for (DType out : {format, DType::kFloat32})
      for (bool accumulate : {false, true})
        for (int tokens : {4, 31, 64})
          check({GemmPass::kGradWeightOfInput, kPlain, 24, 12, tokens, format, out,
                 Orientation::kMnMajor, Orientation::kMnMajor, false, accumulate, false});
}

TEST(pruned_activations_may_have_any_number_of_tokens) {
  for (GemmPass pass : {GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput})
    for (DType format : {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat8E4M3})
      for (Orientation lhs : kBoth)
        for (Orientation rhs : kBoth)
          for (bool accumulate : {false, true})
            for (int tokens : {1, 31, 64, 66}) {
              const bool scaled = is_float8(format);
              check({pass, kPlain, tokens, 12, 68, format, scaled ? DType::kBFloat16 : format, lhs,
                     rhs, false, accumulate, scaled});
            }
}

TEST(its_decay_is_that_of_the_other_product) {
  constexpr int kRows = 132, kCols = 8;  // of dW; two weights, of 64 and 68 rows
  Random random(3);
  std::vector<uint16_t> mask(kRows / 4 * (kCols / 4));
  for (uint16_t& bits : mask) bits = static_cast<uint16_t>(random.bits());
  Elements weight(kRows * kCols, DType::kBFloat16);
  for (size_t i = 0; i < weight.size(); ++i) weight.set(i, static_cast<float>(random.below(9)));
  const float factor = 2.0f;
  const Spec c{GemmPass::kGradWeightOfInput,
               kPlain,
               kCols,
               kRows,
               32,
               DType::kBFloat16,
               DType::kBFloat16,
               Orientation::kMnMajor,
               Orientation::kMnMajor,
               false,
               true,
               false};
  Product p(c);
  SparseGemmArgs args = p.args(c);
  char* const values = static_cast<char*>(weight.data());
  args.decay = {&factor,
                {values, values + 64 * kCols * 2},
                kCols,
                1,
                {mask.data(), mask.data() + 64 / 4 * (kCols / 4)},
                64};
  sparse_gemm(args, kCpu);
  for (int row = 0; row < kRows; ++row)
    for (int col = 0; col < kCols; ++col) {
      const bool kept = mask[row / 4 * (kCols / 4) + col / 4] >> (row % 4 * 4 + col % 4) & 1;
      const float pull = kept ? 0.0f : factor * weight.get(row * kCols + col);
      CHECK_EQ(p.out.get(row * kCols + col), p.out.rounded(p.expected(c, col, row) + pull));
    }
  args.decay.first_rows = 60;
  CHECK_THROWS(sparse_gemm(args, kCpu),
               "decay.first_rows must be n = 132 or a smaller multiple of 64, got 60");
}

TEST(activations_follow_the_scaled_product) {
  for (GemmEpilogue epilogue : {GemmEpilogue::kActivation, GemmEpilogue::kGate}) {
    const Spec c{GemmPass::kForward,
                 epilogue,
                 128,
                 5,
                 96,
                 DType::kFloat8E4M3,
                 DType::kBFloat16,
                 Orientation::kKMajor,
                 Orientation::kKMajor,
                 true,
                 false,
                 true};
    Product p(c);
    sparse_gemm(p.args(c), kCpu);
    for (int n = 0; n < c.n; ++n)
      for (int m = 0; m < 128; ++m) CHECK_EQ(p.out.get(n * 128 + m), p.expected(c, m, n));
    const bool gated = epilogue == GemmEpilogue::kGate;
    for (int n = 0; n < c.n; ++n)
      for (int f = 0; f < (gated ? 64 : 128); ++f) {
        const float gate = p.out.get(n * 128 + f), up = gated ? p.out.get(n * 128 + 64 + f) : 1.0f;
        CHECK_EQ(p.h.get(n * (gated ? 64 : 128) + f), p.h.rounded(gate * up));
      }
  }
}

TEST(what_8_bit_products_do_not_have_is_named) {
  const Spec c{GemmPass::kForward,
               kPlain,
               8,
               4,
               32,
               DType::kFloat8E4M3,
               DType::kBFloat16,
               Orientation::kKMajor,
               Orientation::kKMajor,
               false,
               false,
               true};
  Product p(c);
  SparseGemmArgs args = p.args(c);
  args.out_dtype = DType::kFloat16;
  CHECK_THROWS(sparse_gemm(args, kCpu),
               "out_dtype of a product of float8_e4m3fn must be bfloat16 or float32, got float16");
  args.out_dtype = args.lhs.format = DType::kBFloat16;
  CHECK_THROWS(sparse_gemm(args, kCpu), "scales belong to 8-bit operands, got bfloat16");
}

TEST_MAIN()
