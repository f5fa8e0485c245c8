// gemm_sm80_bench.cu: the kernels of csrc/gemm/sm80 beside CUTLASS 2.x's own sparse kernels for
// sm_80 and cuBLAS' dense product, on the same GPU, bf16, in turn on a hot chip. One program a pass
// (CMake: gemm_sm80_bench_0 forward, _1 grad_input, _2 grad_weight), as CUTLASS compiles slowly.
//
//   SPARSE24_ARCH=sm80 build/gemm_sm80_bench_0 [configs]    `configs`: tries all, too
//
// CUTLASS' E has an order of its own and is filled with random positions: times alone are compared.
// It writes row-major outputs, which costs the same. Its tiles have no more shared memory than the
// GPU that SPARSE24_ARCH names, those of a 3090 or 4090 two or three stages; and as many of its
// blocks share a multiprocessor as would there, though a Hopper one has room for more. cuBLAS is
// looked up at run time, and left out where there is none.
#include <cutlass/gemm/device/gemm_sparse.h>
#include <dlfcn.h>

#include <functional>
#include <initializer_list>
#include <string>

#include "gemm/arch.h"
#include "gemm_bench.h"

using namespace sparse24;
using namespace gpu_testing;

#ifndef SP24_BENCH_PASS
#define SP24_BENCH_PASS 0
#endif

namespace {

constexpr GemmPass kPass = static_cast<GemmPass>(SP24_BENCH_PASS);
constexpr bool kLhsKMajor = lhs_orientation(kPass, DType::kBFloat16) == Orientation::kKMajor,
               kRhsKMajor = rhs_orientation(kPass, DType::kBFloat16) == Orientation::kKMajor;

/// Something to time, with operands of its own.
struct Contestant {
  std::string name;
  std::function<void()> run;
  std::vector<std::shared_ptr<void>> keeps;
};

template <typename T>
T* keep(Contestant& c, std::unique_ptr<Buffer> buffer) {
  T* data = static_cast<T*>(buffer->get());
  c.keeps.push_back(std::shared_ptr<Buffer>(std::move(buffer)));
  return data;
}

constexpr int kReservedBytes = 1024;  // of the shared memory of each block

/// Shared memory of a multiprocessor of the GPU that kernels are chosen for.
int multiprocessor_bytes() {
  cudaDeviceProp gpu;
  SP24_CHECK_CUDA(cudaGetDeviceProperties(&gpu, 0));
  return gemm::shared_bytes_of(gemm::chosen_capability({gpu.major, gpu.minor})) + kReservedBytes;
}

/// What a kernel of `bytes` a block must ask for so that no more blocks share a multiprocessor here
/// than would on the chosen GPU.
template <typename Kernel>
int padded_bytes(Kernel* kernel, int threads, int bytes) {
  cudaDeviceProp gpu;
  SP24_CHECK_CUDA(cudaGetDeviceProperties(&gpu, 0));
  SP24_CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(gpu.sharedMemPerBlockOptin)));
  int here = 0;
  SP24_CHECK_CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&here, kernel, threads, bytes));
  const int there = multiprocessor_bytes() / (bytes + kReservedBytes);
  if (here <= there) return bytes;
  const int too_many = there + 1, most = static_cast<int>(gpu.sharedMemPerMultiprocessor);
  return round_up(most / too_many - kReservedBytes + 1, 128);
}

