// gemm_float8_gpu_test.cu: the sparse GEMM of 8-bit operands on a Hopper or Ada GPU; SPARSE24_ARCH=sm89
// takes the kernels of Ada.
//
//   metadata  our 8-bit order of E equals that of CUTLASS' own compressor
//   instruction  mma.sp m16n8k64 is what the PTX manual says: what kernels for Ada build upon
//   identity  every finite e4m3 code, through every position of a K tile, comes out as it is
//   exact     small integers, both accumulations, by every config: equal to the host's product,
//             with scales, bias, accumulation, both output dtypes; canaries around outputs stay
//   gate, activation, decay   as of 16 bits, after the scale
//   bounded   normal values: promoted sums err at most twice as much as exact ones that are
//             rounded; sums of one sign have no bias
//   sanitize  few and small products that show each role of the kernels to compute-sanitizer
//
//   bench     only by name: TFLOP/s (counted dense) of both accumulations and of bf16
#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "gemm/sm80/instructions.h"
#include "gemm_bench.h"
#include "gemm_checks.h"
#include "gpu_test_main.h"
#include "metadata_order.h"
#include "mma_sp8.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

constexpr DType kFormat = DType::kFloat8E4M3;
constexpr GemmPass kPasses[] = {GemmPass::kForward,        GemmPass::kGradInput,
                                GemmPass::kGradWeight,     GemmPass::kGradWeightOfInput,
                                GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput};
constexpr Accumulation kAccumulations[] = {Accumulation::kFast, Accumulation::kPromoted};

Problem problem(GemmPass pass, int m, int n, int k, bool integers) {
  return {pass, m, n, k, integers, kFormat};
}

/// Every way to end a product, where there is a kernel for it.
std::vector<Variant> variants(const Problem& p) {
  std::vector<Variant> all;
  for (const Accumulation accumulation : kAccumulations)
    for (const bool float_out : {false, true})
      for (const bool accumulate : {false, true}) {
        const Variant v{p.pass == GemmPass::kForward && !accumulate, accumulate, float_out,
                        accumulation};
        if (has_kernel(p, v)) all.push_back(v);
      }
  if (all.empty()) fail("no kernel for ", gemm::name_of(p.pass));
  return all;
}

void test_metadata_order() {
  for (const auto& [m, k] : {std::pair(128, 128), {192, 384}, {64, 128}, {320, 1152}})
    check_metadata_order<cutlass::float_e4m3_t, kFormat>(m, k);
}

__global__ void instruction_kernel(const uint4* lhs, const uint4* rhs, const uint32_t* meta,
                                   float4* product) {
#if __CUDA_ARCH__ >= 890
  const int lane = threadIdx.x;
  const uint32_t a[4] = {lhs[lane].x, lhs[lane].y, lhs[lane].z, lhs[lane].w},
                 b[4] = {rhs[lane].x, rhs[lane].y, rhs[lane].z, rhs[lane].w};
  float sums[4];
  gemm::sm80::multiply_sparse8(sums, a, b, meta[lane]);
  product[lane] = make_float4(sums[0], sums[1], sums[2], sums[3]);
#endif
}

