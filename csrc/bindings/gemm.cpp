// gemm.cpp: the sparse product: gemm.h. What belongs together travels as a tuple:
//
//   problem     (pass, m, n, k, format, out_dtype); pass: the place in kProducts
//   lhs         (values, E, scale): packed; scale the address of a float or 0, as that of rhs
//   rhs         (values, ld, scale)
//   out         (address, ld)
//   terms       (bias, accumulate, decay, activation): decay None or (factor, two weights,
//               row_stride, col_stride, two masks, first_rows), activation None or (h, h_ld, kind)
//   plan        (config, workspace)
//   accumulation  0 auto, 1 fast, 2 promoted
#include "bindings/arguments.h"

namespace sparse24::bindings {
namespace {

MaskedDecayTerm read_decay_term(const py::handle& item) {
  MaskedDecayTerm term;
  if (item.is_none()) return term;
  Fields fields(item, 8);
  term.factor = fields.next_pointer<const float>();
  for (const void*& weight : term.weight) weight = fields.next_pointer<const void>();
  term.row_stride = fields.next<int64_t>();
  term.col_stride = fields.next<int64_t>();
  for (const uint16_t*& mask : term.mask) mask = fields.next_pointer<const uint16_t>();
  term.first_rows = fields.next<int64_t>();
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
    {GemmPass::kForwardOfInput, GemmEpilogue::kPlain},
    {GemmPass::kGradInputOfOutput, GemmEpilogue::kPlain},
};

Product product_of(int code) {
  constexpr int kCount = static_cast<int>(sizeof kProducts / sizeof kProducts[0]);
  if (code < 0 || code >= kCount) {
    throw Error("pass code must be between 0 and " + std::to_string(kCount - 1) + ", got " +
                std::to_string(code));
  }
  return kProducts[code];
}

/// A GEMM without addresses: enough for questions about one. Pointers count as 16-byte aligned, and
/// operands lie as the GPU's kernels want them.
SparseGemmArgs read_problem(const py::tuple& problem, int accumulation) {
  Fields fields(problem, 6);
  const Product product = product_of(fields.next<int>());
  SparseGemmArgs args;
  args.pass = product.pass;
  args.epilogue = product.epilogue;
  args.m = fields.next<int64_t>();
  args.n = fields.next<int64_t>();
  args.k = fields.next<int64_t>();
  args.lhs.format = fields.next_dtype();
  args.lhs.orientation = lhs_orientation(args.pass, args.lhs.format);
  args.rhs.orientation = rhs_orientation(args.pass, args.lhs.format);
  args.out_dtype = fields.next_dtype();
  args.accumulation = checked_enum(accumulation, Accumulation::kPromoted, "accumulation");
  return args;
}

void read_operands(const py::tuple& lhs, const py::tuple& rhs, const py::tuple& out,
                   SparseGemmArgs& args) {
  Fields left(lhs, 3), right(rhs, 3), result(out, 2);
  args.lhs.values = left.next_pointer<const void>();
  args.lhs.E = left.next_pointer<const uint8_t>();
  args.lhs.scale = left.next_pointer<const float>();
  args.rhs.values = right.next_pointer<const void>();
  args.rhs.ld = right.next<int64_t>();
  args.rhs.scale = right.next_pointer<const float>();
  args.out = result.next_pointer<void>();
  args.out_ld = result.next<int64_t>();
}

void read_terms(const py::tuple& terms, SparseGemmArgs& args) {
  Fields fields(terms, 4);
  args.bias = fields.next_pointer<const void>();
  args.accumulate = fields.next<int>() != 0;
  args.decay = read_decay_term(fields.next_item());
  const py::handle activation = fields.next_item();
  if (activation.is_none()) return;
  Fields made(activation, 3);
  args.h = made.next_pointer<void>();
  args.h_ld = made.next<int64_t>();
  args.activation = activation_of(made.next<int>());
}

/// For questions that depend on extents alone: leading dimensions of contiguous operands.
void set_contiguous(SparseGemmArgs& args) {
  args.rhs.ld = args.rhs.orientation == Orientation::kKMajor ? args.k : args.n;
  args.out_ld = is_m_by_n(args.pass) ? args.n : args.m;
  args.h_ld = args.m;
}

void bind_product(py::module_& module) {
  module.def(
      "sparse_gemm",
      [](const py::tuple& problem, const py::tuple& lhs, const py::tuple& rhs, const py::tuple& out,
         const py::tuple& terms, const py::tuple& plan, int backend, int device, Address stream,
         int accumulation) {
        SparseGemmArgs args = read_problem(problem, accumulation);
        read_operands(lhs, rhs, out, args);
        read_terms(terms, args);
        Fields fields(plan, 2);
        args.config = fields.next<int64_t>();
        args.workspace = fields.next_pointer<void>();
        const Context context = context_of(backend, device, stream);
        const py::gil_scoped_release unlocked;
        sparse_gemm(args, context);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(),
      py::arg(), py::arg("accumulation") = 0);
}

// Questions about a product of contiguous operands; config as for sparse_gemm.
void bind_questions(py::module_& module) {
  module.def(
      "sparse_gemm_unsupported",
      [](const py::tuple& problem, int64_t rhs_ld, int64_t out_ld, int backend, int device,
         int accumulation) {
        SparseGemmArgs args = read_problem(problem, accumulation);
        args.rhs.ld = rhs_ld;
        args.out_ld = out_ld;
        args.h_ld = out_ld;  // half of it in a gated product: whole units, too
        return sparse_gemm_unsupported(args, context_of(backend, device, 0));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("accumulation") = 0);

  module.def(
      "sparse_gemm_workspace_bytes",
      [](const py::tuple& problem, int64_t config, int backend, int device, int accumulation) {
        SparseGemmArgs args = read_problem(problem, accumulation);
        set_contiguous(args);
        args.config = config;
        return sparse_gemm_workspace_bytes(args, context_of(backend, device, 0));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg("accumulation") = 0);

  module.def(
      "sparse_gemm_config",
      [](const py::tuple& problem, int64_t config, int backend, int device, int accumulation) {
        SparseGemmArgs args = read_problem(problem, accumulation);
        set_contiguous(args);
        args.config = config;
        return sparse_gemm_config(args, context_of(backend, device, 0));
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg("accumulation") = 0);

  module.def(
      "sparse_gemm_configs",
      [](const py::tuple& problem, int backend, int device, int accumulation) {
        SparseGemmArgs args = read_problem(problem, accumulation);
        set_contiguous(args);
        py::list result;
        for (int64_t code : sparse_gemm_configs(args, context_of(backend, device, 0)))
          result.append(code);
        return result;
      },
      py::arg(), py::arg(), py::arg(), py::arg("accumulation") = 0);
}

}  // namespace

void bind_gemm(py::module_& module) {
  bind_product(module);
  bind_questions(module);
}

}  // namespace sparse24::bindings
