// activation.cpp: public functions of activation.h: check, then dispatch.
#include "sparse24/activation.h"

#include "api/checks.h"
#include "api/dispatch.h"

#ifdef SPARSE24_WITH_CUDA
#include "activation/activation_cuda.h"
#include "fused/fused_cuda.h"
#endif

namespace sparse24 {
namespace {

using namespace api;

/// in: gate_up or its gradient; out: h or its gradient. Normalises their strides. `may_be_absent`:
/// a result without memory is not written.
template <typename In, typename Out>
void check_activation(bool gated, MatrixView<In>& in, const char* in_name, MatrixView<Out>& out,
                      const char* out_name, bool may_be_absent = false) {
  const int64_t factor = gated ? 2 : 1;
  check_extents(in, in_name);
  SP24_CHECK(in.rows == out.rows && in.cols == factor * out.cols, in_name, " must be [", out.rows,
             ", ", factor * out.cols, "] for ", gated ? "gated" : "plain", " ", out_name, " of [",
             out.rows, ", ", out.cols, "], got [", in.rows, ", ", in.cols, "]");
  check_same_dtype(in, in_name, out, out_name);
  if (is_empty(in)) return;
  if (in.data != nullptr || !may_be_absent) in = as_major(in, in_name);
  if (out.data != nullptr || !may_be_absent) out = as_major(out, out_name);
}

}  // namespace

void activation_forward(const ActivationArgs& args, const Context& context) {
  ActivationArgs checked = args;
  const bool others = args.packed != nullptr || writes_float8(args.float8);
  check_activation(args.gated, checked.gate_up, "gate_up", checked.h, "h", others);
  if (is_empty(args.h)) return;
  check_pointer(args.gate_up.data, "gate_up");
  if (args.packed != nullptr) check_mvue(args, args.h.dtype, context, "h");
  check_float8(args.float8, args.h.rows, args.h.cols);
  if (others) {
    SP24_DISPATCH(context, activation_forward_outputs, checked);
  } else {
    SP24_DISPATCH(context, activation_forward, checked);
  }
}

void activation_backward(const ActivationBackwardArgs& args, const Context& context) {
  ActivationBackwardArgs checked = args;
  check_activation(args.gated, checked.gate_up, "gate_up", checked.d_h, "d_h");
  const bool others = args.packed != nullptr || writes_float8(args.float8);
  check_activation(args.gated, checked.d_gate_up, "d_gate_up", checked.d_h, "d_h", others);
  if (is_empty(args.d_h)) return;
  if (args.h.data != nullptr) {
    check_same_extents(args.h, "h", args.d_h, "d_h");
    check_same_dtype(args.h, "h", args.d_h, "d_h");
    checked.h = as_major(args.h, "h");
  }
  SP24_CHECK((args.packed == nullptr) == (args.E == nullptr),
             "packed and E must be given together, or neither");
  SP24_CHECK(args.tile_sums == nullptr || args.packed != nullptr,
             "tile_sums are made while packing: give packed and E too, or no tile_sums");
  check_pointer(args.d_h.data, "d_h");
  if (args.packed != nullptr) check_mvue(args, args.d_h.dtype, context, "d_h");
  check_float8(args.float8, args.gate_up.rows, args.gate_up.cols);
  SP24_DISPATCH(context, activation_backward, checked);
}

}  // namespace sparse24
