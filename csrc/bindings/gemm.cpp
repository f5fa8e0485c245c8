// gemm.cpp: the sparse product: gemm.h.
#include "bindings/arguments.h"

namespace sparse24::bindings {
namespace {

MaskedDecayTerm read_decay_term(Fields& item) {
  MaskedDecayTerm term;
  term.factor = item.next_pointer<const float>();
  for (const void*& weight : term.weight) weight = item.next_pointer<const void>();
  term.row_stride = item.next<int64_t>();
  term.col_stride = item.next<int64_t>();
  for (const uint16_t*& mask : term.mask) mask = item.next_pointer<const uint16_t>();
  term.first_rows = item.next<int64_t>();
  return term;
}

/// Codes of products: what is multiplied, and what is made besides.
struct Product {
  GemmPass pass;
  GemmEpilogue epilogue;
};
constexpr Product kProducts[] = {
    {GemmPass::kForward, GemmEpilogue::kPlain},
    {GemmPass::kGradInput, GemmEpilogue::kPlain},
    {GemmPass::kGradWeight, GemmEpilogue::kPlain},
    {GemmPass::kForward, GemmEpilogue::kActivation},
    {GemmPass::kForward, GemmEpilogue::kGate},
    {GemmPass::kGradWeightOfInput, GemmEpilogue::kPlain},
};

Product product_of(int code) {
  constexpr int kCount = static_cast<int>(sizeof kProducts / sizeof kProducts[0]);
  if (code < 0 || code >= kCount) {
    throw Error("pass code must be between 0 and " + std::to_string(kCount - 1) + ", got " +
                std::to_string(code));
  }
  return kProducts[code];
}

/// A GEMM without addresses, for questions about one. Pointers count as 16-byte aligned, and
/// operands lie as the GPU's kernels want them.
SparseGemmArgs gemm_problem(int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype,
                            int accumulation) {
  const Product product = product_of(pass);
  SparseGemmArgs args;
  args.pass = product.pass;
  args.epilogue = product.epilogue;
  args.m = m;
  args.n = n;
  args.k = k;
  args.lhs.format = dtype_of(dtype);
  args.lhs.orientation = lhs_orientation(args.pass, args.lhs.format);
  args.rhs.orientation = rhs_orientation(args.pass, args.lhs.format);
  args.out_dtype = dtype_of(out_dtype);
  args.accumulation = checked_enum(accumulation, Accumulation::kPromoted, "accumulation");
  return args;
}

/// For questions that depend on extents alone: leading dimensions of contiguous operands.
void set_contiguous(SparseGemmArgs& args) {
  args.rhs.ld = args.rhs.orientation == Orientation::kKMajor ? args.k : args.n;
  args.out_ld = args.pass == GemmPass::kGradWeight ? args.n : args.m;
  args.h_ld = args.m;
}

// What is optional comes last, as keywords: decay (8 fields), activation (h, h_ld, kind), scales
// (of lhs, of rhs: addresses of a float), accumulation (0 auto, 1 fast, 2 promoted).
void bind_product(py::module_& module) {
  module.def(
      "sparse_gemm",
      [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, Address packed,
         Address E, Address rhs, int64_t rhs_ld, Address out, int64_t out_ld, Address bias,
         int accumulate, Address workspace, int64_t config, int backend, int device, Address stream,
         const py::object& decay, const py::object& activation, const py::object& scales,
         int accumulation) {
        SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype, accumulation);
        args.lhs.values = pointer<const void>(packed);
        args.lhs.E = pointer<const uint8_t>(E);
        args.rhs.values = pointer<const void>(rhs);
        args.rhs.ld = rhs_ld;
        args.out = pointer<void>(out);
        args.out_ld = out_ld;
        args.bias = pointer<const void>(bias);
        args.accumulate = accumulate != 0;
        args.workspace = pointer<void>(workspace);
        args.config = config;
        if (!decay.is_none()) {
          Fields item(decay, 8);
          args.decay = read_decay_term(item);
        }
        if (!activation.is_none()) {
          Fields item(activation, 3);
          args.h = item.next_pointer<void>();
          args.h_ld = item.next<int64_t>();
          args.activation = activation_of(item.next<int>());
        }
        if (!scales.is_none()) {
          Fields item(scales, 2);
          args.lhs.scale = item.next_pointer<const float>();
          args.rhs.scale = item.next_pointer<const float>();
        }
        const Context context = context_of(backend, device, stream);
        const py::gil_scoped_release unlocked;
        sparse_gemm(args, context);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg(), py::arg("decay") = py::none(),
      py::arg("activation") = py::none(), py::arg("scales") = py::none(),
      py::arg("accumulation") = 0);
}

// Questions about a product of contiguous operands; config as for sparse_gemm.
void bind_questions(py::module_& module) {
  module.def(
      "sparse_gemm_unsupported",
      [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t rhs_ld,
         int64_t out_ld, int backend, int device, int accumulation) {
        SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype, accumulation);
        args.rhs.ld = rhs_ld;
        args.out_ld = out_ld;
        args.h_ld = out_ld;  // half of it in a gated product: whole units, too
        return sparse_gemm_unsupported(args, context_of(backend, device, 0));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg(), py::arg("accumulation") = 0);

  module.def(
      "sparse_gemm_workspace_bytes",
      [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t config,
         int backend, int device, int accumulation) {
        SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype, accumulation);
        set_contiguous(args);
        args.config = config;
        return sparse_gemm_workspace_bytes(args, context_of(backend, device, 0));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg("accumulation") = 0);

  module.def(
      "sparse_gemm_config",
      [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t config,
         int backend, int device, int accumulation) {
        SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype, accumulation);
        set_contiguous(args);
        args.config = config;
        return sparse_gemm_config(args, context_of(backend, device, 0));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg("accumulation") = 0);

  module.def(
      "sparse_gemm_configs",
      [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int backend,
         int device, int accumulation) {
        SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype, accumulation);
        set_contiguous(args);
        py::list result;
        for (int64_t code : sparse_gemm_configs(args, context_of(backend, device, 0)))
          result.append(code);
        return result;
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg("accumulation") = 0);
}

}  // namespace

void bind_gemm(py::module_& module) {
  bind_product(module);
  bind_questions(module);
}

}  // namespace sparse24::bindings
