// The choice of a GEMM kernel: a pure function, tried on many shapes without a GPU.
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/kernel_arch.h"
#include "gemm/arch.h"
#include "gemm/config.h"
#include "testing.h"

using namespace sparse24;
using namespace sparse24::gemm;

namespace {

constexpr GemmPass kPasses[] = {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight};
constexpr GemmPass kOfActivations[] = {GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput};
constexpr DType kHalves[] = {DType::kBFloat16, DType::kFloat16};
const GemmArch* const kArchs[] = {&kSm80, &kSm89, &kSm90};

/// A plain product.
GemmDesc desc_of(GemmPass pass, int64_t m, int64_t n, int64_t k, DType format, DType out_dtype) {
  return {pass, GemmEpilogue::kPlain, m, n, k, format, out_dtype, Accumulation::kFast};
}

}  // namespace

TEST(every_kernel_is_listed_once) {
  for (const GemmArch* arch : kArchs) {
    CHECK(arch->count > 0 && arch->count < 255);  // codes of configs have eight bits for the row
    std::set<std::string> seen;
    for (int i = 0; i < arch->count; ++i) {
      const KernelEntry& e = arch->kernels[i];
      CHECK(e.tile_m > 0 && e.tile_n > 0 && e.tile_k > 0 && e.cluster_m > 0 && e.cluster_n > 0);
      CHECK(e.format != DType::kFloat32);
      CHECK(e.out_dtype == (is_float8(e.format) ? DType::kBFloat16 : e.format) ||
            e.out_dtype == DType::kFloat32);
      CHECK(e.accumulation == Accumulation::kFast || is_float8(e.format));
      const GemmDesc desc{e.pass, e.epilogue, 0, 0, 0, e.format, e.out_dtype, e.accumulation};
      const GemmConfig config{e.tile_m,       e.tile_n,        e.tile_k, e.cluster_m, e.cluster_n,
                              e.accumulation, Raster::kAlongM, 1,        false};
      CHECK(seen.insert(to_string(desc) + to_string(config)).second);
      CHECK_EQ(row_of(*arch, desc, config), i);
    }
  }
}

/// What a caller asks for in 8 bits, with operands in the orientations of the kernels.
SparseGemmArgs args_of_float8(GemmPass pass, Accumulation accumulation) {
  SparseGemmArgs args;
  args.pass = pass;
  args.m = args.n = 256, args.k = 1024;
  args.lhs.format = DType::kFloat8E4M3;
  args.rhs.ld = 1024, args.out_ld = 256;
  args.accumulation = accumulation;
  return args;
}

/// What an architecture computes with operands of 8 or of 16 bits.
std::set<std::string> products_of(const GemmArch& arch, bool of_8_bits) {
  std::set<std::string> all;
  for (int i = 0; i < arch.count; ++i) {
    const KernelEntry& e = arch.kernels[i];
    if (is_float8(e.format) == of_8_bits)
      all.insert(to_string({e.pass, e.epilogue, 0, 0, 0, e.format, e.out_dtype, e.accumulation}));
  }
  return all;
}

TEST(every_product_of_one_architecture_is_one_of_the_others) {
  for (const GemmArch* arch : kArchs) CHECK(products_of(*arch, false) == products_of(kSm90, false));
  CHECK(products_of(kSm80, true).empty());
  if (SPARSE24_BUILT_SM89) CHECK(products_of(kSm89, true) == products_of(kSm90, true));
}

TEST(products_of_activations_have_the_dtype_of_their_operands) {
  for (const GemmArch* arch : kArchs)
    for (GemmPass pass : kOfActivations) {
      for (DType dtype : kHalves) {
        CHECK(is_compiled(*arch, desc_of(pass, 1000, 256, 512, dtype, dtype)));
        CHECK(!is_compiled(*arch, desc_of(pass, 1000, 256, 512, dtype, DType::kFloat32)));
      }
    }
}

TEST(products_of_activations_in_8_bits_run_by_the_kernels_of_the_weight_gradient) {
  for (GemmPass pass : kOfActivations) {
    const GemmDesc desc = describe(args_of_float8(pass, Accumulation::kAuto));
    CHECK(desc.accumulation == Accumulation::kFast && !is_compiled(kSm80, desc));
    GemmDesc of_weight = desc;
    of_weight.pass = GemmPass::kGradWeight;
    const GemmConfig config = choose_config(kSm90, desc, 132);
    CHECK_EQ(row_of(kSm90, desc, config), row_of(kSm90, of_weight, config));
  }
}

