// gemm.h: the sparse GEMM, out(m, n) = lhs(m, k) rhs(k, n), where lhs is 2:4 sparse along k.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sparse24/activation.h"
#include "sparse24/types.h"

namespace sparse24 {

/// The products of a linear layer, and what lies where (ld = leading dimension, in elements):
///
///   kForward     m = out_features, n = tokens, k = in_features
///                lhs the weight; rhs x [n, k]; out y [n, m]
///   kGradInput   m = in_features, n = tokens, k = out_features
///                lhs the transposed weight; rhs dy [n, k]; out dx [n, m]
///   kGradWeight  m = out_features, n = in_features, k = tokens
///                lhs the pruned dy, transposed; rhs x [k, n], or x^T [n, k]; out dW [m, n]
///   kGradWeightOfInput  the same gradient where the input was pruned: dW^T is computed, and stored as dW.
///                m = in_features, n = out_features, k = tokens
///                lhs the pruned x, transposed; rhs dy [k, n], or dy^T [n, k]; out dW [n, m]
///
/// and two where an activation is pruned along its features, and the weight is dense, as nn.Linear has it:
///
///   kForwardOfInput     m = tokens, n = out_features, k = in_features
///                       lhs the pruned x; rhs the weight [n, k]; out y [m, n]
///   kGradInputOfOutput  m = tokens, n = in_features, k = out_features
///                       lhs the pruned dy; rhs the weight [k, n]; out dx [m, n]
enum class GemmPass : int {
  kForward = 0,
  kGradInput = 1,
  kGradWeight = 2,
  kGradWeightOfInput = 3,
  kForwardOfInput = 4,
  kGradInputOfOutput = 5
};

constexpr bool is_grad_weight(GemmPass pass) {
  return pass == GemmPass::kGradWeight || pass == GemmPass::kGradWeightOfInput;
}

/// Are the rows of lhs tokens, pruned along their features? On a GPU such products are of 16 bits, in and out.
constexpr bool is_of_activation(GemmPass pass) {
  return pass == GemmPass::kForwardOfInput || pass == GemmPass::kGradInputOfOutput;
}

/// Is out [m, n]? Else it is [n, m].
constexpr bool is_m_by_n(GemmPass pass) { return pass == GemmPass::kGradWeight || is_of_activation(pass); }

/// What a forward product makes in addition:
///
///   kActivation  h [n, m] = act(out), with the bits that activation_forward gives
///   kGate        the same of gate and up, stacked: m = 2 d_ff, out = gate_up, h [n, d_ff] = act(gate) * up. d_ff must
///                be a multiple of 64
///
/// Nothing is accumulated then, and h has out's dtype.
enum class GemmEpilogue : int { kPlain = 0, kActivation = 1, kGate = 2 };

/// Along which extent the values of an operand are neighbours in memory: k, or the other one (m of lhs, n of rhs).
enum class Orientation : int { kKMajor = 0, kMnMajor = 1 };

/// How the GPU's kernels want the operands of a pass: 16-bit ones as the ops that make them write them; 8-bit ones
/// along k, always. The CPU takes both orientations in every pass.
constexpr Orientation lhs_orientation(GemmPass pass, DType dtype) {
  return is_float8(dtype) || pass == GemmPass::kForward || is_of_activation(pass) ? Orientation::kKMajor
                                                                                  : Orientation::kMnMajor;
}
constexpr Orientation rhs_orientation(GemmPass pass, DType dtype) {
  const bool rows_of_k = is_grad_weight(pass) || pass == GemmPass::kGradInputOfOutput;
  return is_float8(dtype) || !rows_of_k ? Orientation::kKMajor : Orientation::kMnMajor;
}

/// lhs. K-major [m, padded_k/2] or MN-major [padded_k/2, m], rows contiguous; E in the order of the format. padded_k is
/// padded_tokens(k) where k is tokens, else k.
struct SparseOperand {
  const void* values = nullptr;
  const uint8_t* E = nullptr;
  DType format = DType::kBFloat16;
  Orientation orientation = Orientation::kKMajor;
  const float* scale = nullptr;  // of 8-bit values: one float in the backend's memory; null: 1
};

/// rhs. K-major [n, k] or MN-major [k, n], rows `ld` elements apart. Its dtype is that of lhs, or float8_e4m3fn where lhs
/// is of 8 bits.
struct DenseOperand {
  const void* values = nullptr;
  int64_t ld = 0;
  Orientation orientation = Orientation::kKMajor;
  const float* scale = nullptr;
};

/// Masked decay inside the weight gradient's product: out += *factor * (1 - mask) * weight, in fp32 and before the one
/// rounding. The weight is one matrix, or two whose rows lie one after the other in `out` (gate and up).
struct MaskedDecayTerm {
  const float* factor = nullptr;  // one float in the backend's memory, read by the kernel; null: no decay
  const void* weight[2] = {};     // in out_dtype: rows [0, first_rows) of dW, and the rest
  int64_t row_stride = 0;         // of both weights, in elements: row-major, ...
  int64_t col_stride = 0;         // ... or column-major
  const uint16_t* mask[2] = {};   // [rows/4, in_features/4] of each weight, row-major
  int64_t first_rows = 0;         // out_features, or where the second weight begins: a multiple of 64
};

/// How sums of 8-bit products are kept. The tensor cores add them with some 14 bits and cut off the rest: harmless
/// where signs are mixed, but a bias of several per cent on sums of one sign. kPromoted adds partial sums of 256 k in
/// fp32 and loses a sixth of the speed. kAuto promotes weight gradients, whose sums are the longest; a caller who knows
/// that rhs has one sign (squared ReLU) asks for kPromoted. Kernels for Ada promote all sums, those of 64 k. 16-bit
/// products are always summed in fp32.
enum class Accumulation : int { kAuto = 0, kFast = 1, kPromoted = 2 };

struct SparseGemmArgs {
  GemmPass pass = GemmPass::kForward;
  GemmEpilogue epilogue = GemmEpilogue::kPlain;
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  SparseOperand lhs;
  DenseOperand rhs;
  DType out_dtype = DType::kBFloat16;  // that of 16-bit operands, or kFloat32; of 8-bit ones kBFloat16 or kFloat32
  void* out = nullptr;  // rows are stored in whole 16-byte units: what follows an odd width, up to out_ld, is scratch
  int64_t out_ld = 0;
  const void* bias =
      nullptr;              // [m] or null; in lhs' format, or out_dtype where that is of 8 bits; forward products only
  bool accumulate = false;  // out += product; on a GPU subnormal fp32 sums may become zero
  MaskedDecayTerm decay;    // weight gradients only
  void* h = nullptr;        // where there is an activation, as are the next two; rows are stored as those of out
  int64_t h_ld = 0;
  Activation activation = Activation::kSilu;
  Accumulation accumulation = Accumulation::kAuto;
  int64_t config = 0;         // one of sparse_gemm_configs, or 0: the heuristic's
  void* workspace = nullptr;  // sparse_gemm_workspace_bytes of it, 16-byte aligned
};

/// Why the GPU kernels cannot take these arguments ("" if they can): alignment, dtype, architecture. The caller then
/// pads with zeros, or multiplies densely over the unpacked operand; the function that a layer computes does not
/// change.
SP24_API std::string sparse_gemm_unsupported(const SparseGemmArgs& args, const Context& context);
SP24_API int64_t sparse_gemm_workspace_bytes(const SparseGemmArgs& args, const Context& context);
SP24_API void sparse_gemm(const SparseGemmArgs& args, const Context& context);

/// The kernel that sparse_gemm would launch, as text: tile, cluster, walk over the tiles, stream-K or not.
SP24_API std::string sparse_gemm_config(const SparseGemmArgs& args, const Context& context);

/// All configs that can compute these arguments, the heuristic's first: what a tuner may try. Values for `config`.
SP24_API std::vector<int64_t> sparse_gemm_configs(const SparseGemmArgs& args, const Context& context);

}  // namespace sparse24
