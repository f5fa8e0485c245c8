// memory_kernels_gpu_test.cu: the kernels of mask/ and pack/ on a GPU; activation_gpu_test.cu has those
// of activation/ and fused/.
//
//   equal       masks, packed values, E, MVUE draws, decay, flips, gaps: the bytes of the CPU
//               backend, on all shapes, layouts, dtypes and alignments below, special values too.
//               Outputs start as poison, which must survive wherever the CPU leaves it: between
//               lines, behind the end, 256 bytes around every buffer
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
#include "common/check.h"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "cpu/cpu.h"
#include "fused/fused_cuda.h"
#include "mask/mask_cuda.h"
#include "memory_kernels_bench.h"
#include "memory_kernels_main.h"
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
  return run_program(argc, argv,
                     {test_empty, test_masks, test_packing, test_lists, test_many_tensors,
                      test_unpack, test_decay, test_mvue},
                     run_benchmarks);
}
