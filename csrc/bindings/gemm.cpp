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

/// A GEMM without addresses, for questions about one. Pointers count as 16-byte aligned.
SparseGemmArgs gemm_problem(int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype) {
  SparseGemmArgs args;
  args.pass = pass_of(pass);
  args.m = m;
  args.n = n;
  args.k = k;
  args.dtype = dtype_of(dtype);
  args.out_dtype = dtype_of(out_dtype);
  return args;
}

/// For questions that depend on extents alone: leading dimensions of contiguous operands.
void set_contiguous(SparseGemmArgs& args) {
  const bool weight_grad = args.pass == GemmPass::kGradWeight;
  args.rhs_ld = weight_grad ? args.n : args.k;
  args.out_ld = weight_grad ? args.n : args.m;
  args.h_ld = args.m;
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("sparse_gemm",
             [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, Address packed,
                Address E, Address rhs, int64_t rhs_ld, Address out, int64_t out_ld, Address bias,
                int accumulate, Address workspace, int64_t config, int backend, int device,
                Address stream, const py::object& decay, const py::object& activation) {
               SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
               args.packed = pointer<const void>(packed);
               args.E = pointer<const uint8_t>(E);
               args.rhs = pointer<const void>(rhs);
               args.rhs_ld = rhs_ld;
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
               const Context context = context_of(backend, device, stream);
               const py::gil_scoped_release unlocked;
               sparse_gemm(args, context);
             });

  module.def("sparse_gemm_unsupported",
             [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t rhs_ld,
                int64_t out_ld, int backend, int device) {
               SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
               args.rhs_ld = rhs_ld;
               args.out_ld = out_ld;
               args.h_ld = out_ld;  // half of it in a gated product: whole units, too
               return sparse_gemm_unsupported(args, context_of(backend, device, 0));
             });

  // Questions about a product of contiguous operands; config as for sparse_gemm.
  module.def("sparse_gemm_workspace_bytes",
             [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t config,
                int backend, int device) {
               SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
               set_contiguous(args);
               args.config = config;
               return sparse_gemm_workspace_bytes(args, context_of(backend, device, 0));
             });

  module.def("sparse_gemm_config", [](int pass, int64_t m, int64_t n, int64_t k, int dtype,
                                      int out_dtype, int64_t config, int backend, int device) {
    SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
    set_contiguous(args);
    args.config = config;
    return sparse_gemm_config(args, context_of(backend, device, 0));
  });

  module.def("sparse_gemm_configs", [](int pass, int64_t m, int64_t n, int64_t k, int dtype,
                                       int out_dtype, int backend, int device) {
    SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
    set_contiguous(args);
    const std::vector<int64_t> codes = sparse_gemm_configs(args, context_of(backend, device, 0));
    py::list result;
    for (int64_t code : codes) result.append(code);
    return result;
  });
}

}  // namespace sparse24::bindings
