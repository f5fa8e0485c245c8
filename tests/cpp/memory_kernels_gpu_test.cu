// memory_kernels_gpu_test.cu: the kernels of mask/, pack/, activation/ and fused/ on a GPU.
//
//   equal       masks, packed values, E, MVUE draws, decay, flips, gaps: the bytes of the CPU
//               backend, on all shapes, layouts, dtypes and alignments below, special values too.
//               Outputs start as poison, which must survive wherever the CPU leaves it: between
//               lines, behind the end, 256 bytes around every buffer
//   activation  the bytes of a plain kernel over the same per-element functions, and close to the
//               CPU's
//   fused       the bytes of the two passes it replaces
//   --quick     all shapes, layouts and dtypes, but few of their combinations with fills, gaps and
//               shifts
//   --tight     no guards and no poison: buffers end where the tensors end, and outputs start
//               uninitialised. For compute-sanitizer (tests/sanitize.sh)
//   --bench     besides, times layers of GPT-2 and Llama as CSV, next to a copy; buffers rotate,
//               so that L2 is cold. --bench-only: nothing but that
//
// CMake builds it with the library's objects. Alone, from the repository root:
//   nvcc -gencode=arch=compute_90a,code=sm_90a -std=c++17 -O3 -DNDEBUG --fmad=false
//     --expt-relaxed-constexpr -Xcompiler=-ffp-contract=off -Icsrc -Icsrc/include
//     -Itests/cpp -o memory_kernels_gpu_test tests/cpp/memory_kernels_gpu_test.cu
//     csrc/{mask,pack,activation,fused}/*.cu csrc/cpu/*.cpp
//
// SPARSE24_ARCH=sm80 takes the paths of GPUs without a copy engine. What A100s run to the last
// instruction runs on a Hopper GPU by -gencode=arch=compute_80,code=sm_90 -DSPARSE24_BUILT_SM90=0.
//
// One line a failure, a summary at the end; exit status 0, 1 (failures) or 77 (no GPU).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "activation/activation_cuda.h"
#include "activation/functions.h"
#include "common/check.h"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/current_arch.h"
#include "common/metadata.h"
#include "cpu/cpu.h"
#include "fused/fused_cuda.h"
#include "mask/mask_cuda.h"
#include "memory_kernels_bench.h"
#include "pack/pack_cuda.h"
#include "twins.h"

using namespace sparse24;
using namespace gpu_testing;

namespace {

// ---- masks and packing ------------------------------------------------------------------------

/// All outputs of one weight, on both sides.
struct TwinWeight {
  TwinMatrix w;
  Twin mask, packed, E, packed_t, E_t;
  DType out;
  bool with_packed, with_packed_t;

  TwinWeight(Shape s, DType in, DType to, Order order, int64_t gap, int shift, bool rows_too = true,
             bool cols_too = true)
      : w(s.rows, s.cols, in, order, gap, shift),
        mask(s.rows / 4 * (s.cols / 4) * 2, 2 * shift),
        packed(s.rows * s.cols, 2 * shift),
        E(meta_bytes(s.rows, s.cols), shift),
        packed_t(s.rows * s.cols, 2 * shift),
        E_t(meta_bytes(s.cols, s.rows), shift),
        out(to),
        with_packed(rows_too),
        with_packed_t(cols_too) {
    if (!with_packed) packed.upload(), E.upload();  // which nothing writes
    if (!with_packed_t) packed_t.upload(), E_t.upload();
  }

