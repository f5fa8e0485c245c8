// gemm_bench.h: how fast the kernels multiply, on products of Llama's feed-forward layers: bf16,
// and 8 bits in both accumulations, in turn on a hot chip. For a quick look without Python; tables
// and figures are made by bench/.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "gemm/sparse_gemm.h"
#include "gemm_problems.h"

namespace gpu_testing {

/// `count` values of normal distribution: drawn from a table, which is fast.
inline std::unique_ptr<Buffer> random_values(size_t count, DType dtype, Random& random) {
  Elements table(4096, dtype);
  for (size_t i = 0; i < table.size(); ++i) table.set(i, random.normal());
  const size_t size = static_cast<size_t>(bytes_of(dtype));
  std::vector<uint8_t> bytes(count * size);
  for (size_t i = 0; i < count; ++i)
    std::copy_n(&table.bytes()[random.bits() % 4096 * size], size, &bytes[i * size]);
  return std::make_unique<Buffer>(bytes);
}

inline std::unique_ptr<Buffer> random_positions(size_t bytes, Random& random) {
  constexpr uint8_t kNibbles[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};
  std::vector<uint8_t> E(bytes);
  for (uint8_t& byte : E)
    byte = static_cast<uint8_t>(kNibbles[random.below(6)] | kNibbles[random.below(6)] << 4);
  return std::make_unique<Buffer>(E);
}

/// One product with operands of its own, ready to launch.
class BenchProduct {
 public:
  BenchProduct(const Problem& p, Accumulation accumulation) {
    Random random(p.m + p.n + p.k);
    const size_t m = p.m, n = p.n, k = p.k;
    packed_ = random_values(m * k / 2, p.format, random);
    rhs_ = random_values(n * k, p.rhs_dtype(), random);
    E_ = random_positions(static_cast<size_t>(meta_bytes_for(p.format, p.m, p.k)), random);
    out_ = std::make_unique<Buffer>(m * n * 2);
    h_ = std::make_unique<Buffer>(p.epilogue == GemmEpilogue::kPlain ? 0 : m * n * 2);
    args_.pass = p.pass, args_.epilogue = p.epilogue;
    args_.m = p.m, args_.n = p.n, args_.k = p.k;
    args_.lhs = {packed_->get(), static_cast<const uint8_t*>(E_->get()), p.format,
                 lhs_orientation(p.pass, p.format), nullptr};
    args_.rhs = {rhs_->get(), p.rhs_columns(), rhs_orientation(p.pass, p.format), nullptr};
    args_.out = out_->get(), args_.out_ld = p.out_columns();
    args_.h = h_->get();
    args_.h_ld = p.epilogue == GemmEpilogue::kGate ? p.m / 2 : p.m;
    args_.accumulation = accumulation;
    workspace_ = std::make_unique<Buffer>(gemm::workspace_bytes(args_, 0));
    args_.workspace = workspace_->get();
  }
  void run() const { gemm::run(args_, 0, nullptr); }

  std::vector<int64_t> configs() const { return gemm::configs(args_, 0); }
  std::string config_text() const { return gemm::config_text(args_, 0); }
  /// From here on; 0: the library's choice.
  void use(int64_t config) {
    args_.config = config;
    workspace_ = std::make_unique<Buffer>(gemm::workspace_bytes(args_, 0));
    args_.workspace = workspace_->get();
  }

  /// Milliseconds of `runs` launches.
  float time(int runs) const {
    cudaEvent_t begin, end;
    SP24_CHECK_CUDA(cudaEventCreate(&begin));
    SP24_CHECK_CUDA(cudaEventCreate(&end));
    SP24_CHECK_CUDA(cudaEventRecord(begin));
    for (int i = 0; i < runs; ++i) run();
    SP24_CHECK_CUDA(cudaEventRecord(end));
    SP24_CHECK_CUDA(cudaEventSynchronize(end));
    float ms = 0;
    SP24_CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
    SP24_CHECK_CUDA(cudaEventDestroy(begin));
    SP24_CHECK_CUDA(cudaEventDestroy(end));
    return ms;
  }

 private:
  std::unique_ptr<Buffer> packed_, rhs_, E_, out_, h_, workspace_;
  SparseGemmArgs args_;
};

/// Medians of rounds in which every product runs in turn, after all have run for a while.
inline std::vector<float> time_in_turn(const std::vector<const BenchProduct*>& products) {
  constexpr int kRounds = 15, kRuns = 4;
  std::vector<std::vector<float>> times(products.size());
  for (int heat = 0; heat < 40; ++heat)
    for (const BenchProduct* product : products) product->time(1);
  for (int round = 0; round < kRounds; ++round)
    for (size_t i = 0; i < products.size(); ++i)
      times[i].push_back(products[i]->time(kRuns) / kRuns);
  std::vector<float> medians;
  for (std::vector<float>& all : times) {
    std::sort(all.begin(), all.end());
    medians.push_back(all[kRounds / 2]);
  }
  return medians;
}

inline void bench_llama() {
  constexpr GemmPass kForward = GemmPass::kForward, kGradWeight = GemmPass::kGradWeight;
  constexpr GemmEpilogue kPlain = GemmEpilogue::kPlain, kGate = GemmEpilogue::kGate;
  const struct {
    const char* name;
    GemmPass pass;
    GemmEpilogue epilogue;
    int m, n, k;
  } products[] = {
      {"7B up", kForward, kPlain, 11008, 8192, 4096},
      {"7B down", kForward, kPlain, 4096, 8192, 11008},
      {"7B gate_up and h", kForward, kGate, 22016, 8192, 4096},
      {"7B dW up", kGradWeight, kPlain, 11008, 4096, 8192},
      {"8B up", kForward, kPlain, 14336, 16384, 4096},
      {"8B down", kForward, kPlain, 4096, 16384, 14336},
      {"8B dW down", kGradWeight, kPlain, 4096, 14336, 16384},
      {"774M up", kForward, kPlain, 5120, 16384, 1280},
      {"8192^3", kForward, kPlain, 8192, 8192, 8192},
  };
  std::printf("TFLOP/s, counted dense   %10s %10s %10s\n", "bf16", "e4m3 fast", "promoted");
  for (const auto& p : products) {
    const auto make = [&](DType format, Accumulation accumulation) {
      return BenchProduct({p.pass, p.m, p.n, p.k, false, format, p.epilogue}, accumulation);
    };
    const BenchProduct bf16 = make(DType::kBFloat16, Accumulation::kAuto),
                       fast = make(DType::kFloat8E4M3, Accumulation::kFast);
    std::vector<const BenchProduct*> in_turn = {&bf16, &fast};
    std::unique_ptr<BenchProduct> promoted;
    if (p.epilogue == kPlain) {
      promoted = std::make_unique<BenchProduct>(make(DType::kFloat8E4M3, Accumulation::kPromoted));
      in_turn.push_back(promoted.get());
    }
    std::printf("%-24s", p.name);
    for (const float ms : time_in_turn(in_turn))
      std::printf(" %10.0f", 2e-9 * p.m * p.n * p.k / ms);
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace gpu_testing
