// arch.cpp: Hopper (sm_90a): its kernels, their costs, and what they cannot take.
#include <limits>

#include "common/check.h"
#include "common/convert.h"
#include "gemm/arch.h"
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

#ifdef SPARSE24_WITH_CUDA
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

const char* name_of(Orientation orientation) {
  return orientation == Orientation::kKMajor ? "K-major" : "MN-major";
}

/// Why the operands cannot be read as they lie: TMA moves rows of whole 16-byte units.
std::string unsupported_operands(const SparseGemmArgs& args) {
  const DType format = args.lhs.format;
  const Orientation lhs = lhs_orientation(args.pass, format),
                    rhs = rhs_orientation(args.pass, format);
  if (args.lhs.orientation != lhs || args.rhs.orientation != rhs) {
    return concat("operands that are ", name_of(args.lhs.orientation), " and ",
                  name_of(args.rhs.orientation), "; ", gemm::name_of(args.pass), " of ",
                  sparse24::name_of(format), " takes them ", name_of(lhs), " and ", name_of(rhs));
  }
  const int64_t unit = 16 / bytes_of(format);
  if (args.rhs.ld % unit != 0) {
    return concat("rows of the dense operand ", args.rhs.ld, " elements apart, not a multiple of ",
                  unit);
  }
  if (lhs == Orientation::kKMajor && args.k % (2 * unit) != 0) {
    const bool tokens = is_grad_weight(args.pass);
    return concat(tokens                              ? "tokens "
                  : args.pass == GemmPass::kGradInput ? "out_features "
                                                      : "in_features ",
                  args.k, ", not a multiple of ", 2 * unit,
                  tokens ? "; pad both operands with zeros" : "");
  }
  if (lhs == Orientation::kMnMajor && args.m % unit != 0) {
    return concat(args.pass == GemmPass::kGradWeight ? "out_features " : "in_features ", args.m,
                  ", not a multiple of ", unit);
  }
  return "";
}

std::string unsupported(const SparseGemmArgs& args) {
  if (std::string reason = unsupported_operands(args); !reason.empty()) return reason;
  const int64_t out_unit = 16 / bytes_of(args.out_dtype);
  if (args.out_ld % out_unit != 0) {
    return concat("rows of the output ", args.out_ld, " elements apart, not a multiple of ",
                  out_unit);
  }
  if (args.pass == GemmPass::kForward && args.k == 0) return "a forward product of no features";
  if (args.epilogue != GemmEpilogue::kPlain && args.h_ld % out_unit != 0) {
    return concat("rows of h ", args.h_ld, " elements apart, not a multiple of ", out_unit);
  }
  // Coordinates are 32-bit; addresses are not.
  constexpr int64_t kLargest = std::numeric_limits<int>::max() - 1024;
  if (args.m > kLargest || args.n > kLargest || args.k > kLargest)
    return "an extent of 2^31 or more";
  return "";
}

}  // namespace

const GemmArch kSm90 = {"sm_90a",   9,          0, kKernels, kCount,
#ifdef SPARSE24_WITH_CUDA
                        kLaunchers,
#else
                        nullptr,
#endif
                        cost_of,    unsupported};

}  // namespace sparse24::gemm