/// Small integers, and positions at random.
void test_instruction() {
  Random random(1);
  for (int round = 0; round < 100; ++round) {
    ++cases;
    testing::Registers lhs, rhs;
    std::array<uint32_t, 32> meta{};
    for (int lane = 0; lane < 32; ++lane) {
      for (int byte = 0; byte < 16; ++byte) {
        const auto code = [&] { return from_float<Float8E4M3>(random.below(9) - 4).bits; };
        lhs[lane][byte / 4][byte % 4] = code();
        rhs[lane][byte / 4][byte % 4] = code();
      }
      for (int group = 0; group < 8; ++group) {
        const int first = random.below(3), second = first + 1 + random.below(3 - first);
        meta[lane] |= static_cast<uint32_t>(first | second << 2) << (4 * group);
      }
    }
    const Buffer a(std::vector<testing::Registers>{lhs}), b(std::vector<testing::Registers>{rhs}),
        words(std::vector<std::array<uint32_t, 32>>{meta}), product(32 * sizeof(float4));
    instruction_kernel<<<1, 32>>>(static_cast<uint4*>(a.get()), static_cast<uint4*>(b.get()),
                                  static_cast<uint32_t*>(words.get()),
                                  static_cast<float4*>(product.get()));
    synchronize_or_exit("instruction");
    const std::vector<float> got = product.read<float>();
    float expected[16][8] = {};
    testing::multiply_sparse8(expected, lhs, rhs, meta);
    for (int i = 0; i < 128; ++i) {
      const int lane = i / 4, row = lane / 4 + i % 4 / 2 * 8, column = lane % 4 * 2 + i % 2;
      if (got[i] == expected[row][column]) continue;
      fail("instruction at [", row, ", ", column, "]: ", got[i], " for ", expected[row][column]);
      break;
    }
  }
}

void test_refusals() {
  const Problem p = problem(GemmPass::kGradWeight, 64, 64, 64, true);
  const Device d(make_operands(p));
  const SparseGemmArgs good = make_args(p, d, {false, false, false});
  if (const std::string why = gemm::unsupported(good, 0); !why.empty())
    fail("good arguments refused: ", why);
  const auto expect_refusal = [&](const char* words, auto change) {
    ++cases;
    SparseGemmArgs bad = good;
    change(bad);
    const std::string why = gemm::unsupported(bad, 0);
    if (why.find(words) == std::string::npos)
      fail("'", words, "' not in the refusal, but: '", why, "'");
  };
  expect_refusal("tokens 40, not a multiple of 32", [](auto& a) { a.k = 40; });
  expect_refusal("not a multiple of 16", [](auto& a) { a.rhs.ld = 72; });
  expect_refusal("K-major", [](auto& a) { a.rhs.orientation = Orientation::kMnMajor; });
  expect_refusal("no kernel is compiled", [](auto& a) { a.out_dtype = DType::kFloat16; });
}

/// lhs(m, k) = 1 where m = k, and rhs has each code somewhere at each k.
void test_identity() {
  constexpr int kSize = 256;
  for (const Accumulation accumulation : kAccumulations) {
    const Problem p = problem(GemmPass::kForward, kSize, kSize, kSize, true);
    Operands o = make_operands(p);
    o.lhs.values = Elements(o.lhs.values.size(), kFormat);
    for (int m = 0; m < kSize; ++m) {
      for (int group = 0; group < kSize / 4; ++group) {
        uint8_t& byte = o.lhs.E[meta_offset_for(kFormat, m, group / 2 * 8, kSize)];
        const int first = group == m / 4 && m % 4 < 3 ? m % 4 : 0, shift = group % 2 * 4;
        byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (first | 3 << 2) << shift);
      }
      o.lhs.values.set(static_cast<size_t>(m) * kSize / 2 + m / 4 * 2 + (m % 4 == 3 ? 1 : 0), 1.0f);
    }
    for (int n = 0; n < kSize; ++n) {
      for (int k = 0; k < kSize; ++k) {
        const size_t at = static_cast<size_t>(n) * p.rhs_ld() + k;
        const uint8_t code = static_cast<uint8_t>(n + k);
        o.rhs.bytes()[at] = (code & 0x7F) == 0x7F ? 0 : code;  // no NaN
        o.exact[p.out_index(k, n)] = p.scale() * o.rhs.get(at);
      }
    }
    check_case(p, o, Device(o), chosen(), {false, false, false, accumulation});
  }
}