template <int kTileM, int kTileN, int kStages>
Contestant cutlass_sparse(int m, int n, int k) {
  namespace layout = cutlass::layout;
  using Element = cutlass::bfloat16_t;
  using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;
  using LayoutA = cute::conditional_t<kLhsKMajor, layout::RowMajor, layout::ColumnMajor>;
  using LayoutB = cute::conditional_t<kRhsKMajor, layout::ColumnMajor, layout::RowMajor>;
  using Gemm = cutlass::gemm::device::SparseGemm<
      Element, LayoutA, Element, LayoutB, Element, layout::RowMajor, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      cutlass::gemm::GemmShape<kTileM, kTileN, 64>, cutlass::gemm::GemmShape<64, 64, 64>,
      cutlass::gemm::GemmShape<16, 8, 32>,
      cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>, Swizzle, kStages>;
  Contestant c{concat("CUTLASS ", kTileM, "x", kTileN, ", ", kStages, " stages"), {}, {}};
  Random random(m + n + k);
  const size_t size_m = m, size_n = n, size_k = k;
  auto* a = keep<Element>(c, random_values(size_m * size_k / 2, DType::kBFloat16, random));
  auto* b = keep<Element>(c, random_values(size_n * size_k, DType::kBFloat16, random));
  auto* e = keep<typename Gemm::ElementE>(c, random_positions(size_m * size_k / 8, random));
  auto* d = keep<Element>(c, std::make_unique<Buffer>(size_m * size_n * 2));
  using GemmKernel = typename Gemm::GemmKernel;
  const cutlass::gemm::GemmCoord size(m, n, k),
      tiles = Swizzle().get_tiled_shape(size, {kTileM, kTileN, 64}, 1);
  const typename GemmKernel::Params params(
      size, tiles, {a, LayoutA(kLhsKMajor ? k / 2 : m)}, {b, LayoutB(kRhsKMajor ? k : n)},
      {d, layout::RowMajor(n)}, {d, layout::RowMajor(n)},
      {e, Gemm::LayoutE::packed({m, k / Gemm::kSparse / Gemm::kElementsPerElementE})},
      {1.0f, 0.0f});
  // As Gemm::run launches it, but for the shared memory.
  const int bytes = padded_bytes(cutlass::Kernel<GemmKernel>, GemmKernel::kThreadCount,
                                 static_cast<int>(sizeof(typename GemmKernel::SharedStorage)));
  c.run = [params, tiles, bytes] {
    cutlass::Kernel<GemmKernel>
        <<<Swizzle().get_grid_shape(tiles), GemmKernel::kThreadCount, bytes>>>(params);
    SP24_CHECK_LAUNCH("CUTLASS");
  };
  return c;
}

/// out [m, n] row-major by column-major cuBLAS: its transpose is rhs^T lhs^T.
Contestant cublas_dense(int m, int n, int k) {
  using Create = int (*)(void**);
  using GemmEx = int (*)(void*, int, int, int, int, int, const void*, const void*, int, int,
                         const void*, int, int, const void*, void*, int, int, int, int);
  constexpr int kBf16 = 14, kCompute32 = 68, kDefault = -1;
  Contestant c{"cuBLAS dense", {}, {}};
  void* library = nullptr;
  for (const char* name : {"libcublas.so", "libcublas.so.13", "libcublas.so.12"})
    if (library == nullptr) library = dlopen(name, RTLD_NOW);
  void* handle = nullptr;
  if (library == nullptr ||
      reinterpret_cast<Create>(dlsym(library, "cublasCreate_v2"))(&handle) != 0)
    return c;
  const auto gemm = reinterpret_cast<GemmEx>(dlsym(library, "cublasGemmEx"));
  Random random(m + n + k);
  const size_t size_m = m, size_n = n, size_k = k;
  const void* a = keep<void>(c, random_values(size_m * size_k, DType::kBFloat16, random));
  const void* b = keep<void>(c, random_values(size_n * size_k, DType::kBFloat16, random));
  void* d = keep<void>(c, std::make_unique<Buffer>(size_m * size_n * 2));
  c.run = [=] {
    const float one = 1.0f, zero = 0.0f;
    gemm(handle, kRhsKMajor ? 1 : 0, kLhsKMajor ? 0 : 1, n, m, k, &one, b, kBf16,
         kRhsKMajor ? k : n, a, kBf16, kLhsKMajor ? k : m, &zero, d, kBf16, n, kCompute32,
         kDefault);
  };
  return c;
}

/// Bytes of a K tile of 64 of both operands and of E.
constexpr int stage_bytes(int tile_m, int tile_n) {
  return tile_m * (32 * 2 + 8) + tile_n * 64 * 2;
}

template <int kTileM, int kTileN, int kStages>
void add_if_it_fits(std::vector<Contestant>& all, int shared_bytes, int m, int n, int k) {
  if (kStages * stage_bytes(kTileM, kTileN) <= shared_bytes)
    all.push_back(cutlass_sparse<kTileM, kTileN, kStages>(m, n, k));
}

