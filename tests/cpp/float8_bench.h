// float8_bench.h: times of the memory-bound kernels in 8 bits at layers of Llama and GPT-2, as CSV,
// next to a copy; the bytes are those that each pass must move.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "memory_kernels_bench.h"

namespace gpu_testing {

struct BenchWeight8 {
  DeviceMemory w, mask, packed, E, packed_t, E_t, scale, amax;
  PackArgs args;

  BenchWeight8(Shape s, DType dtype)
      : w(s.rows * s.cols * bytes_of(dtype)),
        mask(s.rows * s.cols / 8),
        packed(s.rows * s.cols / 2),
        E(meta8_bytes(s.rows, s.cols)),
        packed_t(s.rows * s.cols / 2),
        E_t(meta8_bytes(s.cols, s.rows)),
        scale(4),
        amax(4) {
    w.fill(dtype, s.rows * s.cols), cudaMemset(scale.as(), 0x3f, 4);  // 0.747
    args.w = {w.as(), dtype, s.rows, s.cols, s.cols, 1};
    args.mask = mask.as<uint16_t>(), args.packed = packed.as(), args.packed_t = packed_t.as();
    args.E = E.as<uint8_t>(), args.E_t = E_t.as<uint8_t>();
    args.out_dtype = DType::kFloat8E4M3;
    args.scale = scale.as<float>();
    cuda::search_mask(&args, 1, nullptr);
  }
};

inline void bench_packing8() {
  for (const Shape s :
       {Shape{14336, 4096}, Shape{11008, 4096}, Shape{4096, 11008}, Shape{3072, 768}})
    for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols);
      const double bytes = elements * (bytes_of(dtype) + 1.375);
      const int sets = sets_for(bytes);
      std::vector<std::unique_ptr<BenchWeight8>> weights;
      for (int i = 0; i < sets; ++i) weights.push_back(std::make_unique<BenchWeight8>(s, dtype));
      const std::string what = concat(" e4m3 ", s.rows, "x", s.cols, " ", sparse24::name_of(dtype));
      report("pack_by_mask" + what, bytes,
             time_us(sets, [&](int i) { cuda::pack_by_mask(&weights[i]->args, 1, nullptr); }));
      report("search_and_pack" + what, bytes,
             time_us(sets, [&](int i) { cuda::search_and_pack(&weights[i]->args, 1, nullptr); }));
      for (auto& weight : weights) weight->args.amax = weight->amax.as<float>();
      report("pack_by_mask + amax" + what, bytes,
             time_us(sets, [&](int i) { cuda::pack_by_mask(&weights[i]->args, 1, nullptr); }));
    }
}

/// One [tokens, features] matrix and all that passes over it write.
struct BenchTokens {
  DeviceMemory x, x8, x8_t, packed, E, seed, scale, amax;
  ConstMatrix view;

  BenchTokens(Shape s, DType dtype)
      : x(s.rows * s.cols * bytes_of(dtype)),
        x8(s.rows * s.cols),
        x8_t(s.rows * s.cols),
        packed(s.rows * s.cols),
        E(meta8_bytes(s.cols, s.rows)),
        seed(16),
        scale(4),
        amax(4),
        view{x.as(), dtype, s.rows, s.cols, s.cols, 1} {
    x.fill(dtype, s.rows * s.cols), cudaMemset(scale.as(), 0x3f, 4);
    cudaMemset(seed.as(), 7, 16), cudaMemset(amax.as(), 0, 4);
  }
  Float8Output output(bool x8_too, bool x8_t_too) {
    Float8Output to;
    to.scale = scale.as<float>(), to.amax = amax.as<float>();
    if (x8_too) to.x8 = x8.as(), to.x8_ld = view.cols;
    if (x8_t_too) to.x8_t = x8_t.as(), to.x8_t_ld = view.rows;
    return to;
  }
  MvueArgs mvue(DType packed_dtype, bool x8_too) {
    MvueArgs args;
    args.dy = view, args.seed = seed.as<int64_t>(), args.packed = packed.as();
    args.E = E.as<uint8_t>(), args.packed_dtype = packed_dtype;
    if (is_float8(packed_dtype)) args.scale = scale.as<float>();
    if (x8_too) args.float8 = output(true, false);
    return args;
  }
};