TEST(what_products_of_activations_cannot_take_is_said) {
  const auto refused = [](GemmPass pass, auto change) {
    SparseGemmArgs args;
    args.pass = pass;
    args.m = 31, args.n = 264, args.k = 64;  // any number of tokens
    args.lhs.orientation = lhs_orientation(pass, args.lhs.format);
    args.rhs.orientation = rhs_orientation(pass, args.lhs.format);
    args.rhs.ld = 264, args.out_ld = 264;
    change(args);
    CHECK_EQ(kSm80.unsupported(args), kSm90.unsupported(args));
    return kSm90.unsupported(args);
  };
  for (GemmPass pass : kOfActivations) {
    CHECK_EQ(refused(pass, [](auto&) {}), std::string());
    CHECK_EQ(refused(pass, [](auto& a) { a.rhs.ld = 68; }),
             std::string("rows of the dense operand 68 elements apart, not a multiple of 8"));
    CHECK_EQ(refused(pass, [](auto& a) { a.n = 68, a.out_ld = 68; }),
             std::string("rows of the output 68 elements apart, not a multiple of 8"));
    CHECK_EQ(
        refused(pass, [](auto& a) { a.lhs.orientation = Orientation::kMnMajor; }).substr(0, 22),
        std::string("operands that are MN-m"));
  }
  CHECK_EQ(refused(kOfActivations[0], [](auto& a) { a.k = 40; }),
           std::string("in_features 40, not a multiple of 16"));
  CHECK_EQ(refused(kOfActivations[1], [](auto& a) { a.k = 40; }),
           std::string("out_features 40, not a multiple of 16"));
}

/// Caches of tuned configs keep them (sparse24/ops/gemm/tuning.py).
TEST(codes_of_older_products_did_not_move) {
  const auto row = [](const GemmArch& arch, GemmPass pass, DType dtype, DType out) {
    const GemmDesc desc = desc_of(pass, 1024, 1024, 1024, dtype, out);
    return encode(arch, desc, choose_config(arch, desc, 132)) & 0xFF;
  };
  constexpr DType kHalf = DType::kFloat16, kFloat = DType::kFloat32;
  for (const GemmArch* arch : {&kSm80, &kSm89}) {
    CHECK_EQ(row(*arch, GemmPass::kForward, kHalf, kHalf), 5);
    CHECK_EQ(row(*arch, GemmPass::kGradInput, kHalf, kFloat), 12);
    CHECK_EQ(row(*arch, GemmPass::kGradWeightOfInput, kHalf, kFloat), 20);
  }
  CHECK_EQ(row(kSm90, GemmPass::kGradWeightOfInput, kHalf, kFloat), 31);
}

TEST(an_architecture_is_for_its_compute_capabilities) {
  CHECK(arch_of({9, 0}) == (kBuiltSm90 ? &kSm90 : nullptr));
  for (const int minor : {0, 6}) CHECK(arch_of({8, minor}) == (kBuiltSm80 ? &kSm80 : nullptr));
  CHECK(arch_of({8, 9}) == (kBuiltSm80 ? &kSm89 : nullptr));
  for (const Capability none : {Capability{7, 5}, {8, 7}, {9, 1}, {10, 0}, {12, 0}, {0, 0}})
    CHECK(arch_of(none) == nullptr);
}

TEST(a_gpu_without_kernels_is_told_which_there_are) {
  const std::string older = kBuiltSm80 ? "sm_80, sm_86, sm_89" : "",
                    hopper = kBuiltSm90 ? "sm_90a" : "";
  CHECK_EQ(arch_names(), older + (kBuiltSm80 && kBuiltSm90 ? ", " : "") + hopper);
  CHECK_EQ(no_arch_reason({7, 5}),
           "the GPU is sm_75, and sparse GEMM kernels are built for " + arch_names());
  CHECK(no_arch_reason({10, 0}).find("; Blackwell's tensor cores read other instructions") !=
        std::string::npos);
}

constexpr Capability kA100{8, 0}, kRtx3090{8, 6}, kRtx4090{8, 9}, kH100{9, 0}, kB200{10, 0};

