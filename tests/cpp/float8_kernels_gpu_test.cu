// float8_kernels_gpu_test.cu: everything in 8 bits on a GPU: conversions, packing, casts, MVUE,
// activation passes; the bytes of the CPU backend, poison around all outputs (twins.h).
//
//   --quick, --tight   as in memory_kernels_gpu_test.cu
//   --bench            besides, times layers of Llama and GPT-2 as CSV, next to a copy
//
// Activations differ from the CPU's in their last bits: there the passes are compared with what the
// plain kernel's result becomes on the CPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "activation/activation_cuda.h"
#include "common/check.h"
#include "common/cuda_check.h"
#include "common/float8.h"
#include "common/format.h"
#include "cpu/cpu.h"
#include "float8_bench.h"
#include "fused/fused_cuda.h"
#include "mask/mask_cuda.h"
#include "memory_kernels_main.h"
#include "pack/pack_cuda.h"
#include "twins.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

constexpr DType k8[] = {DType::kFloat8E4M3, DType::kFloat8E5M2};

// ---- conversions ------------------------------------------------------------------------------

struct Converted {
  uint8_t nearest, nearest_scaled, random;
};

template <typename F>
SP24_HD Converted convert_all_ways(uint32_t bits) {
  const float x = bits_float(bits);
  return {from_float<F>(x).bits, to_float8<F>(x, 0x1p-3f).bits,
          to_float8_random<F>(x, 0x1p5f, bits * 2654435761u >> 16).bits};
}

template <typename F>
__global__ void convert_kernel(uint32_t first, uint32_t step, Converted* out, uint32_t count) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = convert_all_ways<F>(first + i * step);
}

/// fp32 numbers all over the range, those of bf16 among them.
template <typename F>
void test_conversions(const char* name) {
  constexpr uint32_t kCount = 1 << 20;
  for (uint32_t first : {0u, 0x7FFu, 0xFFFu, 0x0ABCDu}) {
    Twin out(kCount * sizeof(Converted));
    for (uint32_t i = 0; i < kCount; ++i)
      out.host<Converted>()[i] = convert_all_ways<F>(first + i * 4096u);
    convert_kernel<F><<<kCount / 256, 256>>>(first, 4096u, out.device<Converted>(), kCount);
    synchronize(name);
    out.compare(concat("conversions to ", name, " from ", first));
  }
}

template <typename F>
__global__ void widen_kernel(float* out) {
  out[threadIdx.x] = to_float(F{static_cast<uint8_t>(threadIdx.x)});
}
template <typename F>
void test_widening(const char* name) {
  Twin out(1024);
  for (int i = 0; i < 256; ++i) out.host<float>()[i] = to_float(F{static_cast<uint8_t>(i)});
  widen_kernel<F><<<1, 256>>>(out.device<float>());
  synchronize(name);
  out.compare(concat("all codes of ", name));
}

// ---- shared outputs ---------------------------------------------------------------------------

/// scale, amax and counters on both sides.
struct Statistics {
  Twin scale{4}, amax{4}, counters{16};

  explicit Statistics(float s) {
    *scale.host<float>() = s, *amax.host<float>() = 0.0f;
    counters.host<int64_t>()[0] = 3, counters.host<int64_t>()[1] = 4;
    scale.upload(), amax.upload(), counters.upload();
  }
  void compare(const std::string& what) {
    amax.compare(what + " amax"), counters.compare(what + " counters");
  }
};

/// e4m3 copies of [rows, cols] on both sides.
struct TwinFloat8 {
  int64_t ld, ld_t;
  Twin x8, x8_t;
  Statistics statistics;
  bool counts;

