// activation.cpp: activations, forward and backward, and those pruned and packed: activation.h,
// activation_pack.h.
//
//   activation_forward(kind, gated, gate_up, h, float8, mvue, backend, device, stream): h a matrix,
//       whose address may be 0 where others are wanted
//   activation_backward(kind, gated, d_h, gate_up, d_gate_up, h, float8, mvue, tile_sums, backend,
//       device, stream): likewise d_gate_up; h a matrix or None
//   activation_pack(kind, u, packed, mvue, backend, device, stream)
//   activation_pack_backward(kind, d_h, u, packed, mvue, tile_sums, backend, device, stream): packed
//       is (packed, packed_dtype, E, scale), of backward without E; mvue the form along tokens
#include "bindings/arguments.h"

namespace sparse24::bindings {

/// Args: of activation_pack or its backward. Returns E.
template <typename Args>
uint8_t* read_packed_forms(const py::handle& packed, const py::handle& along_tokens, Args& args) {
  MvueArgs mvue;
  read_mvue(along_tokens, mvue);
  args.seed = mvue.seed;
  args.packed_t = mvue.packed;
  args.E_t = mvue.E;
  Fields fields(packed, 4);
  args.packed = fields.next_pointer<void>();
  args.packed_dtype = fields.next_dtype();
  uint8_t* E = fields.next_pointer<uint8_t>();
  args.scale = fields.next_pointer<float>();
  return E;
}

void bind_activation_pack(py::module_& module) {
  module.def("activation_pack",
             [](int kind, const py::tuple& u, const py::tuple& packed, const py::object& mvue,
                int backend, int device, Address stream) {
               ActivationPackArgs args;
               args.kind = activation_of(kind);
               args.u = read_const_matrix(u);
               args.E = read_packed_forms(packed, mvue, args);
               const Context context = context_of(backend, device, stream);
               const py::gil_scoped_release unlocked;
               activation_pack(args, context);
             });
  module.def(
      "activation_pack_backward",
      [](int kind, const py::tuple& d_h, const py::tuple& u, const py::tuple& packed,
         const py::object& mvue, Address tile_sums, int backend, int device, Address stream) {
        ActivationPackBackwardArgs args;
        args.kind = activation_of(kind);
        args.d_h = read_const_matrix(d_h);
        args.u = read_const_matrix(u);
        read_packed_forms(packed, mvue, args);
        args.tile_sums = pointer<float>(tile_sums);
        const Context context = context_of(backend, device, stream);
        const py::gil_scoped_release unlocked;
        activation_pack_backward(args, context);
      });
}

void bind_activation(py::module_& module) {
  bind_activation_pack(module);
  module.def("activation_forward",
             [](int kind, int gated, const py::tuple& gate_up, const py::tuple& h,
                const py::object& float8, const py::object& mvue, int backend, int device,
                Address stream) {
               ActivationArgs args;
               args.kind = activation_of(kind);
               args.gated = gated != 0;
               args.gate_up = read_const_matrix(gate_up);
               args.h = read_matrix(h);
               args.float8 = read_float8(float8);
               read_mvue(mvue, args);
               const Context context = context_of(backend, device, stream);
               const py::gil_scoped_release unlocked;
               activation_forward(args, context);
             });
  module.def(
      "activation_backward",
      [](int kind, int gated, const py::tuple& d_h, const py::tuple& gate_up,
         const py::tuple& d_gate_up, const py::object& h, const py::object& float8,
         const py::object& mvue, Address tile_sums, int backend, int device, Address stream) {
        ActivationBackwardArgs args;
        args.kind = activation_of(kind);
        args.gated = gated != 0;
        args.d_h = read_const_matrix(d_h);
        args.gate_up = read_const_matrix(gate_up);
        args.d_gate_up = read_matrix(d_gate_up);
        if (!h.is_none()) args.h = read_matrix(h);
        args.float8 = read_float8(float8);
        read_mvue(mvue, args);
        args.tile_sums = pointer<float>(tile_sums);
        const Context context = context_of(backend, device, stream);
        const py::gil_scoped_release unlocked;
        activation_backward(args, context);
      });
}

}  // namespace sparse24::bindings
