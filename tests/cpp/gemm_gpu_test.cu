// gemm_gpu_test.cu: the sparse GEMM on a Hopper GPU, in every pass.
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
// CMake builds it with the library's objects (SPARSE24_TESTS=ON); arguments choose tests by name.
// One line a failure, a summary at the end; exit status 0, 1 (failures) or 77 (no Hopper GPU).
// Speed is measured by bench/bench_gemm.py.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <cutlass/gemm/collective/builders/sm90_sparse_config.inl>
#include <cutlass/transform/device/transform_universal_adapter.hpp>
#include <cutlass/transform/kernel/sparse_gemm_compressor.hpp>

#include "activation/activation_cuda.h"
#include "common/check.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "gemm/config.h"
#include "gemm/sparse_gemm.h"
#include "gemm_problems.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

/// The library's own choice.
Kernel chosen() {
  return {"library", [](const SparseGemmArgs& a) { return gemm::workspace_bytes(a, 0); },
          [](const SparseGemmArgs& a) { gemm::run(a, 0, nullptr); }};
}

Kernel kernel_of(const SparseGemmArgs& args, int64_t code) {
  const auto with = [code](SparseGemmArgs a) {
    a.config = code;
    return a;
  };
  return {gemm::config_text(with(args), 0),
          [with](const SparseGemmArgs& a) { return gemm::workspace_bytes(with(a), 0); },
          [with](const SparseGemmArgs& a) { gemm::run(with(a), 0, nullptr); }};
}

/// All that a tuner gets: all tiles, walks and stream-K.
std::vector<Kernel> every_config(const SparseGemmArgs& args) {
  std::vector<Kernel> kernels;
  for (const int64_t code : gemm::configs(args, 0)) kernels.push_back(kernel_of(args, code));
  return kernels;
}

/// One walk over the tiles for each tile and for stream-K or not.
std::vector<Kernel> first_walks(const SparseGemmArgs& args) {
  const gemm::GemmDesc desc{args.pass, args.m, args.n, args.k, args.dtype, args.out_dtype};
  std::map<std::pair<int, bool>, int64_t> first;
  for (const int64_t code : gemm::configs(args, 0)) {
    const gemm::GemmConfig config = gemm::decode(desc, code);
    first.try_emplace({config.tile_n, config.stream_k}, code);
  }
  std::vector<Kernel> kernels;
  for (const auto& [what, code] : first) kernels.push_back(kernel_of(args, code));
  return kernels;
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
    // Rows of out that end within a 16-byte unit: what padded rows are for (ops/gemm_padding.py).
    problems.push_back({GemmPass::kForward, 268, tokens, 208, true});
    problems.push_back({GemmPass::kGradWeight, 264, 133, tokens, true});
  }
  for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight}) {
    problems.push_back({pass, 2312, 1800, 192, true});  // more tiles than a wave: rings wrap
    problems.push_back({pass, 520, 264, 1024, false});
    problems.push_back({pass, 8, 8, 16, true});
  }
  size_t next_variant = 0;
  for (const Problem& p : problems) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      const Operands o = make_operands(p, dtype);
      const Device d(o);
      const bool all =
          p.m < 1000;  // every epilogue on every small problem, one in turn on large ones
      for (size_t i = 0; i < (all ? std::size(variants) : 1); ++i) {
        Variant v = variants[all ? i : next_variant++ % std::size(variants)];
        if (p.pass != GemmPass::kForward) v.bias = false;
        check_case(p, dtype, o, d, kernel, v);
      }
    }
  }
}

/// On 132 multiprocessors, 66 clusters run at a time: one lane a tile and helpers; and a whole wave
/// before the shared one.
constexpr int kTilesOfHelpers = 44, kTilesOfTwoWaves = 70;

void test_every_config() {
  std::vector<Problem> problems;
  for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight}) {
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
    const Operands o = make_operands(p, DType::kBFloat16);
    const Device d(o);
    std::vector<Variant> variants = {
        {false, false, false}, {false, true, true}, {true, true, false}};
    if (p.m > 1000 || p.n > 2000) variants.resize(1);  // comparing takes the time
    for (const Variant& v : variants) {
      Variant fitting = v;
      if (p.pass != GemmPass::kForward) fitting.bias = false;
      for (const Kernel& kernel : every_config(make_args(p, DType::kBFloat16, d, fitting))) {
        check_case(p, DType::kBFloat16, o, d, kernel, fitting);
      }
    }
  }
}

