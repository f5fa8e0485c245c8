// The CPU's sparse GEMM against a dense product of the unpacked operand, in every pass.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "matrices.h"
#include "testing.h"

using namespace testing;

namespace {

/// A packed operand of each kind, and the dense matrix lhs(m, k) that it stands for.
struct Operand {
  std::vector<uint8_t> packed, E;
  TestMatrix dense;  // [m, k]
};

/// W [out_features, in_features], pruned by its mask: the lhs of forward (rows) and dx (columns). Rows of a pruned
/// activation are like those of forward.
Operand make_weight(GemmPass pass, int64_t m, int64_t k, DType dtype, std::mt19937& random) {
  const bool transposed = pass == GemmPass::kGradInput;
  const int64_t rows = transposed ? k : m, cols = transposed ? m : k;
  TestMatrix w(rows, cols, dtype);
  w.fill_integers(random, 7);
  Packed packed(rows, cols, dtype);
  const PackArgs args = packed.args(w, dtype);
  search_and_pack(&args, 1, kCpu);

  TestMatrix dense(m, k, dtype);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) {
      const uint16_t mask = packed.mask[static_cast<size_t>(r / 4 * (cols / 4) + c / 4)];
      const float value = mask >> (4 * (r % 4) + c % 4) & 1 ? w.get(r, c) : 0.0f;
      transposed ? dense.set(c, r, value) : dense.set(r, c, value);
    }
  return {transposed ? packed.values_t : packed.values, transposed ? packed.E_t : packed.E, dense};
}

/// dy [tokens, features] pruned by MVUE: the lhs of dW is its transpose.
Operand make_gradient(int64_t features, int64_t tokens, DType dtype, std::mt19937& random) {
  const int64_t seed[2] = {3, 4};
  TestMatrix dy(tokens, features, dtype), dense(features, tokens, dtype);
  dy.fill_integers(random, 7);
  PrunedGradient pruned(dy, seed);
  const TestMatrix dense_t = pruned.unpacked();
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t f = 0; f < features; ++f) dense.set(f, t, dense_t.get(t, f));
  return {pruned.packed.bytes(), pruned.E, dense};
}

struct Problem {
  int64_t m, n, k;
};

/// Small integers: every sum is exact, so results must be equal.
void check_product(GemmPass pass, const Problem& p, DType dtype, DType out_dtype, bool with_bias,
                   bool accumulate, std::mt19937& random,
                   GemmEpilogue epilogue = GemmEpilogue::kPlain) {
  const bool weight_grad = pass == GemmPass::kGradWeight, m_rows = is_m_by_n(pass);
  const bool k_rows = rhs_orientation(pass, dtype) == Orientation::kMnMajor;
  Operand lhs = weight_grad ? make_gradient(p.m, p.k, dtype, random)
                            : make_weight(pass, p.m, p.k, dtype, random);
  // rhs(k, n): [k, n] or [n, k]; the output [m, n] or [n, m]. Both with gaps.
  TestMatrix rhs(k_rows ? p.k : p.n, k_rows ? p.n : p.k, dtype, Order::kRowMajor, 8);
  TestMatrix out(m_rows ? p.m : p.n, m_rows ? p.n : p.m, out_dtype, Order::kRowMajor, 4);
  rhs.fill_integers(random, 3);
  out.fill_integers(random, 9);
  const TestMatrix before = out;
  TestMatrix bias(1, p.m, dtype);
  bias.fill_integers(random, 5);
  const bool gated = epilogue == GemmEpilogue::kGate;
  TestMatrix h(p.n, gated ? p.m / 2 : p.m, dtype, Order::kRowMajor, 4), expected_h = h;

  SparseGemmArgs args;
  args.pass = pass;
  args.epilogue = epilogue;
  args.m = p.m, args.n = p.n, args.k = p.k;
  args.lhs.format = dtype;
  args.lhs.orientation = lhs_orientation(pass, dtype);
  args.rhs.orientation = rhs_orientation(pass, dtype);
  args.out_dtype = out_dtype;
  args.lhs.values = lhs.packed.data();
  args.lhs.E = lhs.E.data();
  args.rhs.values = rhs.data();
  args.rhs.ld = rhs.ld();
  args.out = out.data();
  args.out_ld = out.ld();
  args.bias = with_bias ? bias.data() : nullptr;
  args.accumulate = accumulate;
  args.h = h.data();
  args.h_ld = h.ld();
  args.activation = Activation::kSquaredRelu;
  CHECK_EQ(sparse_gemm_unsupported(args, kCpu), std::string());
  CHECK_EQ(sparse_gemm_workspace_bytes(args, kCpu), 0);
  sparse_gemm(args, kCpu);

  TestMatrix rounded(1, 1, out_dtype);
  for (int64_t m = 0; m < p.m; ++m)
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = with_bias ? bias.get(0, m) : 0.0;
      for (int64_t k = 0; k < p.k; ++k)
        sum += static_cast<double>(lhs.dense.get(m, k)) * (k_rows ? rhs.get(k, n) : rhs.get(n, k));
      const auto at = [&](const TestMatrix& t) { return m_rows ? t.get(m, n) : t.get(n, m); };
      if (accumulate) sum += at(before);
      rounded.set(0, 0, static_cast<float>(sum));
      CHECK_EQ(at(out), rounded.get(0, 0));
    }

  if (epilogue != GemmEpilogue::kPlain) {
    ActivationArgs separate;
    separate.kind = args.activation;
    separate.gated = gated;
    separate.gate_up = out.const_view();
    separate.h = expected_h.view();
    activation_forward(separate, kCpu);
  }
  CHECK(h.memory() == expected_h.memory());
}

}  // namespace

