// arch.cpp: Ampere (sm_80, 86): kernels, their costs, and what they cannot take.
#include "gemm/arch.h"

#include "common/kernel_arch.h"
#include "gemm/operands.h"
#include "gemm/sm80/launch.h"
#include "gemm/sm80/products.h"

namespace sparse24::gemm {
namespace {

#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM80
#define SP24_LAUNCHER_OF(...) &sm80::SP24_SM80_LAUNCHER(__VA_ARGS__)
#else
#define SP24_LAUNCHER_OF(...) nullptr
#endif

constexpr sm80::Row kRows[] = {
#define SP24_GEMM_KERNEL(lhs, rhs, format, tile_m, tile_n, tile_k) \
  {Orientation::k##lhs,                                            \
   Orientation::k##rhs,                                            \
   DType::k##format,                                               \
   tile_m,                                                         \
   tile_n,                                                         \
   tile_k,                                                         \
   SP24_LAUNCHER_OF(lhs, rhs, format, tile_m, tile_n, tile_k)},
#include "gemm/sm80/kernels.def"
#undef SP24_GEMM_KERNEL
};
constexpr auto kTable = sm80::products_of(kRows);

}  // namespace

const GemmArch kSm80 = {"sm_80",       {{8, 0}, {8, 6}},  kBuiltSm80, kTable.kernels,
                        kTable.count,  kTable.launchers,  nullptr,    0,
                        sm80::cost_of, unsupported_layout};

}  // namespace sparse24::gemm