/// Masked decay in the epilogue: with fp32 outputs the bits of the product without it, plus the
/// rounded pull; with 16-bit ones of small integers likewise. Kept elements have the bits of the
/// product. One weight or two, row- or column-major, added to what is there or not.
void check_decay(const Problem& p, const Operands& o, const Device& d, const Kernel& kernel,
                 int first_rows, bool column_major, const Variant& v) {
  ++cases;
  Random random(p.m + p.n + first_rows);
  const size_t extent = static_cast<size_t>(p.m) * p.n;
  std::vector<float> weight(extent);
  std::vector<uint16_t> weight16(extent), mask(extent / 16);
  for (uint16_t& bits : mask) bits = static_cast<uint16_t>(random.bits());
  for (size_t i = 0; i < extent; ++i) {
    weight[i] = p.integers ? static_cast<float>(random.below(9) - 4) : random.normal();
    weight16[i] = to_bits(weight[i], DType::kBFloat16);
    if (!v.float_out) weight[i] = to_value(weight16[i], DType::kBFloat16);
  }
  // Strides are shared: column-major weights are as tall as both, the second begins further down.
  const int64_t row_stride = column_major ? 1 : p.n, col_stride = column_major ? p.m : 1;
  const float factor = p.integers ? 2.0f : 0.37f;
  const Buffer device_weight = v.float_out ? Buffer(weight) : Buffer(weight16);
  const Buffer device_mask(mask), device_factor(std::vector<float>{factor});

  SparseGemmArgs a = make_args(p, DType::kBFloat16, d, v);
  const size_t out_size = static_cast<size_t>(p.out_rows()) * p.out_ld();
  const size_t element = v.float_out ? 4 : 2;
  const Buffer workspace(kernel.workspace_bytes(a));
  a.workspace = workspace.get();
  std::vector<float> got[2];
  for (const bool with : {false, true}) {
    const std::vector<float> before(out_size, kExisting);
    const std::vector<uint16_t> before16(out_size, to_bits(kExisting, DType::kBFloat16));
    const Buffer out = v.float_out ? Buffer(before) : Buffer(before16);
    a.out = out.get();
    if (with) {
      a.decay.factor = static_cast<const float*>(device_factor.get());
      a.decay.row_stride = row_stride, a.decay.col_stride = col_stride;
      a.decay.first_rows = first_rows;
      char* const data = static_cast<char*>(device_weight.get());
      a.decay.weight[0] = data;
      a.decay.weight[1] = data + first_rows * row_stride * element;
      a.decay.mask[0] = static_cast<const uint16_t*>(device_mask.get());
      a.decay.mask[1] = a.decay.mask[0] + static_cast<int64_t>(first_rows) / 4 * (p.n / 4);
    }
    kernel.run(a);
    SP24_CHECK_CUDA(cudaDeviceSynchronize());
    if (v.float_out) {
      got[with] = out.read<float>();
    } else {
      for (const uint16_t bits : out.read<uint16_t>())
        got[with].push_back(to_value(bits, DType::kBFloat16));
    }
  }
  int64_t wrong = 0;
  for (int row = 0; row < p.m; ++row) {
    for (int column = 0; column < p.out_ld(); ++column) {
      const size_t at = static_cast<size_t>(row) * p.out_ld() + column;
      float expected = got[0][at];
      if (column < p.n) {
        const uint16_t bits = mask[static_cast<size_t>(row) / 4 * (p.n / 4) + column / 4];
        const float w = weight[row * row_stride + column * col_stride];
        volatile const float pull = factor * w;  // rounded by itself
        if ((bits >> (row % 4 * 4 + column % 4) & 1) == 0) expected += pull;
        if (!v.float_out) {
          const double sum = o.exact[static_cast<size_t>(row) * p.n + column] +
                             (v.accumulate ? kExisting : 0.0f) +
                             ((bits >> (row % 4 * 4 + column % 4) & 1) == 0 ? pull : 0.0f);
          expected = to_value(to_bits(static_cast<float>(sum), DType::kBFloat16), DType::kBFloat16);
        }
      }
      if (got[1][at] != expected && wrong++ == 0) {
        fail("decay ", describe_case(p, DType::kBFloat16, kernel, v), " first_rows=", first_rows,
             column_major ? " column-major" : "", " at [", row, ", ", column, "]: ", got[1][at],
             " for ", expected);
      }
    }
  }
}

