// pack.cpp: masks, packing, MVUE and casts to 8 bits: pack.h, quantize.h.
//
//   search_mask, pack_by_mask, search_and_pack(items, backend, device, stream): items are the fields
//       of w as a matrix, mask, out_dtype, packed, E, packed_t, E_t, scale, amax
//   mvue_pack(dy, mvue, float8, tile_sums, backend, device, stream): dy a matrix
//   quantize(x, float8, own_scale, backend, device, stream): x a matrix; without x8 and x8_t amax alone
//   unpack(packed, transposed, out, backend, device, stream): packed (packed, packed_dtype, E,
//       scale), out a matrix
#include "bindings/arguments.h"

namespace sparse24::bindings {
namespace {

PackArgs read_pack(Fields& item) {
  PackArgs args;
  args.w.data = item.next_pointer<const void>();
  args.w.dtype = item.next_dtype();
  args.w.rows = item.next<int64_t>();
  args.w.cols = item.next<int64_t>();
  args.w.row_stride = item.next<int64_t>();
  args.w.col_stride = item.next<int64_t>();
  args.mask = item.next_pointer<uint16_t>();
  args.out_dtype = item.next_dtype();
  args.packed = item.next_pointer<void>();
  args.E = item.next_pointer<uint8_t>();
  args.packed_t = item.next_pointer<void>();
  args.E_t = item.next_pointer<uint8_t>();
  args.scale = item.next_pointer<const float>();
  args.amax = item.next_pointer<float>();
  return args;
}

}  // namespace

void bind_pack(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  def_multi<PackArgs>(module, "search_mask", 14, read_pack, search_mask);
  def_multi<PackArgs>(module, "pack_by_mask", 14, read_pack, pack_by_mask);
  def_multi<PackArgs>(module, "search_and_pack", 14, read_pack, search_and_pack);

  module.def("mvue_pack", [](const py::tuple& dy, const py::tuple& mvue, const py::object& float8,
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

  module.def("quantize", [](const py::tuple& x, const py::tuple& float8, Address own_scale,
                            int backend, int device, Address stream) {
    const QuantizeArgs args = {read_const_matrix(x), read_float8(float8),
                               pointer<float>(own_scale)};
    const Context context = context_of(backend, device, stream);
    const py::gil_scoped_release unlocked;
    quantize(args, context);
  });

  module.def("unpack", [](const py::tuple& packed, int transposed, const py::tuple& out,
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

  module.def(
      "unpack_mask",
      [](Address mask, Address out, int64_t rows, int64_t cols, int backend, int device,
         Address stream) {
        unpack_mask(pointer<const uint16_t>(mask), pointer<uint8_t>(out), rows, cols,
                    context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "count_bad_blocks",
      [](Address mask, int64_t blocks, Address bad, int backend, int device, Address stream) {
        count_bad_blocks(pointer<const uint16_t>(mask), blocks, pointer<int64_t>(bad),
                         context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "count_bad_metadata",
      [](Address E, int64_t m, int64_t k, Address bad, int backend, int device, Address stream) {
        count_bad_metadata(pointer<const uint8_t>(E), m, k, pointer<int64_t>(bad),
                           context_of(backend, device, stream));
      },
      Unlocked());
}

}  // namespace sparse24::bindings
