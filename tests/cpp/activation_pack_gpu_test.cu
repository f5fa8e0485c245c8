// activation_pack_gpu_test.cu: activations pruned to 2:4 and packed on a GPU (fused/activation_pack.cu).
//
//   equal   both packed forms, E, E_t and sums: the bytes of the CPU backend, on all shapes, dtypes,
//           distances of rows and alignments below, special values and any bits too. Guards around
//           buffers survive
//   pairs   every 16-bit value with others: (squared) ReLU and its gradient in pairs
//   --quick, --tight, --bench, --bench-only   as in memory_kernels_gpu_test.cu
//
// One line a failure, a summary at the end; exit status 0, 1 (failures) or 77 (no GPU).
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "activation/relu_pairs.h"
#include "common/check.h"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "cpu/cpu.h"
#include "fused/fused_cuda.h"
#include "memory_kernels_bench.h"
#include "memory_kernels_main.h"
#include "pack/two_of_four.h"
#include "twins.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

constexpr Activation kKinds[] = {Activation::kRelu, Activation::kSquaredRelu};

// ---- whole matrices ---------------------------------------------------------------------------

struct Case {
  int64_t tokens, d_ff;
  DType dtype;
  Activation kind;
  Order order;
  int64_t gap;
  int shift;
  Fill fill;

  std::string text() const {
    return concat("[", tokens, ", ", d_ff, "] ", sparse24::name_of(dtype), " kind ",
                  static_cast<int>(kind), " by ", name_of(order), " gap ", gap, " shift ", shift,
                  " fill ", static_cast<int>(fill));
  }
};

/// Both forms of a pruned matrix, on both sides.
struct TwinForms {
  Twin packed, E, packed_t, E_t, sums, seed;

  explicit TwinForms(const Case& c)
      : packed(c.tokens * c.d_ff, 2 * c.shift),
        E(meta_bytes(c.tokens, c.d_ff), c.shift),
        packed_t(round_up(c.tokens, 8) * c.d_ff, 2 * c.shift),
        E_t(meta_bytes(c.d_ff, round_up(c.tokens, 8)), c.shift),
        sums(tile_sums_bytes(c.tokens, c.d_ff)),
        seed(16) {
    seed.host<int64_t>()[0] = -11, seed.host<int64_t>()[1] = random_source.bits();
    seed.upload();
  }
  void compare(const std::string& what, bool along_tokens) {
    packed.compare(what + " packed");
    if (!along_tokens) return;
    packed_t.compare(what + " packed_t"), E_t.compare(what + " E_t");
  }
};

void test_forward(const Case& c, TwinMatrix& u, bool along_tokens) {
  TwinForms forms(c);
  ActivationPackArgs host, device;
  host.kind = device.kind = c.kind;
  host.u = u.const_host(), device.u = u.const_device();
  host.packed = forms.packed.host<void>(), device.packed = forms.packed.device<void>();
  host.E = forms.E.host(), device.E = forms.E.device();
  if (along_tokens) {
    host.seed = forms.seed.host<int64_t>(), device.seed = forms.seed.device<int64_t>();
    host.packed_t = forms.packed_t.host<void>(), device.packed_t = forms.packed_t.device<void>();
    host.E_t = forms.E_t.host(), device.E_t = forms.E_t.device();
  }
  cpu::activation_pack(host);
  cuda::activation_pack(device, nullptr);
  const std::string what = concat("activation_pack, seed: ", along_tokens, " ", c.text());
  synchronize(what);
  forms.compare(what, along_tokens);
  forms.E.compare(what + " E");
}