void test_decay() {
  for (const bool integers : {true, false}) {
    for (const Problem& p : {Problem{GemmPass::kGradWeight, 264, 136, 200, integers},
                             Problem{GemmPass::kGradWeight, 520, 1032, 1024, integers},
                             Problem{GemmPass::kGradWeight, 8, 8, 64, integers}}) {
      const Operands o = make_operands(p, DType::kBFloat16);
      const Device d(o);
      for (const bool float_out : {false, true}) {
        if (!float_out && !integers) continue;  // two roundings differ from one
        for (const bool accumulate : {false, true}) {
          const Variant v{false, accumulate, float_out};
          for (const int first_rows : {p.m, 64, 192}) {
            if (first_rows > p.m) continue;
            for (const bool column_major : {false, true}) {
              for (const Kernel& kernel : every_config(make_args(p, DType::kBFloat16, d, v)))
                check_decay(p, o, d, kernel, first_rows, column_major, v);
            }
          }
        }
      }
    }
  }
}

/// `kernel` with h beside out: after each run, h must have the bits that activation_forward
/// makes of that out, and nothing may be written past its columns.
Kernel with_h(const Kernel& kernel, Activation activation) {
  const auto run = [kernel, activation](const SparseGemmArgs& given) {
    SparseGemmArgs a = given;
    const bool gated = a.pass == GemmPass::kGatedForward;
    const int64_t width = gated ? a.m / 2 : a.m, ld = width + kPad;
    const std::vector<uint16_t> canary(static_cast<size_t>(a.n * ld), 0x4321);
    const Buffer h(canary), expected(canary);
    a.h = h.get();
    a.h_ld = ld;
    a.activation = activation;
    kernel.run(a);
    ActivationArgs separate;
    separate.kind = activation;
    separate.gated = gated;
    separate.gate_up = {a.out, a.dtype, a.n, a.m, a.out_ld, 1};
    separate.h = {expected.get(), a.dtype, a.n, width, ld, 1};
    sparse24::cuda::activation_forward(separate, nullptr);
    if (h.read<uint16_t>() != expected.read<uint16_t>()) {
      fail("h of activation ", static_cast<int>(activation), ", m=", a.m, " n=", a.n, " k=", a.k,
           " differs from activation_forward | ", kernel.name);
    }
  };
  return {kernel.name, kernel.workspace_bytes, run};
}

void check_activated(const Problem& p, DType dtype, bool all_configs) {
  const Operands o = make_operands(p, dtype);
  const Device d(o);
  for (const bool bias : {false, true}) {
    const Variant v{bias, false, false};
    SparseGemmArgs args = make_args(p, dtype, d, v);
    args.h_ld = p.m + kPad;
    const std::vector<Kernel> kernels = all_configs ? every_config(args) : first_walks(args);
    int activation = bias ? 0 : 3;
    for (const Kernel& kernel : kernels) {
      check_case(p, dtype, o, d, with_h(kernel, static_cast<Activation>(activation++ % 6)), v);
    }
  }
}