/// Each tile with as many stages as the chosen GPU has room for.
void add_cutlass(std::vector<Contestant>& all, int m, int n, int k) {
  const int room = multiprocessor_bytes() - kReservedBytes;
  const size_t before = all.size();
  add_if_it_fits<256, 128, 4>(all, room, m, n, k);
  add_if_it_fits<128, 256, 3>(all, room, m, n, k);
  add_if_it_fits<128, 128, 4>(all, room, m, n, k);
  add_if_it_fits<128, 128, 3>(all, room, m, n, k);  // two blocks of an A100's multiprocessor
  if (all.size() > before + 1) return;
  add_if_it_fits<256, 128, 2>(all, room, m, n, k);
  add_if_it_fits<128, 256, 2>(all, room, m, n, k);
}

Contestant ours(int m, int n, int k) {
  auto product =
      std::make_shared<BenchProduct>(Problem{kPass, m, n, k, false}, Accumulation::kAuto);
  return {"sparse24", [product] { product->run(); }, {product}};
}

float time_of(const Contestant& c, int runs) {
  cudaEvent_t begin, end;
  SP24_CHECK_CUDA(cudaEventCreate(&begin));
  SP24_CHECK_CUDA(cudaEventCreate(&end));
  SP24_CHECK_CUDA(cudaEventRecord(begin));
  for (int i = 0; i < runs; ++i) c.run();
  SP24_CHECK_CUDA(cudaEventRecord(end));
  SP24_CHECK_CUDA(cudaEventSynchronize(end));
  float ms = 0;
  SP24_CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
  SP24_CHECK_CUDA(cudaEventDestroy(begin));
  SP24_CHECK_CUDA(cudaEventDestroy(end));
  return ms / static_cast<float>(runs);
}

/// Of all that a tuner may try.
void print_best_config(int m, int n, int k) {
  BenchProduct product({kPass, m, n, k, false}, Accumulation::kAuto);
  const std::string chosen = product.config_text();
  float best = 0;
  std::string text;
  for (const int64_t config : product.configs()) {
    product.use(config);
    product.time(3);
    std::vector<float> times;
    for (int round = 0; round < 5; ++round) times.push_back(product.time(3) / 3);
    std::sort(times.begin(), times.end());
    const float tflops = 2e-9f * m * n * k / times[2];
    if (tflops > best) best = tflops, text = product.config_text();
  }
  std::printf("  chosen %s\n  best   %s, %.0f TFLOP/s\n", chosen.c_str(), text.c_str(), best);
}

void compare(int m, int n, int k, bool all_configs) {
  constexpr int kRounds = 9, kRuns = 3;
  std::vector<Contestant> all;
  all.push_back(ours(m, n, k));
  add_cutlass(all, m, n, k);
  const size_t sparse = all.size();
  if (Contestant dense = cublas_dense(m, n, k); dense.run) all.push_back(std::move(dense));
  std::vector<std::vector<float>> times(all.size());
  for (int round = -3; round < kRounds; ++round)
    for (size_t i = 0; i < all.size(); ++i)
      if (const float ms = time_of(all[i], kRuns); round >= 0) times[i].push_back(ms);
  float mine = 0, best = 0;
  std::printf("m=%d n=%d k=%d\n", m, n, k);
  for (size_t i = 0; i < all.size(); ++i) {
    std::sort(times[i].begin(), times[i].end());
    const float tflops = 2e-9f * m * n * k / times[i][kRounds / 2];
    std::printf("  %-28s %7.0f TFLOP/s, counted dense\n", all[i].name.c_str(), tflops);
    if (i == 0) mine = tflops;
    if (i > 0 && i < sparse) best = std::max(best, tflops);
  }
  std::printf("  sparse24 over CUTLASS' best  %6.2f\n", mine / best);
  if (all_configs) print_best_config(m, n, k);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  const bool all_configs = count > 1 && std::string(arguments[1]) == "configs";
  cudaDeviceProp properties;
  SP24_CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s of bf16 on %s by kernels for %s\n", gemm::name_of(kPass), properties.name,
              gemm::arch_on(0).name);
  const auto of_layer = [&](int tokens, int in_features, int out_features) {
    switch (kPass) {
      case GemmPass::kForward: return compare(out_features, tokens, in_features, all_configs);
      case GemmPass::kGradInput: return compare(in_features, tokens, out_features, all_configs);
      default: return compare(out_features, in_features, tokens, all_configs);
    }
  };
  of_layer(8192, 4096, 11008);
  of_layer(16384, 4096, 14336);
  of_layer(16384, 1280, 5120);
  of_layer(8192, 8192, 8192);
}
