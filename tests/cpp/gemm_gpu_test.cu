// gemm_gpu_test.cu: the sparse GEMM on a GPU, in every pass; those of older GPUs on a Hopper one by
// SPARSE24_ARCH=sm80 (as on an A100) or sm86 (with the shared memory of a 3090 or 4090).
//
//   metadata  our order of E equals that of CUTLASS' own compressor
//   exact     small integers, by every config: equal to the host's product, with bias,
//             accumulation, both output dtypes and odd token counts; canaries around outputs stay
//   activated h beside the product: the bits of activation_forward after it
//   decay     masked decay in the product: the bits of the product without it and the formula
//   bounded   normal values: error against fp64 within the rounding of the output and of fp32 sums
//   repeats   250 runs give the same bits
//   refusals  what the kernels cannot take is said, not run
//   sanitize  few and small products that show each role of the kernels to compute-sanitizer
//
// Of 16-bit operands; 8-bit ones are in gemm_float8_gpu_test.cu. CMake builds it with the library's
// objects (SPARSE24_TESTS=ON). Speed is measured by bench/bench_gemm.py.
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gemm_checks.h"
#include "gpu_test_main.h"
#include "metadata_order.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

constexpr GemmPass kPasses[] = {GemmPass::kForward,        GemmPass::kGradInput,
                                GemmPass::kGradWeight,     GemmPass::kGradWeightOfInput,
                                GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput};

/// Only forward products have a bias, and those of activations no fp32 output.
Variant fitting(const Problem& p, Variant v) {
  v.bias = v.bias && p.pass == GemmPass::kForward;
  v.float_out = v.float_out && !is_of_activation(p.pass);
  return v;
}

void test_products() {
  const Kernel kernel = chosen();
  const Variant variants[] = {{false, false, false}, {true, false, false}, {false, true, true},
                              {true, true, false},   {false, false, true}, {false, true, false}};
  std::vector<Problem> problems;
  for (const int tokens : {1, 31, 65, 1000}) {
    problems.push_back({GemmPass::kForward, 264, tokens, 208, true});
    problems.push_back({GemmPass::kGradInput, 264, tokens, 212, true});
    problems.push_back({GemmPass::kGradWeight, 264, 136, tokens, true});
    // Rows of out that end within a 16-byte unit: what padded rows are for (ops/gemm/padding.py).
    problems.push_back({GemmPass::kForward, 268, tokens, 208, true});
    problems.push_back({GemmPass::kGradWeight, 264, 133, tokens, true});
    problems.push_back({GemmPass::kGradWeightOfInput, 264, 133, tokens, true});
    for (const GemmPass pass : {GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput}) {
      problems.push_back({pass, tokens, 264, 208, true});
      problems.push_back({pass, tokens, 268, 208, true});
    }
  }
  for (const GemmPass pass : kPasses) {
    problems.push_back({pass, 2312, 1800, 192, true});  // more tiles than a wave: rings wrap
    problems.push_back({pass, 520, 264, 1024, false});
    problems.push_back({pass, 8, 8, 16, true});
  }
  size_t next_variant = 0;
  for (const Problem& p : problems) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      Problem typed = p;
      typed.format = dtype;
      const Operands o = make_operands(typed);
      const Device d(o);
      const bool all =
          p.m < 1000;  // every epilogue on every small problem, one in turn on large ones
      for (size_t i = 0; i < (all ? std::size(variants) : 1); ++i) {
        const Variant& v = variants[all ? i : next_variant++ % std::size(variants)];
        check_case(typed, o, d, kernel, fitting(typed, v));
      }
    }
  }
}

/// On 132 multiprocessors, 66 clusters (sm80: 132 blocks, each of a tile half as wide) run at a
/// time: one lane a tile and helpers; and a whole wave before the shared one.
constexpr int kTilesOfHelpers = 44, kTilesOfTwoWaves = 70;

