// arch.cpp: Hopper (sm_90a): its kernels, their costs, and what they cannot take.
#include "gemm/arch.h"
#include "common/kernel_arch.h"
#include "gemm/operands.h"
#include "gemm/sm90/launch.h"

namespace sparse24::gemm {
namespace {

constexpr KernelEntry kKernels[] = {
#define SP24_GEMM_KERNEL(pass, epilogue, format, out_dtype, accumulation, tile_m, tile_n, tile_k, \
                         cluster_m, cluster_n)                                                    \
  {GemmPass::k##pass,                                                                             \
   GemmEpilogue::k##epilogue,                                                                     \
   DType::k##format,                                                                              \
   DType::k##out_dtype,                                                                           \
   Accumulation::k##accumulation,                                                                 \
   tile_m,                                                                                        \
   tile_n,                                                                                        \
   tile_k,                                                                                        \
   cluster_m,                                                                                     \
   cluster_n},
#include "gemm/sm90/kernels.def"
#undef SP24_GEMM_KERNEL
};
constexpr int kCount = static_cast<int>(sizeof kKernels / sizeof kKernels[0]);

#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM90
constexpr Launcher* kLaunchers[] = {
#define SP24_GEMM_KERNEL(...) &sm90::SP24_GEMM_LAUNCHER(__VA_ARGS__),
#include "gemm/sm90/kernels.def"
#undef SP24_GEMM_KERNEL
};
#endif

/// Fitted to the sweep on an H100 (bench/results/h100/gemm_sweep.csv); those of 8 bits are in
/// proportion to the rates of long products on an H200.
TileCost cost_of(const KernelEntry& kernel) {
  const double store = kernel.tile_n == 256 ? 800 : 1200;
  if (is_float8(kernel.format)) return {kernel.tile_n == 256 ? 706.0 : 648.0, store};
  return {kernel.tile_n == 256 ? 690.0 : 520.0, store};  // wgmma waits for shared memory
}

/// On 132 multiprocessors (bench/results/gemm_sweep.csv).
constexpr MeasuredChoice kMeasured[] = {
    {GemmPass::kGradWeight, 768, 3072, 16384, 132, 192, Raster::kAlongM, 8, true},
};

}  // namespace

const GemmArch kSm90 = {"sm_90a",   {{9, 0}}, kBuiltSm90, kKernels,          kCount,
#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM90
                        kLaunchers,
#else
                        nullptr,
#endif
                        kMeasured,  1,        cost_of,    unsupported_layout};

}  // namespace sparse24::gemm