void test_products() {
  const Kernel kernel = chosen();
  std::vector<Problem> problems;
  for (const GemmPass pass : kPasses) {
    for (const int k : {32, 96, 224, 992}) {
      problems.push_back(problem(pass, 264, 72, k, true));
      problems.push_back(problem(pass, 72, 133, k, true));
    }
    for (const int n : {1, 31, 65, 1000}) problems.push_back(problem(pass, 264, n, 416, true));
    problems.push_back(problem(pass, 2312, 1800, 256, true));  // more tiles than a wave
    problems.push_back(problem(pass, 520, 264, 2048, false));
    problems.push_back(problem(pass, 8, 8, 32, true));
  }
  for (const Problem& p : problems) {
    const Operands o = make_operands(p);
    const Device d(o);
    for (const Variant& v : variants(p)) check_case(p, o, d, kernel, v);
  }
}

/// As in gemm_gpu_test.cu: one lane a tile and helpers; and a whole wave before the shared one.
constexpr int kTilesOfHelpers = 44, kTilesOfTwoWaves = 70;

void test_every_config() {
  for (const GemmPass pass : kPasses) {
    for (const Problem& p : {problem(pass, 8, 8, 128, true), problem(pass, 2312, 1800, 256, true),
                             problem(pass, 264, 136, 8224, true),  // stream-K: many lanes
                             problem(pass, 8, kTilesOfHelpers * 256, 6016, true),
                             problem(pass, 8, kTilesOfHelpers * 192, 6016, true),
                             problem(pass, 8, kTilesOfTwoWaves * 256, 2080, true)}) {
      const Operands o = make_operands(p);
      const Device d(o);
      std::vector<Variant> all = variants(p);
      if (p.m > 1000 || p.n > 2000) {  // comparing takes the time: one of each accumulation
        all.erase(std::remove_if(all.begin(), all.end(),
                                 [](const Variant& v) { return v.accumulate || v.float_out; }),
                  all.end());
      }
      for (const Variant& v : all)
        for (const Kernel& kernel : every_config(make_args(p, d, v)))
          check_case(p, o, d, kernel, v);
    }
  }
}

void test_decay() {
  for (const bool integers : {true, false}) {
    for (const Problem& p : {problem(GemmPass::kGradWeight, 264, 136, 224, integers),
                             problem(GemmPass::kGradWeight, 8, 8, 64, integers)}) {
      const Operands o = make_operands(p);
      const Device d(o);
      for (const Variant& v : variants(p)) {
        if (!v.float_out && !integers) continue;  // two roundings differ from one
        for (const int first_rows : {p.m, 64, 192}) {
          if (first_rows > p.m) continue;
          for (const bool column_major : {false, true})
            for (const Kernel& kernel : first_walks(make_args(p, d, v)))
              check_decay({p, v, first_rows, column_major}, o, d, kernel);
        }
      }
    }
  }
}

void test_activated() {
  const auto check = [](GemmEpilogue epilogue, int m, int n, int k, bool integers) {
    check_activated({GemmPass::kForward, m, n, k, integers, kFormat, epilogue}, true);
  };
  for (const int tokens : {1, 65, 300}) {
    check(GemmEpilogue::kActivation, 8, tokens, 32, true);
    check(GemmEpilogue::kActivation, 328, tokens, 224, true);
    check(GemmEpilogue::kGate, 128, tokens, 32, true);
    check(GemmEpilogue::kGate, 384, tokens, 224, true);
    check(GemmEpilogue::kGate, 256, tokens, 8224, true);  // stream-K
  }
  check(GemmEpilogue::kActivation, 1280, 4104, 512, false);  // several tiles a block
  check(GemmEpilogue::kGate, 1280, 4104, 512, false);
}

struct Errors {
  double largest = 0, of_rounding = 0, bias = 0;
};