void test_every_config() {
  std::vector<Problem> problems;
  for (const GemmPass pass : kPasses) {
    problems.push_back({pass, 8, 8, 64, true});          // one K tile for all
    problems.push_back({pass, 2312, 1800, 192, true});   // more tiles than fit at once
    problems.push_back({pass, 264, 136, 4112, true});    // stream-K: many lanes
    problems.push_back({pass, 520, 1032, 2048, false});  // few
    problems.push_back({pass, 8, kTilesOfHelpers * 256, 6016, true});
    problems.push_back({pass, 8, kTilesOfTwoWaves * 256, 2064, true});
    if (pass == GemmPass::kGradWeight)  // the narrower tile is of this pass
      problems.push_back({pass, 8, kTilesOfHelpers * 192, 6016, true});
  }
  for (const Problem& p : problems) {
    const Operands o = make_operands(p);
    const Device d(o);
    std::vector<Variant> variants = {
        {false, false, false}, {false, true, true}, {true, true, false}};
    if (p.m > 1000 || p.n > 2000) variants.resize(1);  // comparing takes the time
    for (const Variant& wanted : variants) {
      const Variant v = fitting(p, wanted);
      for (const Kernel& kernel : every_config(make_args(p, d, v))) check_case(p, o, d, kernel, v);
    }
  }
}

void check_decays(const Problem& p, const Variant& v) {
  const Operands o = make_operands(p);
  const Device d(o);
  const int rows = p.m_rows() ? p.m : p.n;  // of dW
  for (const int first_rows : {rows, 64, 192}) {
    if (first_rows > rows) continue;
    for (const bool column_major : {false, true})
      for (const Kernel& kernel : every_config(make_args(p, d, v)))
        check_decay({p, v, first_rows, column_major}, o, d, kernel);
  }
}

void test_decay() {
  for (const GemmPass pass : {GemmPass::kGradWeight, GemmPass::kGradWeightOfInput}) {
    for (const bool integers : {true, false}) {
      for (const Problem& p :
           {Problem{pass, 264, 136, 200, integers}, Problem{pass, 520, 1032, 1024, integers},
            Problem{pass, 136, 264, 200, integers}, Problem{pass, 8, 8, 64, integers}}) {
        for (const bool float_out : {false, true}) {
          if (!float_out && !integers) continue;  // two roundings differ from one
          for (const bool accumulate : {false, true})
            check_decays(p, {false, accumulate, float_out});
        }
      }
    }
  }
}

/// Small enough for compute-sanitizer (tests/sanitize.sh): each tile with and without stream-K.
/// Three sizes: edges in both extents, and many lanes; one lane and helpers; a whole wave before
/// the shared one. Values are poison where no kernel may read; all of out is initialised, since
/// initcheck does not see stores by TMA.
void test_sanitize() {
  const Variant variants[] = {{true, false, false}, {true, true, true}, {false, true, false}};
  for (const GemmPass pass : kPasses) {
    const bool weight = is_grad_weight(pass), activation = is_of_activation(pass);
    const Problem problems[] = {{pass, activation ? 279 : 264, weight || activation ? 296 : 279,
                                 weight ? 3203 : 3200, true},
                                {pass, 8, kTilesOfHelpers * 256, 6016, true},
                                {pass, 8, kTilesOfTwoWaves * 256, 2064, true}};
    for (const Problem& p : problems) {
      const Operands o = make_operands(p);
      const Device d(o);
      for (const Variant& wanted : variants) {
        if (p.m == 8 && !wanted.float_out) continue;  // epilogues differ in nothing there
        const Variant v = fitting(p, wanted);
        for (const Kernel& kernel : first_walks(make_args(p, d, v))) {
          check_case(p, o, d, kernel, v);
          if (!weight) continue;
          check_decay({p, v, p.m_rows() ? p.m : p.n, false}, o, d, kernel);
          if (p.m > 64) check_decay({p, v, 64, true}, o, d, kernel);
        }
      }
    }
  }
  const auto forward = [](GemmEpilogue epilogue, int m) {
    return Problem{GemmPass::kForward, m, 279, 3200, true, DType::kBFloat16, epilogue};
  };
  check_activated(forward(GemmEpilogue::kActivation, 264), false);
  check_activated(forward(GemmEpilogue::kGate, 384), false);
}

