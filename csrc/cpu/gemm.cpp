// gemm.cpp: the sparse product on the CPU, for tests. Training on a CPU unpacks and leaves the
// multiplication to PyTorch.
#include <algorithm>
#include <vector>

#include "common/format.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace sparse24::cpu {
namespace {

struct Kept {
  int64_t k;
  double value;
};

/// Calls function(T{}) with the storage type of an operand.
template <typename Function>
void with_operand_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat8E4M3: return function(Float8E4M3{});
    case DType::kFloat8E5M2: return function(Float8E5M2{});
    default: return with_type(dtype, function);
  }
}

/// The kept elements of row m of the sparse operand, in ascending k; those past k are padding.
template <typename T>
void read_row(const SparseGemmArgs& args, int64_t m, std::vector<Kept>& row) {
  const SparseOperand& lhs = args.lhs;
  const T* values = static_cast<const T*>(lhs.values);
  const bool k_major = lhs.orientation == Orientation::kKMajor;
  const int64_t padded_k =
      is_grad_weight(args.pass) ? padded_tokens_for(lhs.format, args.k) : args.k;
  row.clear();
  for (int64_t k = 0; k < args.k; k += 4) {
    const uint8_t byte = lhs.E[meta_offset_for(lhs.format, m, k & ~int64_t{7}, args.m)];
    const uint32_t nibble = byte >> (k & 4 ? 4 : 0) & 0xFu;
    for (int pick = 0; pick < 2; ++pick) {
      const int64_t at = k / 2 + pick;
      const T value = values[k_major ? m * (padded_k / 2) + at : at * args.m + m];
      const int64_t position = k + (pick == 0 ? meta_first(nibble) : meta_second(nibble));
      if (position < args.k) row.push_back({position, to_float(value)});
    }
  }
}

/// What masked decay adds to element (row, col) of dW, as masked_decay has it: a fp32 product.
template <typename Out>
float decay_of(const MaskedDecayTerm& decay, int64_t row, int64_t col, int64_t columns) {
  const int second = row >= decay.first_rows;
  row -= second ? decay.first_rows : 0;
  const uint16_t mask = decay.mask[second][row / 4 * (columns / 4) + col / 4];
  if (mask >> (4 * (row % 4) + col % 4) & 1) return 0.0f;
  const Out* weight = static_cast<const Out*>(decay.weight[second]);
  return *decay.factor * to_float(weight[row * decay.row_stride + col * decay.col_stride]);
}

float scale_of(const SparseGemmArgs& args) {
  return (args.lhs.scale == nullptr ? 1.0f : *args.lhs.scale) *
         (args.rhs.scale == nullptr ? 1.0f : *args.rhs.scale);
}

/// sum(n) = row of lhs times rhs.
template <typename T>
void multiply_row(const std::vector<Kept>& row, const Strided<const T>& rhs, bool k_major,
                  std::vector<double>& sum) {
  const int64_t columns = static_cast<int64_t>(sum.size());
  std::fill(sum.begin(), sum.end(), 0.0);
  if (k_major) {  // columns of rhs are contiguous: dot products
    for (int64_t n = 0; n < columns; ++n)
      for (const Kept& kept : row) sum[n] += kept.value * to_float(rhs(kept.k, n));
  } else {  // rows of rhs are contiguous: add them up
    for (const Kept& kept : row)
      for (int64_t n = 0; n < columns; ++n) sum[n] += kept.value * to_float(rhs(kept.k, n));
  }
}

/// T of lhs, R of rhs, B of the bias.
template <typename T, typename R, typename B, typename Out>
void multiply(const SparseGemmArgs& args) {
  const bool k_major = args.rhs.orientation == Orientation::kKMajor;
  const bool m_rows = is_m_by_n(args.pass);
  // rhs(k, n) and out(m, n), whatever their layouts.
  const Strided<const R> rhs = {static_cast<const R*>(args.rhs.values), k_major ? 1 : args.rhs.ld,
                                k_major ? args.rhs.ld : 1};
  const Strided<Out> out = {static_cast<Out*>(args.out), m_rows ? args.out_ld : 1,
                            m_rows ? 1 : args.out_ld};
  const B* bias = static_cast<const B*>(args.bias);
  const bool decays = args.decay.factor != nullptr && *args.decay.factor != 0.0f;
  const double scale = scale_of(args);

  parallel_for(args.m, args.n * args.k, [&](int64_t begin, int64_t end) {
    std::vector<Kept> row;
    std::vector<double> sum(static_cast<size_t>(args.n));
    for (int64_t m = begin; m < end; ++m) {
      read_row<T>(args, m, row);
      multiply_row(row, rhs, k_major, sum);
      for (int64_t n = 0; n < args.n; ++n) {
        double total = scale * sum[n];
        if (bias != nullptr) total += to_float(bias[m]);
        if (args.accumulate) total += to_float(out(m, n));
        if (decays) {
          total += m_rows ? decay_of<Out>(args.decay, m, n, args.n)
                          : decay_of<Out>(args.decay, n, m, args.m);
        }
        out(m, n) = from_float<Out>(static_cast<float>(total));
      }
    }
  });
}

}  // namespace

void sparse_gemm(const SparseGemmArgs& args) {
  with_operand_type(args.lhs.format, [&](auto lhs) {
    using T = decltype(lhs);
    with_type(args.out_dtype, [&](auto out) {
      using Out = decltype(out);
      if constexpr (sizeof(T) == 1) {
        multiply<T, Float8E4M3, Out, Out>(args);
      } else {
        multiply<T, T, T, Out>(args);
      }
    });
  });
  if (args.epilogue == GemmEpilogue::kPlain) return;
  ActivationArgs after;
  after.kind = args.activation;
  after.gated = args.epilogue == GemmEpilogue::kGate;
  after.gate_up = {args.out, args.out_dtype, args.n, args.m, args.out_ld, 1};
  after.h = {args.h, args.out_dtype, args.n, after.gated ? args.m / 2 : args.m, args.h_ld, 1};
  activation_forward(after);
}

}  // namespace sparse24::cpu