void test_backward(const Case& c, TwinMatrix& u, TwinMatrix& d_h, bool along_tokens,
                   bool with_sums) {
  TwinForms forms(c);
  ActivationPackBackwardArgs host, device;
  host.kind = device.kind = c.kind;
  host.u = u.const_host(), device.u = u.const_device();
  host.d_h = d_h.const_host(), device.d_h = d_h.const_device();
  host.packed = forms.packed.host<void>(), device.packed = forms.packed.device<void>();
  if (along_tokens) {
    host.seed = forms.seed.host<int64_t>(), device.seed = forms.seed.device<int64_t>();
    host.packed_t = forms.packed_t.host<void>(), device.packed_t = forms.packed_t.device<void>();
    host.E_t = forms.E_t.host(), device.E_t = forms.E_t.device();
  }
  if (with_sums)
    host.tile_sums = forms.sums.host<float>(), device.tile_sums = forms.sums.device<float>();
  cpu::activation_pack_backward(host);
  cuda::activation_pack_backward(device, nullptr);
  const std::string what = concat("activation_pack_backward, seed: ", along_tokens,
                                  ", sums: ", with_sums, " ", c.text());
  synchronize(what);
  forms.compare(what, along_tokens);
  if (with_sums && c.fill != Fill::kSpecial && c.fill != Fill::kBits)  // NaNs differ in their bits
    forms.sums.compare(what + " sums over tiles");
}

void test_case(const Case& c) {
  TwinMatrix u(c.tokens, c.d_ff, c.dtype, c.order, c.gap, c.shift),
      d_h(c.tokens, c.d_ff, c.dtype, c.order, c.gap, c.shift);
  u.fill(c.fill), d_h.fill(c.fill);
  for (const bool along_tokens : {true, false}) {
    test_forward(c, u, along_tokens);
    for (const bool with_sums : {true, false}) test_backward(c, u, d_h, along_tokens, with_sums);
  }
}

void test_shapes() {
  const Shape shapes[] = {{1, 4},   {3, 12},   {7, 8},    {8, 64},    {9, 72},    {31, 20},
                          {64, 64}, {65, 128}, {72, 136}, {100, 200}, {129, 260}, {264, 72}};
  Turns fills(5);
  for (const Shape s : shapes) {
    for (DType dtype : k16) {
      for (Activation kind : kKinds) {
        for (Fill fill :
             {Fill::kNormal, Fill::kIntegers, Fill::kSpecial, Fill::kBits, Fill::kSparse}) {
          if (!fills.takes(static_cast<int>(fill))) continue;
          test_case({s.rows, s.cols, dtype, kind, Order::kRows, 0, 0, fill});
          test_case({s.rows, s.cols, dtype, kind, Order::kRows, 8, 0, fill});
        }
        test_case({s.rows, s.cols, dtype, kind, Order::kRows, 3, 0, Fill::kNormal});
        test_case({s.rows, s.cols, dtype, kind, Order::kRows, 0, 1, Fill::kSpecial});
        test_case({s.rows, s.cols, dtype, kind, Order::kColumns, 0, 0, Fill::kBits});
      }
    }
  }
  for (Activation kind : kKinds) {
    test_case({2048, 1024, DType::kBFloat16, kind, Order::kRows, 0, 0, Fill::kNormal});
    test_case({1024, 520, DType::kFloat16, kind, Order::kRows, 0, 0, Fill::kBits});
  }
}

void test_nothing() {
  ActivationPackArgs args;
  args.u.dtype = DType::kBFloat16;
  cuda::activation_pack(args, nullptr);
  ActivationPackBackwardArgs backward;
  backward.u.dtype = DType::kBFloat16;
  cuda::activation_pack_backward(backward, nullptr);
  synchronize("empty inputs");
  ++checks;
}

// ---- pairs ------------------------------------------------------------------------------------

/// u takes all 16-bit values, d_h those that `turn` makes of them; results of the pair functions,
/// and of fp32 arithmetic.
template <Activation kKind, typename T>
__global__ void pairs_kernel(uint32_t turn, uint32_t* wrong) {
  const uint32_t low = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t u = low | (low * 40503u + turn) << 16, d_h = u * 2654435761u + turn;
  const uint32_t positive = positive_pair<T>(u);
  const auto check = [&](uint32_t pair, float expected_low, float expected_high) {
    if (pair != make_pair16<T>(expected_low, expected_high)) atomicAdd(wrong, 1u);
  };
  const ValueAndSlope a = activate<kKind, true>(low_value<T>(u)),
                      b = activate<kKind, true>(high_value<T>(u));
  check(relu_pair<kKind, T>(positive), a.value, b.value);
  check(relu_gradient_pair<kKind, T>(d_h, positive), low_value<T>(d_h) * a.slope,
        high_value<T>(d_h) * b.slope);
}