TEST(products_of_small_integers_are_exact) {
  std::mt19937 random(1);
  for (GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight,
                        GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput})
    for (const Problem& p :
         {Problem{4, 1, 4}, Problem{64, 8, 64}, Problem{68, 31, 132}, Problem{12, 65, 8}})
      for (DType dtype : kDTypes)
        for (DType out_dtype : {dtype, DType::kFloat32})
          for (bool accumulate : {false, true})
            check_product(pass, p, dtype, out_dtype, pass == GemmPass::kForward && p.n > 1,
                          accumulate, random);
}

TEST(activations_are_those_of_the_rounded_product) {
  std::mt19937 random(4);
  for (GemmEpilogue epilogue : {GemmEpilogue::kActivation, GemmEpilogue::kGate})
    for (const Problem& p : {Problem{128, 1, 8}, Problem{256, 33, 132}})
      for (DType dtype : kDTypes)
        for (bool with_bias : {false, true})
          check_product(GemmPass::kForward, p, dtype, dtype, with_bias, false, random, epilogue);
}

TEST(tokens_need_not_be_a_multiple_of_anything) {
  std::mt19937 random(2);
  for (int64_t tokens : {1, 2, 3, 5, 7, 9, 63, 65})
    check_product(GemmPass::kGradWeight, {16, 12, tokens}, DType::kBFloat16, DType::kFloat32, false,
                  true, random);
}

/// Integers and a factor of 2: exact. The first weight has `first_rows` of the m rows.
void check_decay(int64_t m, int64_t n, int64_t k, int64_t first_rows, DType dtype, DType out_dtype,
                 Order order, bool accumulate, std::mt19937& random) {
  const Operand lhs = make_gradient(m, k, dtype, random);
  TestMatrix rhs(k, n, dtype), out(m, n, out_dtype);
  rhs.fill_integers(random, 3);
  out.fill_integers(random, 9);
  const float factor = 2.0f;

  SparseGemmArgs args;
  args.pass = GemmPass::kGradWeight;
  args.m = m, args.n = n, args.k = k;
  args.lhs = {lhs.packed.data(), lhs.E.data(), dtype, Orientation::kMnMajor, nullptr};
  args.rhs = {rhs.data(), rhs.ld(), Orientation::kMnMajor, nullptr};
  args.out_dtype = out_dtype;
  args.out_ld = out.ld();
  args.accumulate = accumulate;
  TestMatrix without = out;
  args.out = without.data();
  sparse_gemm(args, kCpu);

  // Both in memory as tall as the taller: they share their strides.
  std::vector<TestMatrix> weights;
  std::vector<Packed> packed;
  const int64_t rows[2] = {first_rows, m - first_rows}, tall = std::max(rows[0], rows[1]);
  for (int i = 0; i < 2; ++i) {
    weights.emplace_back(tall, n, out_dtype, order);
    weights[i].fill_integers(random, 5);
    packed.emplace_back(tall, n, DType::kBFloat16);
    PackArgs search = packed[i].args(weights[i], DType::kBFloat16);
    search_mask(&search, 1, kCpu);
    args.decay.weight[i] = weights[i].data();
    args.decay.mask[i] = packed[i].mask.data();
  }
  args.decay.factor = &factor;
  args.decay.row_stride = weights[0].view().row_stride;
  args.decay.col_stride = weights[0].view().col_stride;
  args.decay.first_rows = first_rows;
  args.out = out.data();
  sparse_gemm(args, kCpu);

  TestMatrix rounded(1, 1, out_dtype);
  for (int64_t r = 0; r < m; ++r)
    for (int64_t c = 0; c < n; ++c) {
      const int second = r >= first_rows;
      const int64_t row = r - (second ? first_rows : 0);
      const uint16_t mask = packed[second].mask[static_cast<size_t>(row / 4 * (n / 4) + c / 4)];
      const bool kept = mask >> (4 * (row % 4) + c % 4) & 1;
      const float pull = kept ? 0.0f : factor * weights[second].get(row, c);
      rounded.set(0, 0, without.get(r, c) + pull);
      CHECK_EQ(out.get(r, c), rounded.get(0, 0));
    }
}

