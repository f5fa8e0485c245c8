// gemm_checks.h: the library's ways to compute a product on a GPU, and checks of what epilogues do
// besides: masked decay, activations.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "activation/activation_cuda.h"
#include "gemm/arch.h"
#include "gemm/config.h"
#include "gemm/sparse_gemm.h"
#include "gemm_problems.h"

namespace gpu_testing {

/// The library's own choice.
inline Kernel chosen() {
  return {"library", [](const SparseGemmArgs& a) { return gemm::workspace_bytes(a, 0); },
          [](const SparseGemmArgs& a) { gemm::run(a, 0, nullptr); }};
}

inline Kernel kernel_of(const SparseGemmArgs& args, int64_t code) {
  const auto with = [code](SparseGemmArgs a) {
    a.config = code;
    return a;
  };
  return {gemm::config_text(with(args), 0),
          [with](const SparseGemmArgs& a) { return gemm::workspace_bytes(with(a), 0); },
          [with](const SparseGemmArgs& a) { gemm::run(with(a), 0, nullptr); }};
}

/// All that a tuner gets: all tiles, walks and stream-K.
inline std::vector<Kernel> every_config(const SparseGemmArgs& args) {
  std::vector<Kernel> kernels;
  for (const int64_t code : gemm::configs(args, 0)) kernels.push_back(kernel_of(args, code));
  return kernels;
}

/// One walk over the tiles for each tile and for stream-K or not.
inline std::vector<Kernel> first_walks(const SparseGemmArgs& args) {
  const gemm::GemmDesc desc = gemm::describe(args);
  std::map<std::pair<int, bool>, int64_t> first;
  for (const int64_t code : gemm::configs(args, 0)) {
    const gemm::GemmConfig config = gemm::decode(gemm::arch_on(0), desc, code);
    first.try_emplace({config.tile_n, config.stream_k}, code);
  }
  std::vector<Kernel> kernels;
  for (const auto& [what, code] : first) kernels.push_back(kernel_of(args, code));
  return kernels;
}

/// Whether a kernel is compiled for a problem with these outputs and sums.
inline bool has_kernel(const Problem& p, const Variant& v) {
  SparseGemmArgs args;
  args.pass = p.pass, args.epilogue = p.epilogue;
  args.lhs.format = p.format;
  args.out_dtype = out_dtype(p, v);
  args.accumulation = v.accumulation;
  return gemm::is_compiled(gemm::arch_on(0), gemm::describe(args));
}

/// dW of a product and the decay of its weight, whichever of m and n are the rows.
struct DecayCase {
  Problem p;
  Variant v;
  int first_rows;  // of the first of two weights; all: one
  bool column_major;

  int rows() const { return p.m_rows() ? p.m : p.n; }
  int cols() const { return p.m_rows() ? p.n : p.m; }
  // Strides are shared: column-major weights are as tall as both, the second begins further down.
  int row_stride() const { return column_major ? 1 : cols(); }
  int col_stride() const { return column_major ? rows() : 1; }
  float factor() const { return p.integers ? 2.0f : 0.37f; }
};

struct DecayOperands {
  Elements weight;
  std::vector<uint16_t> mask;

  explicit DecayOperands(const DecayCase& c)
      : weight(static_cast<size_t>(c.p.m) * c.p.n, out_dtype(c.p, c.v)), mask(weight.size() / 16) {
    Random random(c.p.m + c.p.n + c.first_rows);
    for (uint16_t& bits : mask) bits = static_cast<uint16_t>(random.bits());
    for (size_t i = 0; i < weight.size(); ++i)
      weight.set(i, c.p.integers ? static_cast<float>(random.below(9) - 4) : random.normal());
  }