  PackArgs args(bool device) {
    PackArgs a;
    a.w = device ? w.const_device() : w.const_host();
    a.mask = device ? mask.device<uint16_t>() : mask.host<uint16_t>();
    a.out_dtype = out;
    if (with_packed) {
      a.packed = device ? packed.device<void>() : packed.host<void>();
      a.E = device ? E.device() : E.host();
    }
    if (with_packed_t) {
      a.packed_t = device ? packed_t.device<void>() : packed_t.host<void>();
      a.E_t = device ? E_t.device() : E_t.host();
    }
    return a;
  }
  /// `packs`: all was written; else the mask alone, and poison must have stayed elsewhere.
  void compare(const std::string& what, bool packs = true) {
    mask.compare(what + " mask");
    w.twin().compare(what + " w");
    if (!packs && guard == 0) return;  // no poison
    packed.compare(what + " packed");
    E.compare(what + " E");
    packed_t.compare(what + " packed_t");
    E_t.compare(what + " E_t");
  }
};

std::string describe(Shape s, DType in, DType out, Order order, int64_t gap, int shift, Fill fill) {
  return concat("[", s.rows, ", ", s.cols, "] ", sparse24::name_of(in), "->",
                sparse24::name_of(out), " by ", name_of(order), " gap ", gap, " shift ", shift,
                " fill ", static_cast<int>(fill));
}

void test_pack(Shape s, DType in, DType out, Order order, int64_t gap, int shift, Fill fill) {
  const std::string what = describe(s, in, out, order, gap, shift, fill);
  {
    TwinWeight t(s, in, out, order, gap, shift);
    t.w.fill(fill);
    const PackArgs host = t.args(false), device = t.args(true);
    cpu::search_and_pack(&host, 1);
    cuda::search_and_pack(&device, 1, nullptr);
    synchronize(what);
    t.compare("search_and_pack " + what);
  }
  {
    TwinWeight t(s, in, out, order, gap, shift);
    t.w.fill(fill);
    const PackArgs host = t.args(false), device = t.args(true);
    cpu::search_mask(&host, 1);
    cuda::search_mask(&device, 1, nullptr);
    synchronize(what);
    t.compare("search_mask " + what, false);
    t.w.fill(Fill::kBits);  // other values: positions must come from the mask
    cpu::pack_by_mask(&host, 1);
    cuda::pack_by_mask(&device, 1, nullptr);
    synchronize(what);
    t.compare("pack_by_mask " + what);
  }
}

void test_packing() {
  Turns outs(2), variants(4);
  for (const Shape s : kWeightShapes) {
    const bool large = s.rows * s.cols > 100000;
    for (DType in : kDTypes) {
      for (int out = 0; out < 2; ++out) {
        if (!outs.takes(out)) continue;
        for (Order order : kOrders) {
          test_pack(s, in, k16[out], order, 0, 0, Fill::kNormal);
          if (large) continue;
          if (variants.takes(0)) test_pack(s, in, k16[out], order, 8, 0, Fill::kIntegers);
          if (variants.takes(1)) test_pack(s, in, k16[out], order, 4, 0, Fill::kSpecial);
          if (variants.takes(2)) test_pack(s, in, k16[out], order, 3, 0, Fill::kBits);
          if (variants.takes(3)) test_pack(s, in, k16[out], order, 0, 1, Fill::kSpecial);
        }
      }
    }
  }
  for (int n = 0; n < 2; ++n) {  // one orientation only
    TwinWeight t({132, 264}, DType::kBFloat16, DType::kBFloat16, Order::kRows, 0, 0, n % 2 == 0,
                 n % 2 == 1);
    t.w.fill(Fill::kNormal);
    const PackArgs host = t.args(false), device = t.args(true);
    cpu::search_and_pack(&host, 1);
    cuda::search_and_pack(&device, 1, nullptr);
    synchronize("one orientation");
    t.compare(concat("one orientation, case ", n));
  }
}

/// Weights of one class share a launch, and a large one has a tile of its own.
void test_lists() {
  const DType pairs[][2] = {{DType::kFloat32, DType::kBFloat16},
                            {DType::kFloat32, DType::kFloat16},
                            {DType::kBFloat16, DType::kBFloat16},
                            {DType::kFloat16, DType::kFloat16}};
  for (const auto& [in, out] : pairs) {
    std::vector<std::unique_ptr<TwinWeight>> weights;
    std::vector<PackArgs> host, device;
    for (const Shape s : {Shape{132, 264}, Shape{68, 136}, Shape{4, 520}, Shape{256, 8}}) {
      weights.push_back(std::make_unique<TwinWeight>(s, in, out, Order::kRows, 8, 0));
      weights.back()->w.fill(Fill::kSpecial);
      host.push_back(weights.back()->args(false)), device.push_back(weights.back()->args(true));
    }
    const int count = static_cast<int>(weights.size());
    const std::string what = concat(sparse24::name_of(in), "->", sparse24::name_of(out));
    for (bool searches : {true, false}) {
      (searches ? cpu::search_and_pack : cpu::pack_by_mask)(host.data(), count);
      (searches ? cuda::search_and_pack : cuda::pack_by_mask)(device.data(), count, nullptr);
      synchronize("lists");
      for (const auto& weight : weights)
        weight->compare(concat("list of ", what, ", search: ", searches));
      for (const auto& weight : weights) weight->w.fill(Fill::kBits);
    }
    if (!quick || in == DType::kBFloat16)
      test_pack({4100, 4104}, in, out, Order::kRows, 0, 0, Fill::kNormal);
  }
}

void test_many_tensors() {
  std::vector<std::unique_ptr<TwinWeight>> weights;
  std::vector<PackArgs> host, device;
  for (int i = 0; i < 71;
       ++i) {  // more than two launches hold, of mixed classes, with empty ones between
    const Shape s = i % 13 == 5 ? Shape{0, 64} : Shape{4 + 4 * (i * 7 % 40), 8 + 4 * (i * 11 % 70)};
    weights.push_back(std::make_unique<TwinWeight>(
        s, DType::kFloat32, DType::kBFloat16, i < 40 || i % 3 != 0 ? Order::kRows : Order::kColumns,
        0, i % 17 == 3));
    weights.back()->w.fill(Fill::kNormal);
    host.push_back(weights.back()->args(false)), device.push_back(weights.back()->args(true));
  }
  cpu::search_and_pack(host.data(), static_cast<int>(host.size()));
  cuda::search_and_pack(device.data(), static_cast<int>(device.size()), nullptr);
  synchronize("many tensors");
  for (size_t i = 0; i < weights.size(); ++i)
    weights[i]->compare(concat("search_and_pack, tensor ", i, " of many"));

  std::vector<std::unique_ptr<Twin>> flips, others;
  std::vector<MaskFlipsArgs> host_flips, device_flips;
  for (size_t i = 0; i < weights.size(); ++i) {
    flips.push_back(std::make_unique<Twin>(8));
    const int64_t blocks = host[i].w.rows / 4 * (host[i].w.cols / 4);
    others.push_back(std::make_unique<Twin>(blocks * 2, i % 5 == 0 ? 2 : 0));
    for (int64_t b = 0; b < blocks * 2; ++b)
      others.back()->host()[b] = static_cast<uint8_t>(random_source.bits());
    others.back()->upload();
    host_flips.push_back(
        {host[i].mask, others.back()->host<uint16_t>(), blocks, flips[i]->host<int64_t>()});
    device_flips.push_back(
        {device[i].mask, others.back()->device<uint16_t>(), blocks, flips[i]->device<int64_t>()});
  }
  cpu::mask_flips(host_flips.data(), static_cast<int>(host_flips.size()));
  cuda::mask_flips(device_flips.data(), static_cast<int>(device_flips.size()), nullptr);
  synchronize("mask_flips");
  for (size_t i = 0; i < flips.size(); ++i) flips[i]->compare(concat("mask_flips, tensor ", i));
}

void test_masks() {
  for (const Shape s : kWeightShapes) {
    for (int shift : {0, 1}) {
      const std::string what = concat("[", s.rows, ", ", s.cols, "] shift ", shift);
      const int64_t blocks = s.rows / 4 * (s.cols / 4);
      Twin mask(blocks * 2, 2 * shift), bytes(s.rows * s.cols, shift), bad(8);
      for (int64_t b = 0; b < blocks; ++b) {
        mask.host<uint16_t>()[b] =
            random_source.below(3) == 0 ? static_cast<uint16_t>(random_source.bits()) : 0xC3C3;
      }
      mask.upload();
      cpu::unpack_mask(mask.host<uint16_t>(), bytes.host(), s.rows, s.cols);
      cuda::unpack_mask(mask.device<uint16_t>(), bytes.device(), s.rows, s.cols, nullptr);
      cpu::count_bad_blocks(mask.host<uint16_t>(), blocks, bad.host<int64_t>());
      cuda::count_bad_blocks(mask.device<uint16_t>(), blocks, bad.device<int64_t>(), nullptr);
      synchronize(what);
      bytes.compare("unpack_mask " + what), bad.compare("count_bad_blocks " + what);

      Twin E(meta_bytes(s.rows, s.cols), shift), bad_meta(8);
      for (int64_t i = 0; i < meta_bytes(s.rows, s.cols); ++i)
        E.host()[i] = static_cast<uint8_t>(random_source.bits());
      E.upload();
      cpu::count_bad_metadata(DType::kBFloat16, E.host(), s.rows, s.cols, bad_meta.host<int64_t>());
      cuda::count_bad_metadata(DType::kBFloat16, E.device(), s.rows, s.cols,
                               bad_meta.device<int64_t>(), nullptr);
      synchronize(what);
      bad_meta.compare("count_bad_metadata " + what);
    }
    if (s.rows * s.cols > 200000) continue;
    for (DType dtype : kDTypes) {
      for (Order order : kOrders) {
        TwinMatrix w(s.rows, s.cols, dtype, order, 4);
        w.fill(Fill::kNormal);
        Twin gap(s.rows / 4 * (s.cols / 4) * 4);
        cpu::mask_gap(w.const_host(), gap.host<float>());
        cuda::mask_gap(w.const_device(), gap.device<float>(), nullptr);
        synchronize("mask_gap");
        gap.compare(concat("mask_gap [", s.rows, ", ", s.cols, "] ", sparse24::name_of(dtype),
                           " by ", name_of(order)));
      }
    }
  }
}

void test_unpack() {
  for (const Shape s : kWeightShapes) {
    for (bool transposed : {false, true}) {
      for (DType dtype : kDTypes) {
        for (int64_t gap : {0, 3, 8}) {
          const int64_t cols =
              transposed && s.cols < 100 ? s.cols + 3 : s.cols;  // any width for gradients
          TwinMatrix out(s.rows, cols, dtype, Order::kRows, gap);
          Twin packed(s.rows * cols / 2 * bytes_of(dtype)),
              E(transposed ? meta_bytes(cols, s.rows) : meta_bytes(s.rows, cols));
          for (int64_t i = 0; i < s.rows * cols / 2 * bytes_of(dtype); ++i)
            packed.host()[i] = static_cast<uint8_t>(random_source.bits());
          const uint32_t valid[] = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE};
          for (int64_t i = 0;
               i < (transposed ? meta_bytes(cols, s.rows) : meta_bytes(s.rows, cols)); ++i)
            E.host()[i] = static_cast<uint8_t>(valid[random_source.below(6)] |
                                               valid[random_source.below(6)] << 4);
          packed.upload(), E.upload();
          cpu::unpack({packed.host<void>(), E.host(), transposed, out.host()});
          cuda::unpack({packed.device<void>(), E.device(), transposed, out.device()}, nullptr);
          synchronize("unpack");
          out.twin().compare(concat("unpack [", s.rows, ", ", cols, "] ", sparse24::name_of(dtype),
                                    transposed ? " transposed" : "", " gap ", gap));
        }
      }
    }
  }
}

