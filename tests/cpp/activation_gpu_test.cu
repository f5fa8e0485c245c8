// activation_gpu_test.cu: the kernels of activation/ and fused/ on a GPU, with 16- and 32-bit results.
//
//   plain   the bytes of a plain kernel over the same per-element functions, and close to the CPU's,
//           on all shapes, layouts, dtypes and alignments below, special values too
//   fused   the bytes of the two passes it replaces
//   --quick, --tight   as in memory_kernels_gpu_test.cu, which also times these kernels
//
// One line a failure, a summary at the end; exit status 0, 1 (failures) or 77 (no GPU).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "activation/activation_cuda.h"
#include "activation/functions.h"
#include "common/check.h"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "cpu/cpu.h"
#include "fused/fused_cuda.h"
#include "memory_kernels_main.h"
#include "pack/pack_cuda.h"
#include "twins.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

// ---- activations ------------------------------------------------------------------------------

constexpr Activation kKinds[] = {Activation::kSilu,        Activation::kGelu,
                                 Activation::kGeluTanh,    Activation::kRelu,
                                 Activation::kSquaredRelu, Activation::kIdentity};

/// The plain way: one thread an element, any strides.
template <Activation kKind, typename T>
__global__ void reference_kernel(ConstMatrix d_h, ConstMatrix in, Matrix d_in, Matrix h, bool gated,
                                 bool backward) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= h.rows * h.cols) return;
  const int64_t r = index / h.cols, c = index % h.cols;
  const auto at = [&](const auto& m, int64_t col) { return r * m.row_stride + col * m.col_stride; };
  const float gate = to_float(static_cast<const T*>(in.data)[at(in, c)]);
  const float up = gated ? to_float(static_cast<const T*>(in.data)[at(in, c + h.cols)]) : 0.0f;
  const ValueAndSlope act = activate<kKind, sizeof(T) == 2>(gate);
  static_cast<T*>(h.data)[at(h, c)] = from_float<T>(gated ? act.value * up : act.value);
  if (!backward) return;
  const float d = to_float(static_cast<const T*>(d_h.data)[at(d_h, c)]);
  if (gated) {
    const GatedBackward back = gated_backward<kKind, sizeof(T) == 2>(d, gate, up);
    static_cast<T*>(d_in.data)[at(d_in, c)] = from_float<T>(back.d_gate);
    static_cast<T*>(d_in.data)[at(d_in, c + h.cols)] = from_float<T>(back.d_up);
  } else {
    static_cast<T*>(d_in.data)[at(d_in, c)] = from_float<T>(d * act.slope);
  }
}

struct Reference {
  ConstMatrix d_h, in;
  Matrix d_in, h;
  bool gated, backward;

  template <Activation kKind>
  void operator()() const {
    with_type(h.dtype, [this](auto zero) {
      const uint32_t blocks = static_cast<uint32_t>((h.rows * h.cols + 127) / 128);
      reference_kernel<kKind, decltype(zero)><<<blocks, 128>>>(d_h, in, d_in, h, gated, backward);
    });
  }
};

/// Largest error against the CPU, relative to 1 + |value|; infinite where only one is NaN.
float distance(TwinMatrix& got, TwinMatrix& cpu_result, int64_t rows, int64_t cols) {
  float worst = 0.0f;
  const Matrix a = got.host(), b = cpu_result.host();
  with_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const float x = to_float(static_cast<T*>(a.data)[r * a.row_stride + c * a.col_stride]);
        const float y = to_float(static_cast<T*>(b.data)[r * b.row_stride + c * b.col_stride]);
        if (x == y || (std::isnan(x) && std::isnan(y))) continue;
        const float error = std::fabs(x - y) / (1.0f + std::fabs(y));
        worst = std::isnan(error) ? INFINITY : std::max(worst, error);
      }
    }
  });
  return worst;
}

