// recipe.cpp: masked decay and the metrics of masks: recipe.h.
#include "bindings/arguments.h"

namespace sparse24::bindings {
namespace {

MaskedDecayArgs read_masked_decay(Fields& item) {
  MaskedDecayArgs args;
  args.grad.data = item.next_pointer<void>();
  args.grad.dtype = item.next_dtype();
  args.grad.rows = args.w.rows = item.next<int64_t>();
  args.grad.cols = args.w.cols = item.next<int64_t>();
  args.grad.row_stride = item.next<int64_t>();
  args.grad.col_stride = item.next<int64_t>();
  args.w.data = item.next_pointer<const void>();
  args.w.dtype = item.next_dtype();
  args.w.row_stride = item.next<int64_t>();
  args.w.col_stride = item.next<int64_t>();
  args.mask = item.next_pointer<const uint16_t>();
  args.decay = item.next<float>();
  args.grad_scale = item.next_pointer<const float>();
  return args;
}

MaskFlipsArgs read_mask_flips(Fields& item) {
  MaskFlipsArgs args;
  args.mask_a = item.next_pointer<const uint16_t>();
  args.mask_b = item.next_pointer<const uint16_t>();
  args.blocks = item.next<int64_t>();
  args.flips = item.next_pointer<int64_t>();
  return args;
}

}  // namespace

void bind_recipe(py::module_& module) {
  def_multi<MaskedDecayArgs>(module, "masked_decay", 13, read_masked_decay, masked_decay);
  def_multi<MaskFlipsArgs>(module, "mask_flips", 4, read_mask_flips, mask_flips);
  module.def("mask_gap",
             [](const py::tuple& w, Address gap, int backend, int device, Address stream) {
               const ConstMatrix weight = read_const_matrix(w);
               const Context context = context_of(backend, device, stream);
               const py::gil_scoped_release unlocked;
               mask_gap(weight, pointer<float>(gap), context);
             });
}

}  // namespace sparse24::bindings