// ---- masked decay -----------------------------------------------------------------------------

void test_decay() {
  Turns all_orders(4), variants(3);
  for (const Shape s : kWeightShapes) {
    if (s.rows * s.cols > 600000) continue;
    for (DType grad_dtype : kDTypes) {
      for (DType w_dtype : kDTypes) {
        for (int orders = 0; orders < 4; ++orders) {
          if (!all_orders.takes(orders)) continue;
          for (int variant = 0; variant < 3; ++variant) {  // vectors; wider lines; misaligned
            if (!variants.takes(variant)) continue;
            const int64_t gap = variant == 1 ? 8 : variant == 2 ? 1 : 0;
            TwinMatrix grad(s.rows, s.cols, grad_dtype, kOrders[orders / 2], gap);
            TwinMatrix w(s.rows, s.cols, w_dtype, kOrders[orders % 2], 0, variant == 2 ? 1 : 0);
            grad.fill(variant == 0 ? Fill::kSparse : Fill::kNormal), w.fill(Fill::kNormal);
            Twin mask(s.rows / 4 * (s.cols / 4) * 2), scale(4);
            for (int64_t b = 0; b < s.rows / 4 * (s.cols / 4); ++b)
              mask.host<uint16_t>()[b] = static_cast<uint16_t>(random_source.bits());
            *scale.host<float>() = 1024.0f;
            mask.upload(), scale.upload();
            MaskedDecayArgs host = {grad.host(), w.const_host(), mask.host<uint16_t>(), 2e-4f,
                                    variant == 1 ? scale.host<float>() : nullptr};
            MaskedDecayArgs device = {grad.device(), w.const_device(), mask.device<uint16_t>(),
                                      2e-4f, variant == 1 ? scale.device<float>() : nullptr};
            cpu::masked_decay(&host, 1);
            cuda::masked_decay(&device, 1, nullptr);
            synchronize("masked_decay");
            grad.twin().compare(concat(
                "masked_decay [", s.rows, ", ", s.cols, "] grad ", sparse24::name_of(grad_dtype),
                " w ", sparse24::name_of(w_dtype), " orders ", orders, " variant ", variant));
          }
        }
      }
    }
  }
}

