// operands.cpp: the rules of operands.h.
#include "gemm/operands.h"

#include <limits>

#include "common/check.h"
#include "common/convert.h"
#include "gemm/config.h"

namespace sparse24::gemm {
namespace {

const char* name_of(Orientation orientation) {
  return orientation == Orientation::kKMajor ? "K-major" : "MN-major";
}

/// Why the operands cannot be read as they lie: kernels move rows of whole 16-byte units.
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
    const bool out_features =
        args.pass == GemmPass::kGradInput || args.pass == GemmPass::kGradInputOfOutput;
    return concat(tokens         ? "tokens "
                  : out_features ? "out_features "
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

}  // namespace

std::string unsupported_layout(const SparseGemmArgs& args) {
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

}  // namespace sparse24::gemm