/// Of one product: the largest error, that of exact sums rounded to out, and the mean over the
/// mean.
Errors errors_of(const Problem& p, const Variant& v) {
  const Operands o = make_operands(p);
  const Device d(o);
  SparseGemmArgs a = make_args(p, d, v);
  const Elements before = make_out(p, v);
  const Buffer out(before), workspace(gemm::workspace_bytes(a, 0));
  a.out = out.get();
  a.workspace = workspace.get();
  gemm::run(a, 0, nullptr);
  synchronize_or_exit(gemm::name_of(p.pass));
  const Elements got = out.read_as(before);
  Errors e;
  double sum = 0, size = 0;
  for (int row = 0; row < p.out_rows(); ++row) {
    for (int column = 0; column < p.out_columns(); ++column) {
      const double exact = o.exact[static_cast<size_t>(row) * p.out_columns() + column];
      const double error = got.get(static_cast<size_t>(row) * p.out_ld() + column) - exact;
      e.largest = std::max(e.largest, std::fabs(error));
      e.of_rounding =
          std::max(e.of_rounding, std::fabs(got.rounded(static_cast<float>(exact)) - exact));
      sum += error;
      size += std::fabs(exact);
    }
  }
  e.bias = sum / size;
  return e;
}

void test_bounded() {
  for (const GemmPass pass : kPasses) {
    for (const int k : {512, 4096, 14336}) {
      Problem p = problem(pass, 256, 192, k, false);
      ++cases;
      const Errors normal = errors_of(p, {false, false, false, Accumulation::kPromoted});
      if (normal.largest > 2 * normal.of_rounding)
        fail(gemm::name_of(pass), " k=", k, ": error ", normal.largest, ", of rounding alone ",
             normal.of_rounding);
      p.positive = true;
      ++cases;
      const Variant plain{false, false, false, Accumulation::kFast};
      const Errors promoted = errors_of(p, {false, false, false, Accumulation::kPromoted}),
                   fast = has_kernel(p, plain) ? errors_of(p, plain) : Errors{};
      std::printf("     %s k=%d, values of one sign: bias %.2g promoted, %.2g fast\n",
                  gemm::name_of(pass), k, promoted.bias, fast.bias);
      if (std::fabs(promoted.bias) > 1e-3)
        fail(gemm::name_of(pass), " k=", k, ": bias ", promoted.bias, " of promoted sums");
    }
  }
}

void test_repeats() {
  for (const GemmPass pass :
       {GemmPass::kForward, GemmPass::kGradWeight, GemmPass::kGradWeightOfInput})
    for (const Accumulation accumulation : kAccumulations) {
      const Problem p = problem(pass, 1280, 1024, 4096, false);
      const Variant v{false, false, false, accumulation};
      if (has_kernel(p, v)) check_repeats(p, v);
    }
}

/// Small, as in gemm_gpu_test.cu.
void test_sanitize() {
  for (const GemmPass pass :
       {GemmPass::kForward, GemmPass::kGradWeight, GemmPass::kGradWeightOfInput}) {
    for (const Problem& p :
         {problem(pass, 264, 296, 6432, true), problem(pass, 8, kTilesOfHelpers * 256, 6016, true),
          problem(pass, 8, kTilesOfTwoWaves * 256, 2080, true)}) {
      const Operands o = make_operands(p);
      const Device d(o);
      for (const Variant& v : variants(p)) {
        if (p.m == 8 && v.accumulate) continue;  // epilogues differ in nothing there
        for (const Kernel& kernel : first_walks(make_args(p, d, v))) {
          check_case(p, o, d, kernel, v);
          if (pass == GemmPass::kGradWeight && p.m > 64)
            check_decay({p, v, 64, true}, o, d, kernel);
        }
      }
    }
  }
  for (const GemmEpilogue epilogue : {GemmEpilogue::kActivation, GemmEpilogue::kGate})
    check_activated({GemmPass::kForward, 384, 279, 6400, true, kFormat, epilogue}, false);
}

}  // namespace

int main(int count, char** arguments) {
  return run_gpu_tests({{"metadata_order", test_metadata_order},
                        {"instruction", test_instruction},
                        {"refusals", test_refusals},
                        {"identity", test_identity},
                        {"products", test_products},
                        {"decay", test_decay},
                        {"activated", test_activated},
                        {"bounded", test_bounded},
                        {"sanitize", test_sanitize},
                        {"every_config", test_every_config},
                        {"repeats", test_repeats},
                        {"bench", bench_llama, true}},
                       count, arguments, true);
}
