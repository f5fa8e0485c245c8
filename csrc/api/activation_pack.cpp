// activation_pack.cpp: public functions of activation_pack.h: check, then dispatch.
#include "sparse24/activation_pack.h"

#include "api/checks.h"
#include "api/dispatch.h"

#ifdef SPARSE24_WITH_CUDA
#include "fused/fused_cuda.h"
#endif

namespace sparse24 {
namespace {

using namespace api;

/// What both passes ask for; Args: of forward or backward, which are not empty. Normalises u's
/// strides.
template <typename Args>
void check_operands(Args& args, const Context& context) {
  args.u = as_major(args.u, "u");
  check_pointer(args.packed, "packed");
  const bool along_tokens = args.packed_t != nullptr;
  SP24_CHECK((args.seed != nullptr) == along_tokens && (args.E_t != nullptr) == along_tokens,
             "seed, packed_t and E_t must be given together, or none of them");
  const DType packed = args.packed_dtype.value_or(args.u.dtype);
  SP24_CHECK(packed == args.u.dtype || packed == DType::kFloat8E4M3,
             "packed_dtype must be that of u, ", name_of(args.u.dtype), ", or float8_e4m3fn, got ",
             name_of(packed));
  SP24_CHECK((args.scale != nullptr) == is_float8(packed),
             "scale goes with a packed_dtype of float8_e4m3fn, and that with scale, got ",
             name_of(packed));
  if (context.backend == Backend::kCuda) check_gpu_packed_dtype(args.u.dtype, "u");
}

void check_extents_and_kind(const ConstMatrix& u, Activation kind) {
  check_extents(u, "u");
  SP24_CHECK(u.cols % 4 == 0, "u must have columns in multiples of 4, got ", u.cols);
  SP24_CHECK(kind == Activation::kRelu || kind == Activation::kSquaredRelu,
             "kind must be relu or squared_relu, which make zeros, got code ",
             static_cast<int>(kind));
}

}  // namespace

void activation_pack(const ActivationPackArgs& args, const Context& context) {
  check_extents_and_kind(args.u, args.kind);
  if (is_empty(args.u)) return;
  ActivationPackArgs checked = args;
  check_operands(checked, context);
  check_pointer(args.E, "E");
  SP24_DISPATCH(context, activation_pack, checked);
}

void activation_pack_backward(const ActivationPackBackwardArgs& args, const Context& context) {
  check_extents_and_kind(args.u, args.kind);
  check_same_extents(args.d_h, "d_h", args.u, "u");
  check_same_dtype(args.d_h, "d_h", args.u, "u");
  if (is_empty(args.u)) return;
  ActivationPackBackwardArgs checked = args;
  check_operands(checked, context);
  checked.d_h = as_major(args.d_h, "d_h");
  SP24_DISPATCH(context, activation_pack_backward, checked);
}

}  // namespace sparse24