TEST(kernels_of_older_gpus_can_be_asked_for) {
  const auto chosen = [](Capability gpu, const char* asked) {
    return chosen_capability(gpu, asked, "89, 90, 89-virtual");
  };
  CHECK(chosen(kH100, "") == kH100 && chosen(kB200, "") == kB200 &&
        chosen(kRtx4090, "") == kRtx4090);
  if (!kBuiltSm80) SKIP("this library has no kernels for them");
  CHECK(chosen(kH100, "sm80") == kA100 && chosen(kB200, "sm80") == kA100);
  CHECK(chosen(kH100, "sm89") == kRtx4090 && chosen(kB200, "sm89") == kRtx4090);
  CHECK_THROWS(chosen({7, 5}, "sm80"),
               "needs a GPU of compute capability 8.0 or later, this one has 7.5");
  CHECK_THROWS(chosen(kA100, "sm90"), "needs a GPU of compute capability 9.0");
  CHECK_THROWS(chosen(kH100, "hopper"), "must be sm80, sm86, sm89 or sm90");
}

TEST(an_ada_without_code_for_8_bits_is_an_ampere) {
  CHECK(chosen_capability(kRtx4090, "", "89") == kRtx4090);
  for (const char* built_for : {"", "90"})
    CHECK(chosen_capability(kRtx4090, "", built_for) == kRtx3090);
  CHECK(chosen_capability(kA100, "", "") == kA100 && chosen_capability(kH100, "", "") == kH100);
  if (!kBuiltSm80) SKIP("this library has no kernels for them");
  CHECK(chosen_capability(kH100, "sm89", "90") == kRtx4090);
  CHECK(chosen_capability(kH100, "sm89", "89") == kRtx3090);
  CHECK(chosen_capability(kA100, "sm89", "89, 90, 89-virtual") == kRtx3090);
}

TEST(a_block_has_the_shared_memory_of_its_gpu) {
  CHECK_EQ(shared_bytes_of({8, 0}), 163 * 1024);
  CHECK_EQ(shared_bytes_of({8, 6}), 99 * 1024);
  CHECK_EQ(shared_bytes_of({8, 9}), 99 * 1024);
  CHECK_EQ(shared_bytes_of({9, 0}), 227 * 1024);
}

TEST(sums_over_tokens_are_promoted_unless_told_otherwise) {
  const auto resolved = [](GemmPass pass, Accumulation asked) {
    return describe(args_of_float8(pass, asked)).accumulation;
  };
  for (GemmPass pass : kPasses) {
    CHECK(resolved(pass, Accumulation::kFast) == Accumulation::kFast);
    CHECK(resolved(pass, Accumulation::kPromoted) == Accumulation::kPromoted);
  }
  CHECK(resolved(GemmPass::kForward, Accumulation::kAuto) == Accumulation::kFast);
  CHECK(resolved(GemmPass::kGradInput, Accumulation::kAuto) == Accumulation::kFast);
  CHECK(resolved(GemmPass::kGradWeight, Accumulation::kAuto) == Accumulation::kPromoted);
  CHECK(resolved(GemmPass::kGradWeightOfInput, Accumulation::kAuto) == Accumulation::kPromoted);
  SparseGemmArgs half = args_of_float8(GemmPass::kGradWeight, Accumulation::kPromoted);
  half.lhs.format = DType::kBFloat16;
  CHECK(describe(half).accumulation == Accumulation::kFast);  // fp32 sums need no promotion
}

TEST(each_accumulation_has_kernels) {
  for (GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight,
                        GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput})
    for (Accumulation accumulation : {Accumulation::kFast, Accumulation::kPromoted}) {
      const GemmDesc desc = describe(args_of_float8(pass, accumulation));
      const std::vector<GemmConfig> all = candidate_configs(kSm90, desc, 132);
      for (const GemmConfig& config : all) {
        CHECK(config.accumulation == accumulation);
        CHECK_EQ(config.tile_n, accumulation == Accumulation::kFast ? 256 : 192);
        CHECK_EQ(config.tile_k, 128);
        CHECK_EQ(to_string(decode(kSm90, desc, encode(kSm90, desc, config))), to_string(config));
      }
      if (!SPARSE24_BUILT_SM89) continue;
      for (const GemmConfig& config : candidate_configs(kSm89, desc, 128)) {  // one serves both
        CHECK(config.accumulation == accumulation && config.tile_k == 128);
        CHECK_EQ(to_string(decode(kSm89, desc, encode(kSm89, desc, config))), to_string(config));
      }
    }
}