void test_activation_shape(int64_t tokens, int64_t d_ff, DType dtype, Activation kind, bool gated,
                           int orders, int64_t gap, int shift, Fill fill) {
  const int64_t width = gated ? 2 * d_ff : d_ff;
  const Order in_order = kOrders[orders & 1], h_order = kOrders[orders >> 1 & 1];
  const Order dh_order = kOrders[orders >> 2 & 1], din_order = kOrders[orders >> 3 & 1];
  TwinMatrix in(tokens, width, dtype, in_order, gap, shift),
      d_h(tokens, d_ff, dtype, dh_order, gap, shift);
  in.fill(fill), d_h.fill(Fill::kNormal);
  const std::string what = concat("[", tokens, ", ", d_ff, "] ", sparse24::name_of(dtype), " kind ",
                                  static_cast<int>(kind), gated ? " gated" : "", " orders ", orders,
                                  " gap ", gap, " shift ", shift, " fill ", static_cast<int>(fill));

  // Kernels for mixed layouts, and the fused one for all but rows, store by TMA, which initcheck
  // does not see. Poison it sees, and the comparison finds what is left of it.
  const auto initialise = [&](TwinMatrix& result, bool by_copy_engine) {
    if (by_copy_engine) result.twin().upload();
  };
  const bool mixed = orders != 0 && orders != 15, not_by_rows = orders != 0;
  TwinMatrix h(tokens, d_ff, dtype, h_order, gap, shift),
      d_in(tokens, width, dtype, din_order, gap, shift);
  with_activation(kind, Reference{d_h.const_device(), in.const_device(), d_in.device(), h.device(),
                                  gated, true});
  synchronize("reference " + what);
  h.twin().download(), d_in.twin().download();
  {
    TwinMatrix expected(tokens, d_ff, dtype, h_order, gap, shift),
        d_expected(tokens, width, dtype, din_order, gap, shift);
    cpu::activation_forward({kind, gated, in.const_host(), expected.host()});
    ActivationBackwardArgs args;
    args.kind = kind, args.gated = gated, args.d_h = d_h.const_host(),
    args.gate_up = in.const_host();
    args.d_gate_up = d_expected.host();
    cpu::activation_backward(args);
    const float bound = dtype == DType::kFloat32   ? 1e-5f
                        : dtype == DType::kFloat16 ? 2e-3f
                                                   : 1.6e-2f;
    if (fill == Fill::kNormal) {
      expect(distance(h, expected, tokens, d_ff) <= bound,
             "activation_forward close to the CPU " + what);
      expect(distance(d_in, d_expected, tokens, width) <= bound,
             "activation_backward close to the CPU " + what);
    }
  }
  {
    TwinMatrix got(tokens, d_ff, dtype, h_order, gap, shift);
    initialise(got, mixed);
    cuda::activation_forward({kind, gated, in.const_device(), got.device()}, nullptr);
    synchronize(what);
    got.twin().compare_with(h.twin(), "activation_forward " + what);
  }
  for (bool with_h : {false, true}) {
    TwinMatrix got_h(tokens, d_ff, dtype, h_order, gap, shift),
        got(tokens, width, dtype, din_order, gap, shift);
    initialise(got_h, mixed), initialise(got, mixed);
    ActivationBackwardArgs args;
    args.kind = kind, args.gated = gated, args.d_h = d_h.const_device(),
    args.gate_up = in.const_device();
    args.d_gate_up = got.device();
    if (with_h) args.h = got_h.device();
    cuda::activation_backward(args, nullptr);
    synchronize(what);
    got.twin().compare_with(d_in.twin(),
                            concat("activation_backward, with h: ", with_h, " ", what));
    if (with_h) got_h.twin().compare_with(h.twin(), "h of activation_backward " + what);
  }
  if (dtype == DType::kFloat32) return;
  const int64_t padded = round_up(tokens, 8);
  for (bool with_h : {false, true}) {
    TwinMatrix got_h(tokens, d_ff, dtype, h_order, gap, shift),
        got(tokens, width, dtype, din_order, gap, shift);
    initialise(got_h, not_by_rows), initialise(got, not_by_rows);
    Twin packed(padded / 2 * width * 2, 2 * shift), E(meta_bytes(width, padded), shift), seed(16);
    Twin sums(tile_sums_bytes(tokens, width));
    seed.host<int64_t>()[0] = -7, seed.host<int64_t>()[1] = random_source.bits();
    seed.upload();
    // d_in holds on its host what the kernels make of it on the device: prune that on the CPU.
    cpu::mvue_pack({d_in.const_host(), seed.host<int64_t>(), packed.host<void>(), E.host(),
                    sums.host<float>()});
    ActivationBackwardArgs args;
    args.kind = kind, args.gated = gated, args.d_h = d_h.const_device(),
    args.gate_up = in.const_device();
    args.d_gate_up = got.device();
    if (with_h) args.h = got_h.device();
    args.seed = seed.device<int64_t>(), args.packed = packed.device<void>(), args.E = E.device();
    if (with_h) args.tile_sums = sums.device<float>();
    cuda::activation_backward(args, nullptr);
    synchronize(what);
    got.twin().compare_with(d_in.twin(), "fused backward, d_gate_up " + what);
    if (with_h) got_h.twin().compare_with(h.twin(), "fused backward, h " + what);
    packed.compare("fused backward, packed " + what);
    E.compare("fused backward, E " + what);
    if (with_h && fill == Fill::kNormal) sums.compare("fused backward, sums over tiles " + what);
  }
}

