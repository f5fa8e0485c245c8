// arch.cpp: Ampere and Ada (sm_80, 86, 89): kernels, their costs, and what they cannot take.
#include "gemm/arch.h"

#include "common/kernel_arch.h"
#include "gemm/operands.h"
#include "gemm/sm80/launch.h"

namespace sparse24::gemm {
namespace {

/// A row of kernels.def. A kernel is of operands; all passes and outputs that have such are its.
struct Row {
  Orientation lhs, rhs;
  DType format;
  int tile_m, tile_n, tile_k;
};
constexpr Row kRows[] = {
#define SP24_GEMM_KERNEL(lhs, rhs, format, tile_m, tile_n, tile_k) \
  {Orientation::k##lhs, Orientation::k##rhs, DType::k##format, tile_m, tile_n, tile_k},
#include "gemm/sm80/kernels.def"
#undef SP24_GEMM_KERNEL
};
constexpr int kRowCount = static_cast<int>(sizeof kRows / sizeof kRows[0]);

#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM80
constexpr Launcher* kRowLaunchers[] = {
#define SP24_GEMM_KERNEL(...) &sm80::SP24_SM80_LAUNCHER(__VA_ARGS__),
#include "gemm/sm80/kernels.def"
#undef SP24_GEMM_KERNEL
};
#endif

struct Table {
  KernelEntry kernels[4 * kRowCount]{};
  Launcher* launchers[4 * kRowCount]{};
  int count = 0;
};

constexpr void add_products(Table& table, int row, GemmPass pass) {
  const Row& of = kRows[row];
  for (const GemmEpilogue epilogue :
       {GemmEpilogue::kPlain, GemmEpilogue::kActivation, GemmEpilogue::kGate}) {
    for (const DType out : {of.format, DType::kFloat32}) {
      const bool plain = epilogue == GemmEpilogue::kPlain;
      if (!plain && (pass != GemmPass::kForward || out != of.format)) continue;
      table.kernels[table.count] = {pass,      epilogue,  of.format, out, Accumulation::kFast,
                                    of.tile_m, of.tile_n, of.tile_k, 1,   1};
#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM80
      table.launchers[table.count] = kRowLaunchers[row];
#endif
      ++table.count;
    }
  }
}

constexpr Table make_table() {
  Table table;
  for (int row = 0; row < kRowCount; ++row) {
    for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight,
                                GemmPass::kGradWeightOfInput}) {
      const DType format = kRows[row].format;
      if (lhs_orientation(pass, format) == kRows[row].lhs &&
          rhs_orientation(pass, format) == kRows[row].rhs)
        add_products(table, row, pass);
    }
  }
  return table;
}
constexpr Table kTable = make_table();

/// Estimates for an A100 (sm80/mainloop.h): only their proportion counts, when stream-K is weighed
/// against whole tiles.
TileCost cost_of(const KernelEntry& kernel) {
  return {double(kernel.tile_m) * kernel.tile_n * kernel.tile_k / 2048, 3000};
}

}  // namespace

const GemmArch kSm80 = {"sm_80",          {{8, 0}, {8, 6}, {8, 9}},
                        kBuiltSm80,       kTable.kernels,
                        kTable.count,
#if defined(SPARSE24_WITH_CUDA) && SPARSE24_BUILT_SM80
                        kTable.launchers,
#else
                        nullptr,
#endif
                        nullptr,          0,
                        cost_of,          unsupported_layout};

}  // namespace sparse24::gemm
