// gemm.h: the sparse GEMM, out(m, n) = lhs(m, k) rhs(k, n), where lhs is 2:4 sparse along k.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sparse24/activation.h"
#include "sparse24/types.h"

namespace sparse24 {

/// The products of a linear layer, and forward with an activation; they fix the layouts (ld = leading dimension, in elements):
///
///   kForward     m = out_features, n = tokens, k = in_features
///                packed [m, k/2] row-major; rhs x [n, k], ld = rhs_ld; out y [n, m], ld = out_ld
///   kGradInput   m = in_features, n = tokens, k = out_features
///                packed_t [k/2, m] row-major; rhs dy [n, k], ld = rhs_ld; out dx [n, m], ld = out_ld
///   kGradWeight  m = out_features, n = in_features, k = tokens
///                packed_dy [padded_tokens(k)/2, m] row-major; rhs x [k, n], ld = rhs_ld; out dW [m, n], ld = out_ld
///   kActivatedForward  kForward, and from its epilogue h [n, m] = act(out), ld = h_ld, with the bits that
///                activation_forward gives; out_dtype must be dtype, and nothing is accumulated
///   kGatedForward  the same of gate and up, stacked: m = 2 d_ff, out = gate_up, h [n, d_ff] = act(gate) * up. d_ff must
///                be a multiple of 64
enum class GemmPass : int {
  kForward = 0,
  kGradInput = 1,
  kGradWeight = 2,
  kActivatedForward = 3,
  kGatedForward = 4,
};

constexpr bool has_activation(GemmPass pass) {
  return pass == GemmPass::kActivatedForward || pass == GemmPass::kGatedForward;
}
constexpr bool is_forward(GemmPass pass) { return pass == GemmPass::kForward || has_activation(pass); }

/// Masked decay inside the weight gradient's product: out += *factor * (1 - mask) * weight, in fp32 and before the one
/// rounding. The weight is one matrix, or two whose rows lie one after the other in `out` (gate and up).
struct MaskedDecayTerm {
  const float* factor = nullptr;  // one float in the backend's memory, read by the kernel; null: no decay
  const void* weight[2] = {};     // in out_dtype: rows [0, first_rows) of the product's m, and the rest
  int64_t row_stride = 0;         // of both weights, in elements: row-major, ...
  int64_t col_stride = 0;         // ... or column-major
  const uint16_t* mask[2] = {};   // [rows/4, n/4] of each weight, row-major
  int64_t first_rows = 0;         // m, or where the second weight begins: a multiple of 64
};

struct SparseGemmArgs {
  GemmPass pass = GemmPass::kForward;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  DType dtype = DType::kBFloat16;      // of packed, rhs and bias
  DType out_dtype = DType::kBFloat16;  // dtype, or kFloat32
  const void* packed = nullptr;
  const uint8_t* E = nullptr;
  const void* rhs = nullptr;
  int64_t rhs_ld = 0;
  void* out = nullptr;  // rows are stored in whole 16-byte units: what follows an odd width, up to out_ld, is scratch
  int64_t out_ld = 0;
  const void* bias = nullptr;  // [m] or null; forward products only
  bool accumulate = false;     // out += product; on a GPU subnormal fp32 sums may become zero
  MaskedDecayTerm decay;       // kGradWeight only
  void* h = nullptr;           // where the pass has_activation, as are the next two; rows are stored as those of out
  int64_t h_ld = 0;
  Activation activation = Activation::kSilu;
  int64_t config = 0;         // one of sparse_gemm_configs, or 0: the heuristic's
  void* workspace = nullptr;  // sparse_gemm_workspace_bytes of it, 16-byte aligned
};

/// Why the GPU kernels cannot take these arguments ("" if they can): alignment, dtype, architecture. The caller then
/// pads with zeros, or multiplies densely over the decompressed operand; the function that a layer computes does not
/// change.
SP24_API std::string sparse_gemm_unsupported(const SparseGemmArgs& args, const Context& context);
SP24_API int64_t sparse_gemm_workspace_bytes(const SparseGemmArgs& args, const Context& context);
SP24_API void sparse_gemm(const SparseGemmArgs& args, const Context& context);

/// The kernel that sparse_gemm would launch, as text: tile, cluster, walk over the tiles, stream-K or not.
SP24_API std::string sparse_gemm_config(const SparseGemmArgs& args, const Context& context);

/// All configs that can compute these arguments, the heuristic's first: what a tuner may try. Values for `config`.
SP24_API std::vector<int64_t> sparse_gemm_configs(const SparseGemmArgs& args, const Context& context);

}  // namespace sparse24