  TwinFloat8(int64_t rows, int64_t cols, float scale, int64_t gap = 0, int shift = 0,
             bool with_counts = true)
      : ld(cols + gap),
        ld_t(round_up(rows, 32) + gap),
        x8(rows * ld, shift),
        x8_t(cols * ld_t, shift),
        statistics(scale),
        counts(with_counts) {
    if (gap > 0) x8.upload(), x8_t.upload();
  }
  Float8Output output(bool device) {
    Statistics& s = statistics;
    return {device ? x8.device<void>() : x8.host<void>(),
            ld,
            device ? x8_t.device<void>() : x8_t.host<void>(),
            ld_t,
            device ? s.scale.device<float>() : s.scale.host<float>(),
            device ? s.amax.device<float>() : s.amax.host<float>(),
            !counts  ? nullptr
            : device ? s.counters.device<int64_t>()
                     : s.counters.host<int64_t>()};
  }
  void compare(const std::string& what) {
    x8.compare(what + " x8"), x8_t.compare(what + " x8_t"), statistics.compare(what);
  }
};

// ---- packing ----------------------------------------------------------------------------------

struct TwinWeight8 {
  TwinMatrix w;
  Twin mask, packed, E, packed_t, E_t;
  Statistics statistics{0x1p-5f};
  DType out;

  TwinWeight8(Shape s, DType in, DType to, Order order, int64_t gap, int shift)
      : w(s.rows, s.cols, in, order, gap, shift),
        mask(s.rows / 4 * (s.cols / 4) * 2, 2 * shift),
        packed(s.rows * s.cols / 2, shift),
        E(meta8_bytes(s.rows, s.cols), shift),
        packed_t(s.rows * s.cols / 2, shift),
        E_t(meta8_bytes(s.cols, s.rows), shift),
        out(to) {}

  PackArgs args(bool device) {
    PackArgs a;
    a.w = device ? w.const_device() : w.const_host();
    a.mask = device ? mask.device<uint16_t>() : mask.host<uint16_t>();
    a.out_dtype = out;
    a.packed = device ? packed.device<void>() : packed.host<void>();
    a.E = device ? E.device() : E.host();
    a.packed_t = device ? packed_t.device<void>() : packed_t.host<void>();
    a.E_t = device ? E_t.device() : E_t.host();
    a.scale = device ? statistics.scale.device<float>() : statistics.scale.host<float>();
    a.amax = device ? statistics.amax.device<float>() : statistics.amax.host<float>();
    a.counters =
        device ? statistics.counters.device<int64_t>() : statistics.counters.host<int64_t>();
    return a;
  }
  void compare(const std::string& what) {
    mask.compare(what + " mask"), w.twin().compare(what + " w");
    packed.compare(what + " packed"), E.compare(what + " E");
    packed_t.compare(what + " packed_t"), E_t.compare(what + " E_t");
    statistics.compare(what);
  }
};

void test_pack(Shape s, DType in, DType out, Order order, int64_t gap, int shift, Fill fill) {
  const std::string what = concat("[", s.rows, ", ", s.cols, "] ", sparse24::name_of(in), "->",
                                  sparse24::name_of(out), " by ", name_of(order), " gap ", gap,
                                  " shift ", shift, " fill ", static_cast<int>(fill));
  TwinWeight8 t(s, in, out, order, gap, shift);
  t.w.fill(fill);
  PackArgs host = t.args(false), device = t.args(true);
  cpu::search_and_pack(&host, 1);
  cuda::search_and_pack(&device, 1, nullptr);
  synchronize(what);
  t.compare("search_and_pack " + what);
  t.w.fill(Fill::kBits);  // other values: positions must come from the mask
  cpu::pack_by_mask(&host, 1);
  cuda::pack_by_mask(&device, 1, nullptr);
  synchronize(what);
  t.compare("pack_by_mask " + what);
  host.packed = device.packed = nullptr, host.E = device.E = nullptr;
  host.counters = device.counters = nullptr, host.amax = device.amax = nullptr;
  host.scale = device.scale = nullptr;
  cpu::pack_by_mask(&host, 1);
  cuda::pack_by_mask(&device, 1, nullptr);
  synchronize(what);
  t.compare("pack_by_mask, transposed alone, " + what);
}

