// activation_pack_gpu_test.cu: activations pruned to 2:4 and packed on a GPU (fused/activation_pack.cu,
// and to e4m3 activation_pack8.cu).
//
//   equal   both packed forms, E, E_t, scales and sums: the bytes of the CPU backend, on all shapes, dtypes,
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
#include "common/format.h"
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
  bool float8 = false;

  DType packed_dtype() const { return float8 ? DType::kFloat8E4M3 : dtype; }
  std::string text() const {
    return concat("[", tokens, ", ", d_ff, "] ", sparse24::name_of(dtype), " kind ",
                  static_cast<int>(kind), " by ", name_of(order), " gap ", gap, " shift ", shift,
                  " fill ", static_cast<int>(fill), float8 ? " to e4m3" : "");
  }
};

/// Both forms of a pruned matrix, on both sides.
struct TwinForms {
  int64_t bytes, padded;
  Twin packed, E, packed_t, E_t, sums, seed, scale;

  explicit TwinForms(const Case& c)
      : bytes(bytes_of(c.packed_dtype())),
        padded(padded_tokens_for(c.packed_dtype(), c.tokens)),
        packed(c.tokens * c.d_ff / 2 * bytes, static_cast<int>(bytes) * c.shift),
        E(meta_bytes_for(c.packed_dtype(), c.tokens, c.d_ff), c.shift),
        packed_t(padded / 2 * c.d_ff * bytes, static_cast<int>(bytes) * c.shift),
        E_t(meta_bytes_for(c.packed_dtype(), c.d_ff, padded), c.shift),
        sums(tile_sums_bytes(c.tokens, c.d_ff)),
        seed(16),
        scale(4) {
    seed.host<int64_t>()[0] = -11, seed.host<int64_t>()[1] = random_source.bits();
    seed.upload();
  }
  /// Args: of either pass.
  template <typename Args>
  void give(const Case& c, bool along_tokens, Args& host, Args& device) {
    host.kind = device.kind = c.kind;
    host.packed = packed.host<void>(), device.packed = packed.device<void>();
    if (c.float8) {
      host.packed_dtype = device.packed_dtype = c.packed_dtype();
      host.scale = scale.host<float>(), device.scale = scale.device<float>();
    }
    if (!along_tokens) return;
    host.seed = seed.host<int64_t>(), device.seed = seed.device<int64_t>();
    host.packed_t = packed_t.host<void>(), device.packed_t = packed_t.device<void>();
    host.E_t = E_t.host(), device.E_t = E_t.device();
  }
  void compare(const std::string& what, const Case& c, bool along_tokens) {
    packed.compare(what + " packed");
    if (c.float8) scale.compare(what + " scale");
    if (!along_tokens) return;
    packed_t.compare(what + " packed_t"), E_t.compare(what + " E_t");
  }
};

void test_forward(const Case& c, TwinMatrix& u, bool along_tokens) {
  TwinForms forms(c);
  ActivationPackArgs host, device;
  forms.give(c, along_tokens, host, device);
  host.u = u.const_host(), device.u = u.const_device();
  host.E = forms.E.host(), device.E = forms.E.device();
  cpu::activation_pack(host);
  cuda::activation_pack(device, nullptr);
  const std::string what = concat("activation_pack, seed: ", along_tokens, " ", c.text());
  synchronize(what);
  forms.compare(what, c, along_tokens);
  forms.E.compare(what + " E");
}

void test_backward(const Case& c, TwinMatrix& u, TwinMatrix& d_h, bool along_tokens,
                   bool with_sums) {
  TwinForms forms(c);
  ActivationPackBackwardArgs host, device;
  forms.give(c, along_tokens, host, device);
  host.u = u.const_host(), device.u = u.const_device();
  host.d_h = d_h.const_host(), device.d_h = d_h.const_device();
  if (with_sums)
    host.tile_sums = forms.sums.host<float>(), device.tile_sums = forms.sums.device<float>();
  cpu::activation_pack_backward(host);
  cuda::activation_pack_backward(device, nullptr);
  const std::string what = concat("activation_pack_backward, seed: ", along_tokens,
                                  ", sums: ", with_sums, " ", c.text());
  synchronize(what);
  forms.compare(what, c, along_tokens);
  if (with_sums && c.fill != Fill::kSpecial && c.fill != Fill::kBits)  // NaNs differ in their bits
    forms.sums.compare(what + " sums over tiles");
}

void test_format(const Case& c) {
  TwinMatrix u(c.tokens, c.d_ff, c.dtype, c.order, c.gap, c.shift),
      d_h(c.tokens, c.d_ff, c.dtype, c.order, c.gap, c.shift);
  u.fill(c.fill), d_h.fill(c.fill);
  for (const bool along_tokens : {true, false}) {
    test_forward(c, u, along_tokens);
    for (const bool with_sums : {true, false}) test_backward(c, u, d_h, along_tokens, with_sums);
  }
}

void test_case(Case c) {
  for (const bool float8 : {false, true}) {
    c.float8 = float8;
    test_format(c);
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
  DeviceMemory u, d_h, packed, E, packed_t, E_t, sums, scale;

  BenchForms(Shape s, DType dtype)
      : u(s.rows * s.cols * 2),
        d_h(s.rows * s.cols * 2),
        packed(s.rows * s.cols),
        E(meta_bytes(s.rows, s.cols)),
        packed_t(s.rows * s.cols),
        E_t(meta_bytes(s.cols, s.rows)),
        sums(tile_sums_bytes(s.rows, s.cols)),
        scale(4) {
    u.fill(dtype, s.rows * s.cols), d_h.fill(dtype, s.rows * s.cols);
  }
};

void bench_shape(Shape s, DType dtype, Activation kind, bool float8) {
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
                                   " kind ", static_cast<int>(kind), float8 ? " to e4m3" : "");
  for (const bool along_tokens : {true, false}) {
    const std::string what = concat(along_tokens ? " both ways" : " along features", shape);
    const double more = !along_tokens ? 0.0 : float8 ? 0.625 : 1.125;
    const double forward = float8 ? 4.625 : 3.125, backward = float8 ? 8.5 : 5.0;
    const auto along = [&](auto& args, BenchForms& f) {
      args.kind = kind, args.u = view(f.u), args.packed = f.packed.as();
      if (float8) args.packed_dtype = DType::kFloat8E4M3, args.scale = f.scale.as<float>();
      if (!along_tokens) return;
      args.seed = seed.as<int64_t>(), args.packed_t = f.packed_t.as();
      args.E_t = f.E_t.as<uint8_t>();
    };
    report("activation_pack" + what, elements * (forward + more), time_us(sets, [&](int i) {
             ActivationPackArgs args;
             along(args, *forms[i]);
             args.E = forms[i]->E.as<uint8_t>();
             cuda::activation_pack(args, nullptr);
           }));
    for (const bool with_sums : {false, true}) {
      report(concat("activation_pack_backward", with_sums ? " with sums" : "", what),
             elements * (backward + more), time_us(sets, [&](int i) {
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
      for (Activation kind : kKinds)
        for (const bool float8 : {false, true}) bench_shape(s, dtype, kind, float8);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(argc, argv, {test_nothing, test_pairs, test_shapes}, run_times);
}