void test_activated() {
  constexpr GemmEpilogue kPlain = GemmEpilogue::kActivation, kGated = GemmEpilogue::kGate;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const auto check = [&](GemmEpilogue epilogue, int m, int n, int k, bool integers) {
      check_activated({GemmPass::kForward, m, n, k, integers, dtype, epilogue}, true);
    };
    for (const int tokens : {1, 65, 300}) {
      check(kPlain, 8, tokens, 16, true);
      check(kPlain, 328, tokens, 208, true);
      check(kGated, 128, tokens, 16, true);
      check(kGated, 384, tokens, 208, true);
      check(kGated, 256, tokens, 4112, true);  // stream-K
    }
    check(kPlain, 1280, 4104, 512, false);  // several tiles a block
    check(kGated, 1280, 4104, 512, false);
  }
}

void test_repeats() {
  for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradWeight, GemmPass::kForwardOfInput,
                              GemmPass::kGradInputOfOutput}) {
    const Problem p{pass, 1280, 1024, 2048, false};
    check_repeats(p, fitting(p, {false, false, true}));
  }
}

std::string unsupported(const SparseGemmArgs& a) { return gemm::unsupported(a, 0); }

void check_refused(GemmPass pass, const char* named,
                   const std::function<void(SparseGemmArgs&)>& change) {
  ++cases;
  const Problem p{pass, 64, 64, 64, true};
  const Device d(make_operands(p));
  SparseGemmArgs args = make_args(p, d, {false, false, false});
  if (const std::string reason = unsupported(args); !reason.empty())
    fail("good arguments refused: ", reason);
  change(args);
  if (unsupported(args).find(named) == std::string::npos)
    fail("'", named, "' not in the refusal, but: '", unsupported(args), "'");
}

void test_refusals_of_activations() {
  for (const GemmPass pass : {GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput}) {
    check_refused(pass, pass == GemmPass::kForwardOfInput ? "in_features 40" : "out_features 40",
                  [](auto& a) { a.k = 40; });
    check_refused(pass, "no kernel is compiled for",
                  [](auto& a) { a.out_dtype = DType::kFloat32; });
    check_refused(pass, "no kernel is compiled for",
                  [](auto& a) { a.lhs.format = DType::kFloat8E4M3; });
  }
}

void test_refusals() {
  const Problem p{GemmPass::kForward, 64, 64, 64, true};
  const Device d(make_operands(p));
  const Buffer out(64 * 1024);
  SparseGemmArgs good = make_args(p, d, {false, false, false});
  good.out = out.get();
  const std::pair<const char*, std::function<void(SparseGemmArgs&)>> broken[] = {
      {"in_features", [](SparseGemmArgs& a) { a.k = 40; }},
      {"multiple of 8", [](SparseGemmArgs& a) { a.rhs.ld = 67; }},
      {"multiple of 8", [](SparseGemmArgs& a) { a.out_ld = 67; }},
      {"float", [](SparseGemmArgs& a) { a.lhs.format = a.out_dtype = DType::kFloat32; }},
  };
  if (const std::string reason = unsupported(good); !reason.empty())
    fail("good arguments refused: ", reason);
  if (!has_kernels(&gemm::arch_on(0), true)) {
    SparseGemmArgs float8 = good;
    float8.lhs.format = DType::kFloat8E4M3;
    if (unsupported(float8).find(
            "products of 8 bits need a GPU of compute capability 8.9 or 9.0") == std::string::npos)
      fail("products of 8 bits are not refused with the reason: ", unsupported(float8));
  }
  for (const auto& [name, change] : broken) {
    ++cases;
    SparseGemmArgs bad = good;
    change(bad);
    const std::string reason = unsupported(bad);
    if (reason.find(name) == std::string::npos)
      fail("'", name, "' not in the refusal, but: '", reason, "'");
  }
}

void test_metadata_order() {
  for (const auto& [m, k] : {std::pair(128, 128), {192, 320}, {64, 64}})
    check_metadata_order<cutlass::bfloat16_t, DType::kBFloat16>(m, k);
}

}  // namespace

int main(int count, char** arguments) {
  return run_gpu_tests({{"metadata_order", test_metadata_order},
                        {"refusals", test_refusals},
                        {"refusals_of_activations", test_refusals_of_activations},
                        {"products", test_products},
                        {"decay", test_decay},
                        {"activated", test_activated},
                        {"sanitize", test_sanitize},
                        {"every_config", test_every_config},
                        {"repeats", test_repeats}},
                       count, arguments);
}
