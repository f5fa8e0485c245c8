// activation.cpp: activations, forward and backward: activation.h.
#include "bindings/arguments.h"

namespace sparse24::bindings {

void bind_activation(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "activation_forward",
      [](int kind, int gated, Address gate_up, int dtype, int64_t gate_up_rows,
         int64_t gate_up_cols, int64_t gate_up_row_stride, int64_t gate_up_col_stride, Address h,
         int64_t h_row_stride, int64_t h_col_stride, int backend, int device, Address stream) {
        const DType type = dtype_of(dtype);
        ActivationArgs args;
        args.kind = activation_of(kind);
        args.gated = gated != 0;
        args.gate_up = const_matrix(gate_up, type, gate_up_rows, gate_up_cols, gate_up_row_stride,
                                    gate_up_col_stride);
        args.h = matrix(h, type, gate_up_rows, args.gated ? gate_up_cols / 2 : gate_up_cols,
                        h_row_stride, h_col_stride);
        activation_forward(args, context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "activation_backward",
      [](int kind, int gated, Address dh, int dtype, int64_t dh_rows, int64_t dh_cols,
         int64_t dh_row_stride, int64_t dh_col_stride, Address gate_up, int64_t gate_up_row_stride,
         int64_t gate_up_col_stride, Address d_gate_up, int64_t d_gate_up_row_stride,
         int64_t d_gate_up_col_stride, Address h, int64_t h_row_stride, int64_t h_col_stride,
         Address seed, Address packed, Address E, Address tile_sums, int backend, int device,
         Address stream) {
        const DType type = dtype_of(dtype);
        const int64_t gate_up_cols = gated != 0 ? 2 * dh_cols : dh_cols;
        ActivationBackwardArgs args;
        args.kind = activation_of(kind);
        args.gated = gated != 0;
        args.d_h = const_matrix(dh, type, dh_rows, dh_cols, dh_row_stride, dh_col_stride);
        args.gate_up = const_matrix(gate_up, type, dh_rows, gate_up_cols, gate_up_row_stride,
                                    gate_up_col_stride);
        args.d_gate_up = matrix(d_gate_up, type, dh_rows, gate_up_cols, d_gate_up_row_stride,
                                d_gate_up_col_stride);
        args.h = matrix(h, type, dh_rows, dh_cols, h_row_stride, h_col_stride);
        args.seed = pointer<const int64_t>(seed);
        args.packed = pointer<void>(packed);
        args.E = pointer<uint8_t>(E);
        args.tile_sums = pointer<float>(tile_sums);
        activation_backward(args, context_of(backend, device, stream));
      },
      Unlocked());
}

}  // namespace sparse24::bindings