void test_packing() {
  Turns variants(4);
  const Shape more[] = {{128, 256}, {160, 96}, {264, 136}};
  std::vector<Shape> shapes(std::begin(kWeightShapes), std::end(kWeightShapes));
  shapes.insert(shapes.end(), std::begin(more), std::end(more));
  for (const Shape s : shapes)
    for (DType in : kDTypes)
      for (DType out : k8)
        for (Order order : kOrders) {
          if (out == DType::kFloat8E5M2 && s.rows * s.cols > 100000) continue;
          test_pack(s, in, out, order, 0, 0, Fill::kNormal);
          if (s.rows * s.cols > 100000) continue;
          if (variants.takes(0)) test_pack(s, in, out, order, 8, 0, Fill::kIntegers);
          if (variants.takes(1)) test_pack(s, in, out, order, 4, 0, Fill::kSpecial);
          if (variants.takes(2)) test_pack(s, in, out, order, 3, 0, Fill::kBits);
          if (variants.takes(3)) test_pack(s, in, out, order, 0, 1, Fill::kSpecial);
        }
}

void test_many_weights() {
  std::vector<std::unique_ptr<TwinWeight8>> weights;
  std::vector<PackArgs> host, device;
  for (int i = 0; i < 71; ++i) {  // more than two launches hold, of mixed layouts, some empty
    const Shape s = i % 13 == 5 ? Shape{0, 64} : Shape{4 + 4 * (i * 7 % 40), 8 + 4 * (i * 11 % 70)};
    weights.push_back(std::make_unique<TwinWeight8>(
        s, DType::kBFloat16, DType::kFloat8E4M3,
        i < 40 || i % 3 != 0 ? Order::kRows : Order::kColumns, 0, i % 17 == 3));
    weights.back()->w.fill(Fill::kNormal);
    host.push_back(weights.back()->args(false)), device.push_back(weights.back()->args(true));
  }
  cpu::search_and_pack(host.data(), static_cast<int>(host.size()));
  cuda::search_and_pack(device.data(), static_cast<int>(device.size()), nullptr);
  synchronize("many weights");
  for (size_t i = 0; i < weights.size(); ++i) weights[i]->compare(concat("weight ", i, " of many"));
}

void test_unpack() {
  for (const Shape s : kWeightShapes)
    for (bool transposed : {false, true})
      for (DType in : k8)
        for (DType out : kDTypes) {
          TwinMatrix dense(s.rows, s.cols, out, Order::kRows, 3);
          const int64_t m = transposed ? s.cols : s.rows, k = transposed ? s.rows : s.cols;
          Twin packed(m * k / 2), E(meta8_bytes(m, k)), scale(4);
          *scale.host<float>() = 0.25f;
          for (int64_t i = 0; i < m * k / 2; ++i)
            packed.host()[i] = static_cast<uint8_t>(random_source.bits() & 0x77u);  // no NaN
          const uint32_t valid[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};
          for (int64_t i = 0; i < meta8_bytes(m, k); ++i)
            E.host()[i] = static_cast<uint8_t>(valid[random_source.below(6)] |
                                               valid[random_source.below(6)] << 4);
          packed.upload(), E.upload(), scale.upload();
          cpu::unpack(
              {packed.host<void>(), E.host(), transposed, dense.host(), in, scale.host<float>()});
          cuda::unpack({packed.device<void>(), E.device(), transposed, dense.device(), in,
                        scale.device<float>()},
                       nullptr);
          synchronize("unpack");
          dense.twin().compare(concat("unpack [", s.rows, ", ", s.cols, "] ", sparse24::name_of(in),
                                      "->", sparse24::name_of(out),
                                      transposed ? " transposed" : ""));
        }
}

// ---- casts ------------------------------------------------------------------------------------