TEST(what_8_bit_kernels_cannot_take_is_said) {
  const auto refused = [](GemmPass pass, auto change) {
    SparseGemmArgs args = args_of_float8(pass, Accumulation::kAuto);
    change(args);
    CHECK_EQ(kSm89.unsupported(args), kSm90.unsupported(args));
    return kSm90.unsupported(args);
  };
  const auto nothing = [](auto&) {};
  for (GemmPass pass : kPasses) CHECK_EQ(refused(pass, nothing), std::string());
  CHECK_EQ(refused(GemmPass::kGradWeight, [](auto& a) { a.k = 1000; }),
           std::string("tokens 1000, not a multiple of 32; pad both operands with zeros"));
  CHECK_EQ(refused(GemmPass::kForward, [](auto& a) { a.k = 1008; }),
           std::string("in_features 1008, not a multiple of 32"));
  CHECK_EQ(refused(GemmPass::kGradInput, [](auto& a) { a.k = 1008; }),
           std::string("out_features 1008, not a multiple of 32"));
  CHECK_EQ(refused(GemmPass::kForward, [](auto& a) { a.rhs.ld = 1032; }),
           std::string("rows of the dense operand 1032 elements apart, not a multiple of 16"));
  CHECK_EQ(refused(GemmPass::kForward, [](auto& a) { a.out_ld = 260; }),
           std::string("rows of the output 260 elements apart, not a multiple of 8"));
  CHECK_EQ(
      refused(GemmPass::kGradWeight, [](auto& a) { a.rhs.orientation = Orientation::kMnMajor; }),
      std::string("operands that are K-major and MN-major; grad_weight of float8_e4m3fn takes "
                  "them K-major and K-major"));
}

TEST(a_compiled_kernel_is_chosen_for_every_shape) {
  std::mt19937 random(1);
  for (int n = 0; n < 3000; ++n) {
    // From one token to the largest models, in steps of 4.
    const auto extent = [&]() -> int64_t {
      return int64_t{4} << (random() % 15) | 4 * (random() % 4096);
    };
    const auto check = [&](GemmPass pass, DType dtype, DType out_dtype) {
      const GemmDesc desc = desc_of(pass, extent(), extent(), extent(), dtype, out_dtype);
      for (const GemmArch* arch : kArchs)
        for (int multiprocessors : {2, 78, 108, 132}) {
          const GemmConfig config = choose_config(*arch, desc, multiprocessors);
          CHECK_EQ(encode(*arch, desc, config) >> 18, 0);  // it has a row
          CHECK(config.strip >= 1 && config.strip < 256);
          CHECK_EQ(to_string(config), to_string(choose_config(*arch, desc, multiprocessors)));
        }
    };
    for (DType dtype : kHalves) {
      for (GemmPass pass : kPasses)
        for (DType out_dtype : {dtype, DType::kFloat32}) check(pass, dtype, out_dtype);
      for (GemmPass pass : kOfActivations) check(pass, dtype, dtype);
    }
  }
}

TEST(configs_survive_encoding) {
  const GemmDesc desc =
      desc_of(GemmPass::kGradWeight, 3072, 768, 16384, DType::kBFloat16, DType::kBFloat16);
  for (const GemmArch* arch : kArchs) {
    std::set<int64_t> codes;
    const std::vector<GemmConfig> all = candidate_configs(*arch, desc, 132);
    CHECK(all.size() > 4);
    CHECK_EQ(to_string(all[0]), to_string(choose_config(*arch, desc, 132)));
    for (const GemmConfig& config : all) {
      const int64_t code = encode(*arch, desc, config);
      CHECK(code > 0);
      CHECK(codes.insert(code).second);  // no config twice
      CHECK_EQ(to_string(decode(*arch, desc, code)), to_string(config));
    }
  }
}

TEST(what_was_measured_on_one_architecture_is_none_of_the_others) {
  const GemmDesc desc =
      desc_of(GemmPass::kGradWeight, 768, 3072, 16384, DType::kBFloat16, DType::kBFloat16);
  CHECK_EQ(choose_config(kSm90, desc, 132).tile_n, 192);
  CHECK_EQ(choose_config(kSm80, desc, 132).tile_n, 128);
}

TEST(codes_that_name_no_config_are_refused) {
  const GemmDesc desc = desc_of(GemmPass::kForward, 64, 64, 64, DType::kBFloat16, DType::kBFloat16);
  const GemmDesc other =
      desc_of(GemmPass::kGradWeight, 64, 64, 64, DType::kBFloat16, DType::kBFloat16);
  const int64_t good = encode(kSm90, desc, choose_config(kSm90, desc, 132));
  for (int64_t bad : {int64_t{-1}, int64_t{255} | 1 << 8, good & 0xFF, good | int64_t{1} << 18,
                      encode(kSm90, other, choose_config(kSm90, other, 132))})
    CHECK_THROWS(decode(kSm90, desc, bad), "config must be one of sparse_gemm_configs");
}

