// pack.cpp: masks, packing and MVUE: pack.h.
#include "bindings/arguments.h"

namespace sparse24::bindings {

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
  return args;
}

void bind_pack(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("metadata_bytes", [](int64_t m, int64_t k) { return metadata_bytes(m, k); });
  module.def("padded_tokens", [](int64_t tokens) { return padded_tokens(tokens); });
  def_multi<PackArgs>(module, "search_mask", 12, read_pack, search_mask);
  def_multi<PackArgs>(module, "pack_by_mask", 12, read_pack, pack_by_mask);
  def_multi<PackArgs>(module, "search_and_pack", 12, read_pack, search_and_pack);

  module.def("mvue_pack", [](const py::tuple& dy, Address seed, Address packed, Address E,
                             Address tile_sums, int backend, int device, Address stream) {
    MvueArgs args;
    args.dy = read_const_matrix(dy);
    args.seed = pointer<const int64_t>(seed);
    args.packed = pointer<void>(packed);
    args.E = pointer<uint8_t>(E);
    args.tile_sums = pointer<float>(tile_sums);
    const Context context = context_of(backend, device, stream);
    const py::gil_scoped_release unlocked;
    mvue_pack(args, context);
  });

  module.def("unpack", [](Address packed, Address E, int transposed, const py::tuple& out,
                          int backend, int device, Address stream) {
    UnpackArgs args;
    args.packed = pointer<const void>(packed);
    args.E = pointer<const uint8_t>(E);
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