inline void bench_tokens() {
  for (const Shape s : {Shape{8192, 4096}, Shape{16384, 4096}, Shape{8192, 11008}}) {
    const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols);
    for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      const double in = bytes_of(dtype);
      const int sets = sets_for(elements * (in + 2));
      std::vector<std::unique_ptr<BenchTokens>> m;
      for (int i = 0; i < sets; ++i) m.push_back(std::make_unique<BenchTokens>(s, dtype));
      const std::string what = concat(" ", s.rows, "x", s.cols, " ", sparse24::name_of(dtype));
      const auto cast = [&](const char* name, bool x8, bool x8_t) {
        report(name + what, elements * (in + x8 + x8_t), time_us(sets, [&](int i) {
                 cuda::quantize({m[i]->view, m[i]->output(x8, x8_t)}, nullptr);
               }));
      };
      cast("quantize x8 and x8_t", true, true), cast("quantize x8", true, false);
      cast("quantize x8_t", false, true), cast("amax", false, false);
      if (dtype == DType::kFloat32) continue;
      const auto pack = [&](const char* name, DType packed, bool x8, double bytes) {
        report(name + what, elements * bytes,
               time_us(sets, [&](int i) { cuda::mvue_pack(m[i]->mvue(packed, x8), nullptr); }));
      };
      pack("mvue to bf16", DType::kBFloat16, false, 3.125);
      pack("mvue to bf16, and x8", DType::kBFloat16, true, 4.125);
      pack("mvue to e5m2", DType::kFloat8E5M2, false, 2.625);
      pack("mvue to e5m2, and x8", DType::kFloat8E5M2, true, 3.625);
    }
  }
}

inline void bench_activation_outputs() {
  for (const Shape s : {Shape{8192, 11008}, Shape{16384, 14336}}) {
    const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols);
    BenchTokens gate_up({s.rows, 2 * s.cols}, DType::kBFloat16), h(s, DType::kBFloat16);
    const std::string what = concat(" ", s.rows, "x", s.cols);
    const auto forward = [&](const char* name, Activation kind, bool gated, bool dense, bool x8,
                             bool x8_t, bool packed, double bytes) {
      ActivationArgs args;
      args.kind = kind, args.gated = gated, args.gate_up = gate_up.view;
      if (!gated) args.gate_up.cols = s.cols, args.gate_up.row_stride = s.cols;
      args.h = {dense ? h.x.as() : nullptr, DType::kBFloat16, s.rows, s.cols, s.cols, 1};
      if (x8 || x8_t) args.float8 = h.output(x8, x8_t);
      if (packed)
        args.seed = h.seed.as<int64_t>(), args.packed = h.packed.as(), args.E = h.E.as<uint8_t>();
      report(name + what, elements * bytes,
             time_us(1, [&](int) { cuda::activation_forward_outputs(args, nullptr); }));
    };
    forward("silu forward, h8 and h8_t", Activation::kSilu, true, false, true, true, false, 6);
    forward("silu forward, h and h8", Activation::kSilu, true, true, true, false, false, 7);
    forward("silu forward, h and h packed", Activation::kSilu, true, true, false, false, true,
            7.125);
    forward("relu2 forward, h8 and h8_t", Activation::kSquaredRelu, false, false, true, true, false,
            4);
    forward("relu2 forward, h and h packed", Activation::kSquaredRelu, false, true, false, false,
            true, 5.125);
    const auto backward = [&](const char* name, Activation kind, bool gated, DType packed,
                              double bytes) {
      ActivationBackwardArgs args;
      args.kind = kind, args.gated = gated, args.gate_up = gate_up.view, args.d_h = h.view;
      const int64_t width = gated ? 2 * s.cols : s.cols;
      args.gate_up.cols = width, args.gate_up.row_stride = width;
      args.d_gate_up = {nullptr, DType::kBFloat16, s.rows, width, width, 1};
      args.float8 = gate_up.output(true, false), args.float8.x8_ld = width;
      args.seed = h.seed.as<int64_t>(), args.packed = gate_up.packed.as();
      args.E = gate_up.E.as<uint8_t>(), args.packed_dtype = packed;
      if (is_float8(packed)) args.scale = h.scale.as<float>();
      report(name + what, elements * bytes,
             time_us(1, [&](int) { cuda::activation_backward(args, nullptr); }));
    };
    backward("silu backward, x8 and e5m2", Activation::kSilu, true, DType::kFloat8E5M2, 9.25);
    backward("silu backward, x8 and bf16", Activation::kSilu, true, DType::kBFloat16, 10.25);
    backward("relu2 backward, x8 and e5m2", Activation::kSquaredRelu, false, DType::kFloat8E5M2,
             5.625);
    backward("relu2 backward, x8 and bf16", Activation::kSquaredRelu, false, DType::kBFloat16,
             6.125);
  }
}

inline void run_float8_benchmarks() {
  std::printf("what,us,TB/s,of copy\n");
  bench_copy();
  bench_packing8();
  bench_tokens();
  bench_activation_outputs();
}

}  // namespace gpu_testing