TEST(stream_k_is_for_waves_that_are_not_full) {
  // 33 x 2 clusters of 256 x 256 fill 132 multiprocessors exactly.
  const GemmDesc full =
      desc_of(GemmPass::kForward, 33 * 256, 2 * 256, 4096, DType::kBFloat16, DType::kBFloat16);
  for (const GemmConfig& config : candidate_configs(kSm90, full, 132)) CHECK(!config.stream_k);
  const GemmDesc partial =
      desc_of(GemmPass::kForward, 33 * 256, 3 * 256, 4096, DType::kBFloat16, DType::kBFloat16);
  int with = 0;
  for (const GemmConfig& config : candidate_configs(kSm90, partial, 132)) with += config.stream_k;
  CHECK(with > 0);
}

TEST(workspace_is_a_tile_and_a_flag_line_for_each_block) {
  GemmConfig config{128, 256, 64, 2, 1, Accumulation::kFast, Raster::kAlongM, 1, false};
  CHECK_EQ(workspace_bytes(config, 132), 0);
  config.stream_k = true;
  CHECK_EQ(stream_k_blocks(config, 133), 132);  // whole clusters
  CHECK_EQ(workspace_bytes(config, 132), 1280 + int64_t{132} * 128 * 256 * 4);
}

/// Rows of a sweep (bench/bench_gemm_sweep.py): every config of every product, as measured.
struct Measured {
  std::string config;
  double tflops;
};

std::map<std::string, std::pair<GemmDesc, std::vector<Measured>>> read_sweep(
    const std::string& name) {
  std::string path = __FILE__;
  path = path.substr(0, path.rfind("tests/cpp")) + "bench/results/" + name;
  std::ifstream file(path);
  CHECK(file.good());
  std::map<std::string, std::pair<GemmDesc, std::vector<Measured>>> products;
  for (std::string line; std::getline(file, line);) {
    std::vector<std::string> cells;
    std::stringstream stream(line);
    for (std::string cell; std::getline(stream, cell, ',');) cells.push_back(cell);
    if (line.empty() || line[0] == '#' || cells[0] == "pass") continue;
    GemmDesc desc = desc_of(kPasses[0], std::stoll(cells[1]), std::stoll(cells[2]),
                            std::stoll(cells[3]), DType::kBFloat16, DType::kBFloat16);
    for (GemmPass pass : kPasses)
      if (cells[0] == name_of(pass)) desc.pass = pass;
    auto& entry = products[to_string(desc)];
    entry.first = desc;
    entry.second.push_back({cells[5], std::stod(cells[6])});
  }
  CHECK(products.size() >= 50);
  return products;
}

/// The choice for each product is within 3 % of the best row that `counts`, where it is one itself.
template <typename Counts>
void check_choice(const std::string& sweep, Counts counts) {
  for (const auto& [name, product] : read_sweep(sweep)) {
    const std::string chosen = to_string(choose_config(kSm90, product.first, 132));
    if (!counts(chosen)) continue;
    double best = 0, ours = 0;
    for (const Measured& row : product.second) {
      if (counts(row.config)) best = std::max(best, row.tflops);
      if (row.config == chosen) ours = row.tflops;
    }
    if (ours < 0.97 * best)
      throw std::runtime_error(name + ": " + chosen + " reaches " + std::to_string(ours) + " of " +
                               std::to_string(best) + " TFLOP/s");
  }
}

TEST(the_choice_is_within_three_per_cent_of_the_best_measured) {
  check_choice("h100/gemm_sweep.csv", [](const std::string&) { return true; });
}

/// That sweep is older than stream-K as it is now: rows of whole tiles alone can be compared.
TEST(so_is_it_on_an_h200_among_whole_tiles) {
  check_choice("gemm_sweep.csv", [](const std::string& config) {
    return config.find("stream-k") == std::string::npos;
  });
}

TEST(what_is_not_compiled_is_named) {
  const GemmDesc desc = desc_of(GemmPass::kForward, 64, 8, 128, DType::kFloat32, DType::kFloat32);
  CHECK_THROWS(choose_config(kSm90, desc, 132), "forward m=64 n=8 k=128 float32");
}

TEST_MAIN()
