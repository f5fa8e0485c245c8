// gemm.cpp: public functions of gemm.h: check, then dispatch.
#include "sparse24/gemm.h"

#include <algorithm>

#include "api/checks.h"
#include "api/dispatch.h"

#ifdef SPARSE24_WITH_CUDA
#include "gemm/sparse_gemm.h"
#endif

namespace sparse24 {
namespace {

using namespace api;

/// Width of h.
int64_t h_cols(const SparseGemmArgs& args) {
  return args.epilogue == GemmEpilogue::kGate ? args.m / 2 : args.m;
}

/// The further rules on products with an activation.
void check_activated(const SparseGemmArgs& args) {
  if (args.epilogue == GemmEpilogue::kPlain) return;
  SP24_CHECK(args.pass == GemmPass::kForward, "an activation belongs to forward products only");
  SP24_CHECK(args.epilogue != GemmEpilogue::kGate || args.m % 128 == 0,
             "a gated product must have m = 2 d_ff with d_ff a multiple of 64, got m = ", args.m,
             "; run the plain product, then activation_forward");
  const int kind = static_cast<int>(args.activation);
  SP24_CHECK(kind >= 0 && kind <= static_cast<int>(kLastActivation),
             "activation must be one of enum Activation, got ", kind);
  const DType expected =
      args.lhs.format == DType::kFloat32 ? DType::kFloat32 : wide_of(args.lhs.format);
  SP24_CHECK(args.out_dtype == expected, "out_dtype of a product of ", name_of(args.lhs.format),
             " with an activation must be ", name_of(expected), ", got ", name_of(args.out_dtype));
  SP24_CHECK(!args.accumulate, "a product with an activation does not accumulate: h is not a sum");
  SP24_CHECK(args.h_ld >= h_cols(args), "h_ld must be at least ", h_cols(args), ", got ",
             args.h_ld);
}

void check_dtypes(const SparseGemmArgs& args) {
  const DType format = args.lhs.format, out = args.out_dtype;
  if (is_float8(format)) {
    SP24_CHECK(out == wide_of(format) || out == DType::kFloat32, "out_dtype of a product of ",
               name_of(format), " must be ", name_of(wide_of(format)), " or float32, got ",
               name_of(out));
    return;
  }
  SP24_CHECK(out == format || out == DType::kFloat32, "out_dtype must be that of the operands (",
             name_of(format), ") or float32, got ", name_of(out));
  SP24_CHECK(args.lhs.scale == nullptr && args.rhs.scale == nullptr,
             "scales belong to 8-bit operands, got ", name_of(format), "; leave them null");
}

/// Shapes, dtypes and leading dimensions: all that needs no pointer.
void check_problem(const SparseGemmArgs& args) {
  check_extent(args.m, "m");
  check_extent(args.n, "n");
  check_extent(args.k, "k");
  SP24_CHECK(is_grad_weight(args.pass) || args.k % 4 == 0, "k must be a multiple of 4, got ",
             args.k);
  check_dtypes(args);
  const int64_t rhs_cols = args.rhs.orientation == Orientation::kKMajor ? args.k : args.n;
  const int64_t out_cols = is_m_by_n(args.pass) ? args.n : args.m;
  SP24_CHECK(args.rhs.ld >= rhs_cols, "rhs_ld must be at least ", rhs_cols, ", got ", args.rhs.ld);
  SP24_CHECK(args.out_ld >= out_cols, "out_ld must be at least ", out_cols, ", got ", args.out_ld);
  check_activated(args);
}

/// Rules without which a decay would read outside of weights or masks.
void check_decay(const SparseGemmArgs& args) {
  const MaskedDecayTerm& decay = args.decay;
  if (decay.factor == nullptr) return;
  SP24_CHECK(is_grad_weight(args.pass), "decay belongs to the weight gradient only");
  SP24_CHECK(args.m % 4 == 0 && args.n % 4 == 0,
             "a product with decay must have m and n that are multiples of 4, got ", args.m,
             " and ", args.n);
  const bool m_rows = is_m_by_n(args.pass);  // is m that of dW's rows?
  const int64_t rows = m_rows ? args.m : args.n, cols = m_rows ? args.n : args.m;
  const bool two = decay.first_rows < rows;
  SP24_CHECK(
      decay.first_rows > 0 && decay.first_rows <= rows && (!two || decay.first_rows % 64 == 0),
      "decay.first_rows must be ", m_rows ? "m" : "n", " = ", rows,
      " or a smaller multiple of 64, got ", decay.first_rows);
  const int64_t most_rows = std::max(decay.first_rows, rows - decay.first_rows);
  SP24_CHECK((decay.col_stride == 1 && decay.row_stride >= cols) ||
                 (decay.row_stride == 1 && decay.col_stride >= most_rows),
             "decay.weight must be row- or column-major, got strides (", decay.row_stride, ", ",
             decay.col_stride, ") for extents [", most_rows, ", ", cols, "]");
  for (int i = 0; i < (two ? 2 : 1); ++i) {
    check_pointer(decay.weight[i], "decay.weight");
    check_pointer(decay.mask[i], "decay.mask");
  }
}

}  // namespace

std::string sparse_gemm_unsupported(const SparseGemmArgs& args, const Context& context) {
  check_problem(args);
  if (context.backend == Backend::kCpu) return "";
#ifdef SPARSE24_WITH_CUDA
  return gemm::unsupported(args, context.device);
#else
  return kWithoutCuda;
#endif
}

int64_t sparse_gemm_workspace_bytes(const SparseGemmArgs& args, const Context& context) {
  check_problem(args);
  if (context.backend == Backend::kCpu) return 0;
#ifdef SPARSE24_WITH_CUDA
  return gemm::workspace_bytes(args, context.device);
#else
  throw_without_cuda("sparse_gemm_workspace_bytes");
#endif
}

std::string sparse_gemm_config(const SparseGemmArgs& args, const Context& context) {
  check_problem(args);
  if (context.backend == Backend::kCpu) return "cpu: plain loops";
#ifdef SPARSE24_WITH_CUDA
  return gemm::config_text(args, context.device);
#else
  throw_without_cuda("sparse_gemm_config");
#endif
}

std::vector<int64_t> sparse_gemm_configs(const SparseGemmArgs& args, const Context& context) {
  check_problem(args);
  if (context.backend == Backend::kCpu) return {};
#ifdef SPARSE24_WITH_CUDA
  return gemm::configs(args, context.device);
#else
  throw_without_cuda("sparse_gemm_configs");
#endif
}

void sparse_gemm(const SparseGemmArgs& args, const Context& context) {
  check_problem(args);
  if (args.m == 0 || args.n == 0) return;
  check_pointer(args.out, "out");
  if (args.epilogue != GemmEpilogue::kPlain) check_pointer(args.h, "h");
  if (args.k > 0) {
    check_pointer(args.lhs.values, "packed");
    check_pointer(args.lhs.E, "E");
    check_pointer(args.rhs.values, "rhs");
  }
  SP24_CHECK(args.bias == nullptr || args.pass == GemmPass::kForward,
             "bias belongs to forward products only");
  check_decay(args);
  if (context.backend == Backend::kCpu) return cpu::sparse_gemm(args);
#ifdef SPARSE24_WITH_CUDA
  const DeviceGuard guard(context.device);
  gemm::run(args, context.device, stream(context));
#else
  throw_without_cuda("sparse_gemm");
#endif
}

}  // namespace sparse24
