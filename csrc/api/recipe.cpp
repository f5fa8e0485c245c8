// recipe.cpp: public functions of recipe.h: check, then dispatch.
#include "sparse24/recipe.h"

#include "api/checks.h"
#include "api/dispatch.h"

#ifdef SPARSE24_WITH_CUDA
#include "mask/mask_cuda.h"
#endif

namespace sparse24 {

using namespace api;

void masked_decay(const MaskedDecayArgs* tensors, int count, const Context& context) {
  check_extent(count, "count");
  for (int i = 0; i < count; ++i) {
    const MaskedDecayArgs& args = tensors[i];
    check_extents(args.grad, "grad");
    check_blocks(args.grad, "grad");
    check_same_extents(args.grad, "grad", args.w, "w");
    if (is_empty(args.grad)) continue;
    check_major(args.grad, "grad");
    check_major(args.w, "w");
    check_pointer(args.mask, "mask");
  }
  SP24_DISPATCH(context, masked_decay, tensors, count);
}

void mask_flips(const MaskFlipsArgs* tensors, int count, const Context& context) {
  check_extent(count, "count");
  for (int i = 0; i < count; ++i) {
    const MaskFlipsArgs& args = tensors[i];
    check_extent(args.blocks, "blocks");
    check_pointer(args.flips, "flips");
    if (args.blocks == 0) continue;
    check_pointer(args.mask_a, "mask_a");
    check_pointer(args.mask_b, "mask_b");
  }
  SP24_DISPATCH(context, mask_flips, tensors, count);
}

void mask_gap(const ConstMatrix& w, float* gap, const Context& context) {
  check_extents(w, "w");
  check_blocks(w, "w");
  if (is_empty(w)) return;
  check_major(w, "w");
  check_pointer(gap, "gap");
  SP24_DISPATCH(context, mask_gap, w, gap);
}

}  // namespace sparse24