constexpr Shape kTokenShapes[] = {{1, 1},    {3, 5},    {4, 8},     {31, 12},
                                  {64, 64},  {65, 128}, {100, 200}, {128, 136},
                                  {130, 64}, {264, 72}, {256, 384}, {96, 512}};

void test_quantize() {
  for (const Shape s : kTokenShapes)
    for (DType dtype : kDTypes)
      for (Order order : kOrders)
        for (Fill fill : {Fill::kNormal, Fill::kSpecial, Fill::kBits})
          for (int64_t gap : {0, 8, 3}) {
            const std::string what =
                concat("quantize [", s.rows, ", ", s.cols, "] ", sparse24::name_of(dtype), " by ",
                       name_of(order), " gap ", gap, " fill ", static_cast<int>(fill));
            const int shift = gap == 3;
            TwinMatrix x(s.rows, s.cols, dtype, order, gap, shift);
            x.fill(fill);
            TwinFloat8 to(s.rows, s.cols, 0x1p-4f, gap, shift, gap != 8);
            cpu::quantize({x.const_host(), to.output(false)});
            cuda::quantize({x.const_device(), to.output(true)}, nullptr);
            synchronize(what);
            to.compare(what);

            Statistics alone(1.0f);
            Float8Output host, device;
            host.amax = alone.amax.host<float>(), device.amax = alone.amax.device<float>();
            cpu::quantize({x.const_host(), host});
            cuda::quantize({x.const_device(), device}, nullptr);
            synchronize(what);
            alone.compare(what + ", amax alone,");
          }
}

// ---- MVUE -------------------------------------------------------------------------------------

/// A packed gradient on both sides.
struct TwinPacked {
  DType dtype;
  Twin packed, E, seed{16}, scale{4}, sums;

  TwinPacked(int64_t tokens, int64_t features, DType to, int shift = 0)
      : dtype(to),
        packed(padded_tokens_for(to, tokens) / 2 * features * bytes_of(to), shift * bytes_of(to)),
        E(meta_bytes_for(to, features, padded_tokens_for(to, tokens)), shift),
        sums((tokens + 63) / 64 * features * 4) {
    seed.host<int64_t>()[0] = -7, seed.host<int64_t>()[1] = random_source.bits();
    *scale.host<float>() = 0x1p-3f;
    seed.upload(), scale.upload();
  }
  template <typename Args>
  void ask(Args& args, bool device) {
    args.seed = device ? seed.device<int64_t>() : seed.host<int64_t>();
    args.packed = device ? packed.device<void>() : packed.host<void>();
    args.E = device ? E.device() : E.host();
    args.packed_dtype = dtype;
    if (is_float8(dtype)) args.scale = device ? scale.device<float>() : scale.host<float>();
  }
  float* sums_of(bool device) { return device ? sums.device<float>() : sums.host<float>(); }
  void compare(const std::string& what) {
    packed.compare(what + " packed"), E.compare(what + " E");
  }
};

void test_mvue_shape(Shape s, DType dtype, DType packed, Order order, int64_t gap, int shift,
                     Fill fill) {
  const std::string what = concat("mvue [", s.rows, ", ", s.cols, "] ", sparse24::name_of(dtype),
                                  "->", sparse24::name_of(packed), " by ", name_of(order), " gap ",
                                  gap, " shift ", shift, " fill ", static_cast<int>(fill));
  TwinMatrix dy(s.rows, s.cols, dtype, order, gap, shift);
  dy.fill(fill);
  TwinPacked to(s.rows, s.cols, packed, shift);
  TwinFloat8 copy(s.rows, s.cols, 0x1p-2f, gap, shift);
  for (bool device : {false, true}) {
    MvueArgs args;
    args.dy = device ? dy.const_device() : dy.const_host();
    to.ask(args, device);
    args.float8 = copy.output(device);
    args.tile_sums = to.sums_of(device);
    device ? cuda::mvue_pack(args, nullptr) : cpu::mvue_pack(args);
  }
  synchronize(what);
  to.compare(what), copy.compare(what);
  if (fill != Fill::kSpecial && fill != Fill::kBits)  // NaNs differ in their bits
    to.sums.compare(what + " sums over tiles");
  if (!is_float8(packed)) return;
  TwinPacked alone(s.rows, s.cols, packed, shift);  // without a copy
  for (bool device : {false, true}) {
    MvueArgs args;
    args.dy = device ? dy.const_device() : dy.const_host();
    alone.ask(args, device);
    device ? cuda::mvue_pack(args, nullptr) : cpu::mvue_pack(args);
  }
  synchronize(what);
  alone.compare(what + ", packed alone,");
}

