// arch.cpp: Ada (sm_89): the kernels of sm_80, and those of 8 bits where they were built.
#include "gemm/arch.h"

#include "common/kernel_arch.h"
#include "gemm/operands.h"
#include "gemm/sm80/products.h"
#include "gemm/sm89/launch.h"

namespace sparse24::gemm {
namespace {

#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM80
#define SP24_LAUNCHER_OF(arch, ...) &arch::SP24_SM80_LAUNCHER(__VA_ARGS__)
#else
#define SP24_LAUNCHER_OF(...) nullptr
#endif
#define SP24_ROW(arch, lhs, rhs, format, tile_m, tile_n, tile_k) \
  {Orientation::k##lhs,                                          \
   Orientation::k##rhs,                                          \
   DType::k##format,                                             \
   tile_m,                                                       \
   tile_n,                                                       \
   tile_k,                                                       \
   SP24_LAUNCHER_OF(arch, lhs, rhs, format, tile_m, tile_n, tile_k)},

constexpr sm80::Row kRows[] = {
#define SP24_GEMM_KERNEL(...) SP24_ROW(sm80, __VA_ARGS__)
#include "gemm/sm80/kernels.def"
#undef SP24_GEMM_KERNEL
#if SPARSE24_BUILT_SM89
#define SP24_GEMM_KERNEL(...) SP24_ROW(sm89, __VA_ARGS__)
#include "gemm/sm89/kernels.def"
#undef SP24_GEMM_KERNEL
#endif
};
constexpr auto kTable = sm80::products_of(kRows);

}  // namespace

const GemmArch kSm89 = {"sm_89",          {{8, 9}}, kBuiltSm80, kTable.kernels, kTable.count,
                        kTable.launchers, nullptr,  0,          sm80::cost_of,  unsupported_layout};

}  // namespace sparse24::gemm