// ---- MVUE -------------------------------------------------------------------------------------

int64_t tile_sums_bytes(int64_t tokens, int64_t features) {
  return (tokens + 63) / 64 * features * 4;
}

void test_mvue_shape(int64_t tokens, int64_t features, DType dtype, Order order, int64_t gap,
                     int shift, Fill fill) {
  const int64_t padded = round_up(tokens, 8);
  TwinMatrix dy(tokens, features, dtype, order, gap, shift);
  dy.fill(fill);
  Twin packed(padded / 2 * features * 2, 2 * shift), E(meta_bytes(features, padded), shift),
      seed(16), sums(tile_sums_bytes(tokens, features));
  seed.host<int64_t>()[0] = 0x0123456789ABCDEFll, seed.host<int64_t>()[1] = random_source.bits();
  seed.upload();
  cpu::mvue_pack(
      {dy.const_host(), seed.host<int64_t>(), packed.host<void>(), E.host(), sums.host<float>()});
  // Every other time without sums: that is a kernel of its own.
  static bool with_sums = false;
  with_sums = !with_sums;
  cuda::mvue_pack({dy.const_device(), seed.device<int64_t>(), packed.device<void>(), E.device(),
                   with_sums ? sums.device<float>() : nullptr},
                  nullptr);
  const std::string what =
      concat("mvue_pack [", tokens, ", ", features, "] ", sparse24::name_of(dtype), " by ",
             name_of(order), " gap ", gap, " shift ", shift, " fill ", static_cast<int>(fill));
  synchronize(what);
  packed.compare(what + " packed");
  E.compare(what + " E");
  if (with_sums && fill != Fill::kSpecial && fill != Fill::kBits)  // NaNs differ in their bits
    sums.compare(what + " sums over tiles");
}

