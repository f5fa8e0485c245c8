// gemm.cpp: the sparse product on the CPU, for tests. Training on a CPU decompresses and leaves the
// multiplication to PyTorch.
#include <vector>

#include "common/metadata.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace sparse24::cpu {
namespace {

struct Kept {
  int64_t k;
  double value;
};

/// The kept elements of row m of the sparse operand, in ascending k; those past k are padding.
template <typename T>
void read_row(const SparseGemmArgs& args, int64_t m, std::vector<Kept>& row) {
  const T* packed = static_cast<const T*>(args.packed);
  row.clear();
  for (int64_t k = 0; k < args.k; k += 4) {
    const uint8_t byte = args.E[meta_byte_offset(m, k & ~int64_t{7}, args.m)];
    const uint32_t nibble = byte >> (k & 4 ? 4 : 0) & 0xFu;
    for (int pick = 0; pick < 2; ++pick) {
      const int64_t at = k / 2 + pick;
      const T value = packed[is_forward(args.pass) ? m * (args.k / 2) + at : at * args.m + m];
      const int64_t position = k + (pick == 0 ? meta_first(nibble) : meta_second(nibble));
      if (position < args.k) row.push_back({position, to_float(value)});
    }
  }
}

/// What masked decay adds to out(m, n), as masked_decay has it: a fp32 product.
template <typename Out>
float decay_of(const MaskedDecayTerm& decay, int64_t m, int64_t n, int64_t columns) {
  const int second = m >= decay.first_rows;
  const int64_t row = m - (second ? decay.first_rows : 0);
  const uint16_t mask = decay.mask[second][row / 4 * (columns / 4) + n / 4];
  if (mask >> (4 * (row % 4) + n % 4) & 1) return 0.0f;
  const Out* weight = static_cast<const Out*>(decay.weight[second]);
  return *decay.factor * to_float(weight[row * decay.row_stride + n * decay.col_stride]);
}

template <typename T, typename Out>
void multiply(const SparseGemmArgs& args) {
  const bool weight_grad = args.pass == GemmPass::kGradWeight;
  // rhs(k, n) and out(m, n), whatever their layouts.
  const Strided<const T> rhs = {static_cast<const T*>(args.rhs), weight_grad ? args.rhs_ld : 1,
                                weight_grad ? 1 : args.rhs_ld};
  const Strided<Out> out = {static_cast<Out*>(args.out), weight_grad ? args.out_ld : 1,
                            weight_grad ? 1 : args.out_ld};
  const T* bias = static_cast<const T*>(args.bias);
  const bool decays = args.decay.factor != nullptr && *args.decay.factor != 0.0f;

  parallel_for(args.m, args.n * args.k, [&](int64_t begin, int64_t end) {
    std::vector<Kept> row;
    std::vector<double> sum(static_cast<size_t>(args.n));
    for (int64_t m = begin; m < end; ++m) {
      read_row<T>(args, m, row);
      std::fill(sum.begin(), sum.end(), bias == nullptr ? 0.0 : to_float(bias[m]));
      if (weight_grad) {  // rows of rhs are contiguous: add them up
        for (const Kept& kept : row)
          for (int64_t n = 0; n < args.n; ++n) sum[n] += kept.value * to_float(rhs(kept.k, n));
      } else {  // columns of rhs are contiguous: dot products
        for (int64_t n = 0; n < args.n; ++n)
          for (const Kept& kept : row) sum[n] += kept.value * to_float(rhs(kept.k, n));
      }
      for (int64_t n = 0; n < args.n; ++n) {
        double total = sum[n];
        if (args.accumulate) total += to_float(out(m, n));
        if (decays) total += decay_of<Out>(args.decay, m, n, args.n);
        out(m, n) = from_float<Out>(static_cast<float>(total));
      }
    }
  });
}

}  // namespace

void sparse_gemm(const SparseGemmArgs& args) {
  with_type(args.dtype, [&](auto in) {
    with_type(args.out_dtype, [&](auto out) { multiply<decltype(in), decltype(out)>(args); });
  });
  if (!has_activation(args.pass)) return;
  ActivationArgs after;
  after.kind = args.activation;
  after.gated = args.pass == GemmPass::kGatedForward;
  after.gate_up = {args.out, args.dtype, args.n, args.m, args.out_ld, 1};
  after.h = {args.h, args.dtype, args.n, after.gated ? args.m / 2 : args.m, args.h_ld, 1};
  activation_forward(after);
}

}  // namespace sparse24::cpu