TEST(decay_is_added_where_the_mask_prunes) {
  std::mt19937 random(4);
  for (Order order : {Order::kRowMajor, Order::kColumnMajor})
    for (DType out_dtype : {DType::kBFloat16, DType::kFloat32})
      for (bool accumulate : {false, true}) {
        check_decay(12, 20, 4, 12, DType::kBFloat16, out_dtype, order, accumulate, random);
        check_decay(132, 36, 5, 64, DType::kBFloat16, out_dtype, order, accumulate, random);
        check_decay(196, 8, 3, 128, DType::kBFloat16, out_dtype, order, accumulate, random);
      }
}

TEST(bad_decay_terms_are_named) {
  const float factor = 1.0f;
  const uint16_t mask[64] = {};
  float memory[68 * 4] = {};
  SparseGemmArgs good;
  good.pass = GemmPass::kGradWeight;
  good.m = 68, good.n = 4;
  good.lhs.format = good.out_dtype = DType::kFloat32;
  good.rhs.ld = good.out_ld = 4;
  good.rhs.orientation = Orientation::kMnMajor;
  good.out = memory;
  good.decay = {&factor, {memory, memory}, 4, 1, {mask, mask}, 68};
  const auto changed = [&](auto change) {
    SparseGemmArgs args = good;
    change(args);
    return args;
  };
  sparse_gemm(good, kCpu);
  CHECK_THROWS(
      sparse_gemm(changed([](auto& a) { a.pass = GemmPass::kGradInput, a.out_ld = 68; }), kCpu),
      "decay belongs to the weight gradient only");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.m = 66; }), kCpu),
               "multiples of 4, got 66 and 4");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.decay.first_rows = 60; }), kCpu),
               "decay.first_rows must be m = 68 or a smaller multiple of 64, got 60");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.decay.row_stride = 3; }), kCpu),
               "decay.weight must be row- or column-major, got strides (3, 1)");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.decay.mask[0] = nullptr; }), kCpu),
               "decay.mask must not be null");
  CHECK_THROWS(
      sparse_gemm(changed([](auto& a) { a.decay.first_rows = 64, a.decay.weight[1] = nullptr; }),
                  kCpu),
      "decay.weight must not be null");
}

TEST(no_tokens_leave_zero_or_what_was_there) {
  float out[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  SparseGemmArgs args;
  args.pass = GemmPass::kGradWeight;
  args.m = 4, args.n = 2, args.k = 0;
  args.lhs.format = args.out_dtype = DType::kFloat32;
  args.rhs.ld = 2, args.out_ld = 2;
  args.rhs.orientation = Orientation::kMnMajor;
  args.out = out;
  args.accumulate = true;
  sparse_gemm(args, kCpu);
  CHECK_EQ(out[7], 8.0f);
  args.accumulate = false;
  sparse_gemm(args, kCpu);
  for (float x : out) CHECK_EQ(x, 0.0f);
}

TEST(bad_gemm_arguments_are_named) {
  SparseGemmArgs good;
  good.m = 4, good.n = 4, good.k = 8;
  good.rhs.ld = 8, good.out_ld = 4;
  const auto changed = [&](auto change) {
    SparseGemmArgs args = good;
    change(args);
    return args;
  };
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.k = 6; }), kCpu),
               "k must be a multiple of 4, got 6");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.rhs.ld = 7; }), kCpu),
               "rhs_ld must be at least 8");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.out_ld = 3; }), kCpu),
               "out_ld must be at least 4");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.out_dtype = DType::kFloat16; }), kCpu),
               "out_dtype must be that of the operands (bfloat16)");
  CHECK_THROWS(sparse_gemm(good, kCpu), "out must not be null");

  good.epilogue = GemmEpilogue::kActivation, good.h_ld = 4;
  float out[16];
  good.out = out;
  CHECK_THROWS(sparse_gemm(good, kCpu), "h must not be null");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.h_ld = 3; }), kCpu), "h_ld must be at least 4");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.accumulate = true; }), kCpu),
               "does not accumulate");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.out_dtype = DType::kFloat32; }), kCpu),
               "out_dtype of a product of bfloat16 with an activation must be bfloat16");
  CHECK_THROWS(sparse_gemm(changed([](auto& a) { a.epilogue = GemmEpilogue::kGate; }), kCpu),
               "d_ff a multiple of 64, got m = 4");
}

TEST_MAIN()