/// Small enough for compute-sanitizer (tests/sanitize.sh): each tile with and without stream-K.
/// Three sizes: edges in both extents, and many lanes; one lane and helpers; a whole wave before
/// the shared one. Values are poison where no kernel may read; all of out is initialised, since
/// initcheck does not see stores by TMA.
void test_sanitize() {
  const Variant variants[] = {{true, false, false}, {true, true, true}, {false, true, false}};
  for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight}) {
    const bool weight = pass == GemmPass::kGradWeight;
    const Problem problems[] = {{pass, 264, weight ? 296 : 279, weight ? 3203 : 3200, true},
                                {pass, 8, kTilesOfHelpers * 256, 6016, true},
                                {pass, 8, kTilesOfTwoWaves * 256, 2064, true}};
    for (const Problem& p : problems) {
      const Operands o = make_operands(p, DType::kBFloat16);
      const Device d(o);
      for (Variant v : variants) {
        if (p.m == 8 && !v.float_out) continue;  // epilogues differ in nothing there
        v.bias = v.bias && pass == GemmPass::kForward;
        for (const Kernel& kernel : first_walks(make_args(p, DType::kBFloat16, d, v))) {
          check_case(p, DType::kBFloat16, o, d, kernel, v);
          if (!weight) continue;
          check_decay(p, o, d, kernel, p.m, false, v);
          if (p.m > 64) check_decay(p, o, d, kernel, 64, true, v);
        }
      }
    }
  }
  check_activated({GemmPass::kActivatedForward, 264, 279, 3200, true}, DType::kBFloat16, false);
  check_activated({GemmPass::kGatedForward, 384, 279, 3200, true}, DType::kBFloat16, false);
}

void test_activated() {
  constexpr GemmPass kPlain = GemmPass::kActivatedForward, kGated = GemmPass::kGatedForward;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (const int tokens : {1, 65, 300}) {
      check_activated({kPlain, 8, tokens, 16, true}, dtype, true);
      check_activated({kPlain, 328, tokens, 208, true}, dtype, true);
      check_activated({kGated, 128, tokens, 16, true}, dtype, true);
      check_activated({kGated, 384, tokens, 208, true}, dtype, true);
      check_activated({kGated, 256, tokens, 4112, true}, dtype, true);  // stream-K
    }
    check_activated({kPlain, 1280, 4104, 512, false}, dtype, true);  // several tiles a block
    check_activated({kGated, 1280, 4104, 512, false}, dtype, true);
  }
}

void test_repeats() {
  for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradWeight}) {
    const Problem p{pass, 1280, 1024, 2048, false};
    const Operands o = make_operands(p, DType::kBFloat16);
    const Device d(o);
    const std::vector<Kernel> kernels =
        every_config(make_args(p, DType::kBFloat16, d, {false, false, true}));
    for (const Kernel& kernel : kernels) {
      ++cases;
      SparseGemmArgs a = make_args(p, DType::kBFloat16, d, {false, false, true});
      const Buffer out(static_cast<size_t>(p.out_rows()) * p.out_ld() * 4);
      const Buffer workspace(kernel.workspace_bytes(a));
      a.out = out.get();
      a.workspace = workspace.get();
      std::vector<uint32_t> first;
      for (int run = 0; run < 250; ++run) {
        SP24_CHECK_CUDA(cudaMemset(out.get(), 0, out.bytes()));
        kernel.run(a);
        if (run % 25 != 0 && run != 249) continue;  // reading back costs more than running
        const std::vector<uint32_t> bits = out.read<uint32_t>();
        if (first.empty()) first = bits;
        if (bits != first) {
          fail(gemm::name_of(pass), " run ", run, " differs from the first | ", kernel.name);
          break;
        }
      }
    }
  }
}

std::string unsupported(const SparseGemmArgs& a) { return gemm::unsupported(a, 0); }

void test_refusals() {
  const Problem p{GemmPass::kForward, 64, 64, 64, true};
  const Device d(make_operands(p, DType::kBFloat16));
  const Buffer out(64 * 1024);
  SparseGemmArgs good = make_args(p, DType::kBFloat16, d, {false, false, false});
  good.out = out.get();
  const std::pair<const char*, std::function<void(SparseGemmArgs&)>> broken[] = {
      {"in_features", [](SparseGemmArgs& a) { a.k = 40; }},
      {"multiple of 8", [](SparseGemmArgs& a) { a.rhs_ld = 67; }},
      {"multiple of 8", [](SparseGemmArgs& a) { a.out_ld = 67; }},
      {"float", [](SparseGemmArgs& a) { a.dtype = DType::kFloat32; }},
  };
  if (const std::string reason = unsupported(good); !reason.empty())
    fail("good arguments refused: ", reason);
  for (const auto& [name, change] : broken) {
    ++cases;
    SparseGemmArgs bad = good;
    change(bad);
    const std::string reason = unsupported(bad);
    if (reason.find(name) == std::string::npos)
      fail("'", name, "' not in the refusal, but: '", reason, "'");
  }
}