  /// What is added at (row, col) of dW: a rounded product.
  float pull(const DecayCase& c, int row, int col) const {
    const uint16_t bits = mask[static_cast<size_t>(row) / 4 * (c.cols() / 4) + col / 4];
    if (bits >> (row % 4 * 4 + col % 4) & 1) return 0.0f;
    volatile const float pull =
        c.factor() * weight.get(static_cast<size_t>(row) * c.row_stride() + col * c.col_stride());
    return pull;
  }
};

/// Masked decay in the epilogue: with fp32 outputs the bits of the product without it, plus the
/// rounded pull; with 16-bit ones of small integers likewise. Kept elements have the bits of the
/// product. One weight or two, row- or column-major, added to what is there or not.
inline void check_decay(const DecayCase& c, const Operands& o, const Device& d,
                        const Kernel& kernel) {
  ++cases;
  const DecayOperands operands(c);
  const Buffer weight(operands.weight), mask(operands.mask), factor(std::vector<float>{c.factor()});
  SparseGemmArgs a = make_args(c.p, d, c.v);
  const Elements before = make_out(c.p, c.v);
  const Buffer without(before), with(before), workspace(kernel.workspace_bytes(a));
  a.workspace = workspace.get();
  a.out = without.get();
  kernel.run(a);

  char* const data = static_cast<char*>(weight.get());
  const int64_t second =
      static_cast<int64_t>(c.first_rows) * c.row_stride() * bytes_of(a.out_dtype);
  const auto* masks = static_cast<const uint16_t*>(mask.get());
  a.decay = {static_cast<const float*>(factor.get()),
             {data, data + second},
             c.row_stride(),
             c.col_stride(),
             {masks, masks + static_cast<int64_t>(c.first_rows) / 4 * (c.cols() / 4)},
             c.first_rows};
  a.out = with.get();
  kernel.run(a);
  const std::string what = describe_case(c.p, kernel, c.v);
  synchronize_or_exit(what);

  const Elements product = without.read_as(before), got = with.read_as(before);
  int64_t wrong = 0;
  for (int row = 0; row < c.rows(); ++row) {
    for (int col = 0; col < c.p.out_ld(); ++col) {
      const size_t at = static_cast<size_t>(row) * c.p.out_ld() + col;
      float expected = product.get(at);
      if (col < c.cols()) {
        const float pull = operands.pull(c, row, col);
        if (pull != 0.0f && c.v.float_out) expected += pull;
        if (pull != 0.0f && !c.v.float_out) {  // of integers: rounded once, after both
          const double sum = o.exact[static_cast<size_t>(row) * c.cols() + col] +
                             (c.v.accumulate ? kExisting : 0.0f) + pull;
          expected = got.rounded(static_cast<float>(sum));
        }
      }
      if (got.get(at) != expected && wrong++ == 0) {
        fail("decay ", what, " first_rows=", c.first_rows, c.column_major ? " column-major" : "",
             " at [", row, ", ", col, "]: ", got.get(at), " for ", expected);
      }
    }
  }
}

/// `kernel` with h beside out: after each run, h must have the bits that activation_forward
/// makes of that out, and nothing may be written past its columns.
inline Kernel with_h(const Kernel& kernel, Activation activation) {
  const auto run = [kernel, activation](const SparseGemmArgs& given) {
    SparseGemmArgs a = given;
    const bool gated = a.epilogue == GemmEpilogue::kGate;
    const int64_t width = gated ? a.m / 2 : a.m, ld = width + kPad;
    const std::vector<uint16_t> canary(static_cast<size_t>(a.n * ld), 0x4321);
    const Buffer h(canary), expected(canary);
    a.h = h.get();
    a.h_ld = ld;
    a.activation = activation;
    kernel.run(a);
    ActivationArgs separate;
    separate.kind = activation;
    separate.gated = gated;
    separate.gate_up = {a.out, a.out_dtype, a.n, a.m, a.out_ld, 1};
    separate.h = {expected.get(), a.out_dtype, a.n, width, ld, 1};
    sparse24::cuda::activation_forward(separate, nullptr);
    if (h.read<uint16_t>() != expected.read<uint16_t>()) {
      fail("h of activation ", static_cast<int>(activation), ", m=", a.m, " n=", a.n, " k=", a.k,
           " differs from activation_forward | ", kernel.name);
    }
  };
  return {kernel.name, kernel.workspace_bytes, run};
}

inline void check_activated(const Problem& p, bool all_configs) {
  const Operands o = make_operands(p);
  const Device d(o);
  for (const bool bias : {false, true}) {
    const Variant v{bias, false, false};
    SparseGemmArgs args = make_args(p, d, v);
    args.h_ld = p.m + kPad;
    const std::vector<Kernel> kernels = all_configs ? every_config(args) : first_walks(args);
    int activation = bias ? 0 : 3;
    for (const Kernel& kernel : kernels) {
      check_case(p, o, d, with_h(kernel, static_cast<Activation>(activation++ % 6)), v);
    }
  }
}

/// 250 runs of every config give the same bits.
inline void check_repeats(const Problem& p, const Variant& v) {
  const Operands o = make_operands(p);
  const Device d(o);
  for (const Kernel& kernel : every_config(make_args(p, d, v))) {
    ++cases;
    SparseGemmArgs a = make_args(p, d, v);
    const Buffer out(make_out(p, v)), workspace(kernel.workspace_bytes(a));
    a.out = out.get();
    a.workspace = workspace.get();
    std::vector<uint8_t> first;
    for (int run = 0; run < 250; ++run) {
      SP24_CHECK_CUDA(cudaMemset(out.get(), 0, out.bytes()));
      kernel.run(a);
      if (run % 25 != 0 && run != 249) continue;  // reading back costs more than running
      const std::vector<uint8_t> bits = out.read<uint8_t>();
      if (first.empty()) first = bits;
      if (bits != first) {
        fail("run ", run, " differs from the first | ", describe_case(p, kernel, v));
        break;
      }
    }
  }
}

}  // namespace gpu_testing