void test_mvue() {
  const Shape shapes[] = {{1, 1},    {3, 5},    {4, 8},     {8, 8},     {31, 12}, {64, 64},
                          {65, 128}, {72, 136}, {100, 200}, {128, 132}, {264, 72}};
  Turns fills(5);
  for (const Shape s : shapes) {
    for (DType dtype : k16) {
      for (Order order : kOrders) {
        for (Fill fill :
             {Fill::kNormal, Fill::kIntegers, Fill::kSpecial, Fill::kBits, Fill::kSparse}) {
          if (!fills.takes(static_cast<int>(fill))) continue;
          test_mvue_shape(s.rows, s.cols, dtype, order, 0, 0, fill);
          test_mvue_shape(s.rows, s.cols, dtype, order, fill == Fill::kNormal ? 8 : 5, 0, fill);
        }
        test_mvue_shape(s.rows, s.cols, dtype, order, 0, 1, Fill::kNormal);
      }
    }
  }
  for (Order order : kOrders)
    test_mvue_shape(2048, 1024, DType::kBFloat16, order, 0, 0, Fill::kNormal);
  for (Order order : kOrders)
    test_mvue_shape(1024, 512, DType::kFloat16, order, 0, 0, Fill::kSparse);
}

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

void test_empty() {
  PackArgs empty;
  cuda::search_mask(&empty, 1, nullptr), cuda::pack_by_mask(&empty, 1, nullptr),
      cuda::search_and_pack(&empty, 0, nullptr);
  cuda::mvue_pack({}, nullptr), cuda::unpack({}, nullptr),
      cuda::unpack_mask(nullptr, nullptr, 0, 4, nullptr);
  cuda::mask_gap({}, nullptr, nullptr), cuda::masked_decay(nullptr, 0, nullptr),
      cuda::mask_flips(nullptr, 0, nullptr);
  cuda::activation_forward({}, nullptr), cuda::activation_backward({}, nullptr);
  synchronize("empty inputs");
  ++checks;
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU here\n");
    return 77;
  }
  const auto asked = [&](const char* name) {
    for (int i = 1; i < argc; ++i)
      if (std::strcmp(argv[i], name) == 0) return true;
    return false;
  };
  if (asked("--tight")) guard = 0;
  quick = asked("--quick");
  try {
    std::printf("kernels of %s\n", current_arch() == KernelArch::kSm90 ? "sm_90a" : "sm_80");
    if (!asked("--bench-only")) {
      test_empty();
      test_masks();
      test_packing();
      test_lists();
      test_many_tensors();
      test_unpack();
      test_decay();
      test_mvue();
      test_activations();
      std::printf("%lld checks, %d failures\n", static_cast<long long>(checks), failures);
    }
    if (asked("--bench") || asked("--bench-only")) run_benchmarks();
  } catch (const std::exception& error) {
    fail("exception: ", error.what());
  }
  return failures == 0 ? 0 : 1;
}