void test_mvue() {
  Turns fills(5);
  for (const Shape s : kTokenShapes)
    for (DType dtype : k16)
      for (DType packed : {dtype, DType::kFloat8E4M3, DType::kFloat8E5M2})
        for (Order order : kOrders) {
          for (Fill fill :
               {Fill::kNormal, Fill::kIntegers, Fill::kSpecial, Fill::kBits, Fill::kSparse}) {
            if (!fills.takes(static_cast<int>(fill))) continue;
            test_mvue_shape(s, dtype, packed, order, 0, 0, fill);
            test_mvue_shape(s, dtype, packed, order, 8, 0, fill);
          }
          test_mvue_shape(s, dtype, packed, order, 5, 1, Fill::kNormal);
        }
  for (DType packed : {DType::kBFloat16, DType::kFloat8E4M3, DType::kFloat8E5M2})
    test_mvue_shape({2048, 1024}, DType::kBFloat16, packed, Order::kRows, 0, 0, Fill::kNormal);
}

// ---- activations ------------------------------------------------------------------------------

constexpr Activation kKinds[] = {Activation::kSilu,        Activation::kGelu,
                                 Activation::kGeluTanh,    Activation::kRelu,
                                 Activation::kSquaredRelu, Activation::kIdentity};

void test_activation_shape(Shape s, DType dtype, DType packed, Activation kind, bool gated,
                           bool backward, int64_t gap, Fill fill) {
  const int64_t width = gated ? 2 * s.cols : s.cols, cols = backward ? width : s.cols;
  const std::string what =
      concat(backward ? "backward [" : "forward [", s.rows, ", ", s.cols, "] ",
             sparse24::name_of(dtype), "->", sparse24::name_of(packed), " kind ",
             static_cast<int>(kind), gated ? " gated" : "", " gap ", gap);
  TwinMatrix gate_up(s.rows, width, dtype, Order::kRows, gap),
      d_h(s.rows, s.cols, dtype, Order::kRows, gap);
  gate_up.fill(fill), d_h.fill(Fill::kNormal);
  // The plain kernel's result, and what the CPU makes of it.
  TwinMatrix plain(s.rows, cols, dtype, Order::kRows, gap),
      plain_h(s.rows, s.cols, dtype, Order::kRows);
  ActivationArgs forward;
  forward.kind = kind, forward.gated = gated, forward.gate_up = gate_up.const_device();
  forward.h = plain.device();
  ActivationBackwardArgs back;
  back.kind = kind, back.gated = gated, back.d_h = d_h.const_device();
  back.gate_up = gate_up.const_device(), back.d_gate_up = plain.device();
  back.h = plain_h.device();
  backward ? cuda::activation_backward(back, nullptr) : cuda::activation_forward(forward, nullptr);
  synchronize("plain " + what);
  plain.twin().download();
  if (backward) plain_h.twin().download();  // forward writes no h besides its result
  TwinPacked to(s.rows, cols, packed);
  TwinFloat8 copy(s.rows, cols, 0x1p-3f, gap);
  MvueArgs host;
  host.dy = plain.const_host(), host.float8 = copy.output(false);
  host.tile_sums = to.sums_of(false);
  to.ask(host, false);
  cpu::mvue_pack(host);

  const bool one_pass = gap % 8 == 0 && s.cols % 8 == 0 &&
                        (backward ? !gated || s.cols % 64 == 0 : !is_float8(packed));
  for (bool dense : {true, false}) {
    if (!dense && !one_pass) continue;  // refused by name: test_refusals
    TwinMatrix got(s.rows, cols, dtype, Order::kRows, gap),
        got_h(s.rows, s.cols, dtype, Order::kRows);
    const auto ask = [&](auto& args) {
      to.ask(args, true);
      args.float8 = copy.output(true);
    };
    ask(forward), ask(back);
    forward.h = got.device(), back.d_gate_up = got.device(), back.h = got_h.device();
    if (dense) back.tile_sums = to.sums_of(true);
    if (!dense)
      forward.h.data = nullptr, back.d_gate_up.data = nullptr, back.h.data = nullptr,
      back.tile_sums = nullptr, forward.float8.counters = nullptr, back.float8.counters = nullptr;
    backward ? cuda::activation_backward(back, nullptr)
             : cuda::activation_forward_outputs(forward, nullptr);
    synchronize(what);
    copy.compare(what);
    to.compare(what);
    if (dense) got.twin().compare_with(plain.twin(), what + " dense");
    if (dense && backward) got_h.twin().compare_with(plain_h.twin(), what + " h");
    if (dense && backward && fill == Fill::kNormal) to.sums.compare(what + " sums");
  }
}