template <Activation kKind, typename T>
void test_pairs_of() {
  Twin wrong(4);
  *wrong.host<uint32_t>() = 0;
  wrong.upload();
  for (uint32_t turn = 0; turn < 256; ++turn)
    pairs_kernel<kKind, T><<<256, 256>>>(turn * 0x01010101u, wrong.device<uint32_t>());
  const std::string what =
      concat("pairs of kind ", static_cast<int>(kKind), " ", sparse24::name_of(kDTypeOf<T>));
  synchronize(what);
  wrong.compare(what);
}

void test_pairs() {
  test_pairs_of<Activation::kRelu, BFloat16>();
  test_pairs_of<Activation::kRelu, Float16>();
  test_pairs_of<Activation::kSquaredRelu, BFloat16>();
  test_pairs_of<Activation::kSquaredRelu, Float16>();
}

// ---- times ------------------------------------------------------------------------------------

/// Operands and results of both passes.
struct BenchForms {
  DeviceMemory u, d_h, packed, E, packed_t, E_t, sums;

  BenchForms(Shape s, DType dtype)
      : u(s.rows * s.cols * 2),
        d_h(s.rows * s.cols * 2),
        packed(s.rows * s.cols),
        E(meta_bytes(s.rows, s.cols)),
        packed_t(s.rows * s.cols),
        E_t(meta_bytes(s.cols, s.rows)),
        sums(tile_sums_bytes(s.rows, s.cols)) {
    u.fill(dtype, s.rows * s.cols), d_h.fill(dtype, s.rows * s.cols);
  }
};

void bench_shape(Shape s, DType dtype, Activation kind) {
  const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols);
  const int sets = sets_for(elements * 6.125);
  std::vector<std::unique_ptr<BenchForms>> forms;
  for (int i = 0; i < sets; ++i) forms.push_back(std::make_unique<BenchForms>(s, dtype));
  DeviceMemory seed(16);
  cudaMemset(seed.as(), 7, 16);
  const auto view = [&](DeviceMemory& m) {
    return ConstMatrix{m.as(), dtype, s.rows, s.cols, s.cols, 1};
  };
  const std::string shape = concat(" ", s.rows, "x", s.cols, " ", sparse24::name_of(dtype),
                                   " kind ", static_cast<int>(kind));
  for (const bool along_tokens : {true, false}) {
    const std::string what = concat(along_tokens ? " both ways" : " along features", shape);
    const double more = along_tokens ? 1.125 : 0.0;
    const auto along = [&](auto& args, BenchForms& f) {
      args.kind = kind, args.u = view(f.u), args.packed = f.packed.as();
      if (!along_tokens) return;
      args.seed = seed.as<int64_t>(), args.packed_t = f.packed_t.as();
      args.E_t = f.E_t.as<uint8_t>();
    };
    report("activation_pack" + what, elements * (3.125 + more), time_us(sets, [&](int i) {
             ActivationPackArgs args;
             along(args, *forms[i]);
             args.E = forms[i]->E.as<uint8_t>();
             cuda::activation_pack(args, nullptr);
           }));
    for (const bool with_sums : {false, true}) {
      report(concat("activation_pack_backward", with_sums ? " with sums" : "", what),
             elements * (5.0 + more), time_us(sets, [&](int i) {
               ActivationPackBackwardArgs args;
               along(args, *forms[i]);
               args.d_h = view(forms[i]->d_h);
               if (with_sums) args.tile_sums = forms[i]->sums.as<float>();
               cuda::activation_pack_backward(args, nullptr);
             }));
    }
  }
}

void run_times() {
  std::printf("what,us,TB/s,of copy\n");
  bench_copy();
  for (const Shape s : {Shape{16384, 16384}, Shape{8192, 11008}})
    for (DType dtype : k16)
      for (Activation kind : kKinds) bench_shape(s, dtype, kind);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, {test_nothing, test_pairs, test_shapes}, run_times);
}