/// A matrix that already is 2:4, given to CUTLASS' compressor: its packed values and E must be
/// ours.
void test_metadata_order() {
  using Element = cutlass::bfloat16_t;
  using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, Element>, cute::GMMA::Major::K,
                                               cute::sparse_elem<8, uint8_t>, cute::_64>;
  using Shape = cute::Shape<int, int, int, int>;
  using Kernel = cutlass::transform::kernel::StructuredSparseCompressor<
      Shape, Element, cutlass::layout::RowMajor, Config, cutlass::arch::Sm90>;
  using Compressor = cutlass::transform::device::TransformUniversalAdapter<Kernel>;
  for (const auto& [m, k] : {std::pair(128, 128), {192, 320}, {64, 64}}) {
    ++cases;
    Random random(m + k);
    std::vector<uint16_t> dense(static_cast<size_t>(m) * k, 0),
        packed(static_cast<size_t>(m) * k / 2);
    std::vector<uint8_t> E(meta_bytes(m, k), 0);
    for (int row = 0; row < m; ++row) {
      for (int group = 0; group < k / 4; ++group) {
        const int first = random.below(3), second = first + 1 + random.below(3 - first);
        E[meta_byte_offset(row, group * 4, m)] |=
            static_cast<uint8_t>((first | second << 2) << group % 2 * 4);
        for (int i = 0; i < 2; ++i) {
          const uint16_t bits = to_bits(1.0f + random.below(100), DType::kBFloat16);
          packed[static_cast<size_t>(row) * (k / 2) + group * 2 + i] = bits;
          dense[static_cast<size_t>(row) * k + group * 4 + (i == 0 ? first : second)] = bits;
        }
      }
    }
    const Buffer device_dense(dense), device_packed(packed.size() * 2), device_E(E.size());
    typename Compressor::Arguments arguments{};
    arguments.problem_shape = Shape{m, 1, k, 1};
    cute::get<0>(arguments.transform.dA) = k;
    arguments.transform.ptr_A = device_dense.get();
    arguments.transform.ptr_ACompress = device_packed.get();
    arguments.transform.ptr_E = device_E.get();
    Compressor compressor;
    if (compressor.initialize(arguments) != cutlass::Status::kSuccess ||
        compressor.run() != cutlass::Status::kSuccess) {
      fail("CUTLASS' compressor did not run");
      continue;
    }
    SP24_CHECK_CUDA(cudaDeviceSynchronize());
    if (device_E.read<uint8_t>() != E) fail("E of ", m, "x", k, " differs from CUTLASS'");
    if (device_packed.read<uint16_t>() != packed)
      fail("packed values of ", m, "x", k, " differ from CUTLASS'");
  }
}

}  // namespace

int main(int count, char** arguments) {
  int devices = 0;
  cudaDeviceProp properties;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 ||
      cudaGetDeviceProperties(&properties, 0) != cudaSuccess || properties.major != 9) {
    std::printf("skipped: no Hopper GPU\n");
    return 77;
  }
  const std::pair<const char*, void (*)()> tests[] = {{"metadata_order", test_metadata_order},
                                                      {"refusals", test_refusals},
                                                      {"products", test_products},
                                                      {"decay", test_decay},
                                                      {"activated", test_activated},
                                                      {"sanitize", test_sanitize},
                                                      {"every_config", test_every_config},
                                                      {"repeats", test_repeats}};
  for (const auto& [name, test] : tests) {
    if (count > 1 &&
        std::find(arguments + 1, arguments + count, std::string(name)) == arguments + count) {
      continue;
    }
    const auto begin = std::chrono::steady_clock::now();
    const int before = failures;
    try {
      test();
    } catch (const std::exception& error) {
      fail(name, " threw: ", error.what());
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%s %s, %.1f s\n", failures == before ? "ok  " : "FAIL", name, seconds);
    std::fflush(stdout);
  }
  std::printf("%lld cases, %d failed, on %s\n", static_cast<long long>(cases), failures,
              properties.name);
  return failures == 0 ? 0 : 1;
}
