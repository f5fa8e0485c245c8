// quantize.cpp: the public function of quantize.h: check, then dispatch.
#include "sparse24/quantize.h"

#include "api/checks.h"
#include "api/dispatch.h"

#ifdef SPARSE24_WITH_CUDA
#include "pack/pack_cuda.h"
#endif

namespace sparse24 {

using namespace api;

void quantize(const QuantizeArgs& args, const Context& context) {
  check_extents(args.x, "x");
  SP24_CHECK(writes_float8(args.to) || args.own_scale != nullptr,
             "quantize must be asked for x8, x8_t, amax or own_scale, got none");
  SP24_CHECK(args.own_scale == nullptr || args.to.scale == nullptr,
             "own_scale is found here, and scale is known beforehand: give one of them");
  if (is_empty(args.x)) return;
  QuantizeArgs checked = args;
  checked.x = as_major(args.x, "x");
  check_float8(args.to, args.x.rows, args.x.cols);
  SP24_DISPATCH(context, quantize, checked);
}

}  // namespace sparse24
