// float8.cpp: packing to and casts in 8 bits: quantize.h, and what pack.h and activation.h have
// besides 16-bit results.
//
// Beside matrices (arguments.h), float8 outputs and packed operands travel as tuples:
//
//   float8   (x8, x8_ld, x8_t, x8_t_ld, scale, amax, counters), all addresses may be 0; None: none
//   mvue     (seed, packed, packed_dtype, E, scale); None: not packed
//   packed   (packed, packed_dtype, E, scale)
//
//   metadata_bytes_for(dtype, m, k), padded_tokens_for(dtype, tokens)
//   pack_by_mask_float8, search_and_pack_float8(items, backend, device, stream): items as those of
//       pack_by_mask with three fields more: scale, amax, counters
//   unpack_float8(packed, transposed, out, backend, device, stream): out a matrix
//   quantize(x, float8, backend, device, stream): x a matrix; without x8 and x8_t amax alone
//   mvue_pack_outputs(dy, mvue, float8, tile_sums, backend, device, stream)
//   activation_forward_outputs(kind, gated, gate_up, h, float8, mvue, backend, device, stream): h a
//       matrix whose address may be 0
//   activation_backward_outputs(kind, gated, d_h, gate_up, d_gate_up, h, float8, mvue, tile_sums,
//       backend, device, stream): d_gate_up a matrix whose address may be 0; h a matrix or None
//   count_bad_metadata_for(E, dtype, m, k, bad, backend, device, stream)
#include "bindings/arguments.h"

namespace sparse24::bindings {
namespace {

Float8Output read_float8(const py::handle& item) {
  Float8Output to;
  if (item.is_none()) return to;
  Fields fields(item, 7);
  to.x8 = fields.next_pointer<void>();
  to.x8_ld = fields.next<int64_t>();
  to.x8_t = fields.next_pointer<void>();
  to.x8_t_ld = fields.next<int64_t>();
  to.scale = fields.next_pointer<const float>();
  to.amax = fields.next_pointer<float>();
  to.counters = fields.next_pointer<int64_t>();
  return to;
}

/// Args: of mvue_pack or of an activation pass.
template <typename Args>
void read_mvue(const py::handle& item, Args& args) {
  if (item.is_none()) return;
  Fields fields(item, 5);
  args.seed = fields.next_pointer<const int64_t>();
  args.packed = fields.next_pointer<void>();
  args.packed_dtype = fields.next_dtype();
  args.E = fields.next_pointer<uint8_t>();
  args.scale = fields.next_pointer<const float>();
}

PackArgs read_pack_float8(Fields& item) {
  PackArgs args = read_pack(item);
  args.scale = item.next_pointer<const float>();
  args.amax = item.next_pointer<float>();
  args.counters = item.next_pointer<int64_t>();
  return args;
}

void bind_float8_packing(py::module_& module) {
  module.def("metadata_bytes_for",
             [](int dtype, int64_t m, int64_t k) { return metadata_bytes(dtype_of(dtype), m, k); });
  module.def("padded_tokens_for",
             [](int dtype, int64_t tokens) { return padded_tokens(dtype_of(dtype), tokens); });
  def_multi<PackArgs>(module, "pack_by_mask_float8", 15, read_pack_float8, pack_by_mask);
  def_multi<PackArgs>(module, "search_and_pack_float8", 15, read_pack_float8, search_and_pack);
  module.def("unpack_float8", [](const py::tuple& packed, int transposed, const py::tuple& out,
                                 int backend, int device, Address stream) {
    UnpackArgs args;
    Fields fields(packed, 4);
    args.packed = fields.next_pointer<const void>();
    args.packed_dtype = fields.next_dtype();
    args.E = fields.next_pointer<const uint8_t>();
    args.scale = fields.next_pointer<const float>();
    args.transposed = transposed != 0;
    args.out = read_matrix(out);
    const Context context = context_of(backend, device, stream);
    const py::gil_scoped_release unlocked;
    unpack(args, context);
  });
  module.def("count_bad_metadata_for", [](Address E, int dtype, int64_t m, int64_t k, Address bad,
                                          int backend, int device, Address stream) {
    count_bad_metadata(dtype_of(dtype), pointer<const uint8_t>(E), m, k, pointer<int64_t>(bad),
                       context_of(backend, device, stream));
  });
}

void bind_float8_passes(py::module_& module) {
  module.def("quantize", [](const py::tuple& x, const py::tuple& float8, int backend, int device,
                            Address stream) {
    const QuantizeArgs args = {read_const_matrix(x), read_float8(float8)};
    const Context context = context_of(backend, device, stream);
    const py::gil_scoped_release unlocked;
    quantize(args, context);
  });
  module.def("mvue_pack_outputs",
             [](const py::tuple& dy, const py::tuple& mvue, const py::object& float8,
                Address tile_sums, int backend, int device, Address stream) {
               MvueArgs args;
               args.dy = read_const_matrix(dy);
               read_mvue(mvue, args);
               args.float8 = read_float8(float8);
               args.tile_sums = pointer<float>(tile_sums);
               const Context context = context_of(backend, device, stream);
               const py::gil_scoped_release unlocked;
               mvue_pack(args, context);
             });
  module.def("activation_forward_outputs",
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
      "activation_backward_outputs",
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

}  // namespace

void bind_float8(py::module_& module) {
  bind_float8_packing(module);
  bind_float8_passes(module);
}

}  // namespace sparse24::bindings