/// The gradient of a mean: all tokens share one row of d_h, which the copy engine cannot read.
void test_shared_gradient_rows(bool gated, Order in_order, Order din_order) {
  constexpr int64_t kTokens = 72, kFeatures = 192;
  constexpr DType kType = DType::kBFloat16;
  const int64_t width = gated ? 2 * kFeatures : kFeatures;
  TwinMatrix in(kTokens, width, kType, in_order), row(1, kFeatures, kType, Order::kRows);
  in.fill(Fill::kNormal), row.fill(Fill::kNormal);
  ConstMatrix d_h = row.const_device();
  d_h.rows = kTokens, d_h.row_stride = 0;
  TwinMatrix h(kTokens, kFeatures, kType, Order::kRows), expected(kTokens, width, kType, din_order),
      got(kTokens, width, kType, din_order);
  got.twin().upload();
  Reference{d_h, in.const_device(), expected.device(), h.device(), gated, true}
      .operator()<Activation::kSilu>();
  synchronize("reference with shared rows of d_h");
  expected.twin().download();
  Twin packed(kTokens / 2 * width * 2), E(meta_bytes(width, kTokens)), seed(16);
  seed.host<int64_t>()[0] = 3, seed.host<int64_t>()[1] = 4;
  seed.upload();
  cpu::mvue_pack({expected.const_host(), seed.host<int64_t>(), packed.host<void>(), E.host()});
  ActivationBackwardArgs args;
  args.gated = gated, args.d_h = d_h, args.gate_up = in.const_device();
  args.d_gate_up = got.device();
  args.seed = seed.device<int64_t>(), args.packed = packed.device<void>(), args.E = E.device();
  cuda::activation_backward(args, nullptr);
  const std::string what = concat("shared rows of d_h, ", gated ? "gated, " : "", "gate_up by ",
                                  name_of(in_order), ", d_gate_up by ", name_of(din_order));
  synchronize(what);
  got.twin().compare_with(expected.twin(), "fused backward, d_gate_up, " + what);
  packed.compare("fused backward, packed, " + what);
  E.compare("fused backward, E, " + what);
}

void test_activations() {
  const Shape shapes[] = {{1, 1},    {1, 64},  {3, 12},   {8, 8},     {7, 64},
                          {31, 128}, {72, 72}, {64, 192}, {136, 320}, {200, 128}};
  int turn = 0;
  Turns some_orders(8);
  for (const Shape s : shapes) {
    for (DType dtype : kDTypes) {
      for (bool gated : {true, false}) {
        for (int orders = 0; orders < 16; ++orders) {
          if (!some_orders.takes(orders % 8)) continue;
          const Activation kind = kKinds[turn++ % 5];
          test_activation_shape(s.rows, s.cols, dtype, kind, gated, orders, 0, 0, Fill::kNormal);
          if (orders % 5 != 0) continue;
          test_activation_shape(s.rows, s.cols, dtype, kind, gated, orders, 8, 0, Fill::kSpecial);
          test_activation_shape(s.rows, s.cols, dtype, kind, gated, orders, 3, 0, Fill::kSparse);
          test_activation_shape(s.rows, s.cols, dtype, kind, gated, orders, 0, 1, Fill::kBits);
        }
      }
    }
  }
  // Tiles of 64 x 128 and 128 x 128: one patch, whole tiles, a patch more or less.
  const Shape tails[] = {{8, 64},   {56, 128},  {64, 128},  {72, 256},
                         {128, 64}, {120, 192}, {264, 128}, {64, 136}};
  for (const Shape s : tails) {
    for (bool gated : {true, false}) {
      for (int orders = 0; orders < 16; ++orders) {
        if (!some_orders.takes(orders % 8)) continue;
        const int n = turn++;
        test_activation_shape(s.rows, s.cols, k16[n % 2], kKinds[n % 6], gated, orders,
                              orders % 3 == 0 ? 8 : 0, 0, Fill::kNormal);
      }
    }
  }
  for (bool gated : {true, false})
    for (Order in_order : kOrders)
      for (Order din_order : kOrders) test_shared_gradient_rows(gated, in_order, din_order);
  for (Activation kind : kKinds)
    for (int orders : {0, 15, 1, 14, 6, 3, 9, 12})
      if (!quick || kind == Activation::kSilu)
        test_activation_shape(520, 1344, DType::kBFloat16, kind, true, orders, 0, 0, Fill::kNormal);
}

}  // namespace

int main(int argc, char** argv) { return run_program(argc, argv, {test_activations}); }