void test_activations() {
  int turn = 0;
  for (const Shape s : {Shape{1, 64}, Shape{31, 64}, Shape{72, 72}, Shape{128, 128},
                        Shape{136, 320}, Shape{200, 128}, Shape{70, 36}})
    for (DType dtype : k16)
      for (DType packed : {dtype, DType::kFloat8E4M3, DType::kFloat8E5M2})
        for (bool gated : {true, false})
          for (bool backward : {false, true})
            for (int64_t gap : {0, 3}) {
              const Activation kind = kKinds[turn++ % 6];
              test_activation_shape(s, dtype, packed, kind, gated, backward, gap,
                                    turn % 3 == 0 ? Fill::kSpecial : Fill::kNormal);
            }
  for (Activation kind : kKinds)
    for (bool gated : {true, false})
      for (bool backward : {false, true})
        for (DType packed : {DType::kBFloat16, DType::kFloat8E5M2})
          test_activation_shape({520, 1344}, DType::kBFloat16, packed, kind, gated, backward, 0,
                                Fill::kNormal);
}

/// What one pass cannot make needs the result in memory, and says so.
void test_refusals() {
  TwinMatrix gate_up(8, 40, DType::kBFloat16, Order::kRows),
      d_h(8, 20, DType::kBFloat16, Order::kRows);
  TwinPacked to(8, 40, DType::kFloat8E5M2);
  ActivationBackwardArgs back;
  back.d_h = d_h.const_device(), back.gate_up = gate_up.const_device();
  back.d_gate_up = {nullptr, DType::kBFloat16, 8, 40, 40, 1};
  to.ask(back, true);
  std::string said;
  try {
    cuda::activation_backward(back, nullptr);
  } catch (const Error& error) {
    said = error.what();
  }
  expect(said.find("d_gate_up must be given") == 0, "refusal of an absent d_gate_up: " + said);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(
      argc, argv,
      {[] { test_conversions<Float8E4M3>("e4m3"), test_conversions<Float8E5M2>("e5m2"); },
       [] { test_widening<Float8E4M3>("e4m3"), test_widening<Float8E5M2>("e5m2"); }, test_packing,
       test_many_weights, test_unpack, test_quantize, test_mvue, test_activations, test_refusals},
      run_float8_benchmarks);
}
