// memory_kernels_bench.h: times of the memory-bound kernels at layers of GPT-2 and Llama, as CSV,
// next to a copy. Buffers rotate, so that L2 is cold.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "activation/activation_cuda.h"
#include "common/metadata.h"
#include "common/philox.h"
#include "fused/fused_cuda.h"
#include "mask/mask_cuda.h"
#include "pack/pack_cuda.h"
#include "twins.h"

namespace gpu_testing {

/// Normal values (sum of uniforms), made on the device.
template <typename T>
__global__ void fill_normal_kernel(T* data, int64_t count, uint32_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const Philox4 random =
        philox4x32_10({{static_cast<uint32_t>(i), static_cast<uint32_t>(i >> 32), seed, 0}}, 1, 2);
    float sum = -2.0f;
    for (uint32_t word : random.word) sum += static_cast<float>(word) * 0x1p-32f;
    data[i] = from_float<T>(sum * 1.7f);
  }
}

class DeviceMemory {
 public:
  explicit DeviceMemory(int64_t bytes) {
    SP24_CHECK_CUDA(cudaMalloc(&data_, static_cast<size_t>(bytes)));
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  template <typename T = void>
  T* as() {
    return static_cast<T*>(data_);
  }
  DeviceMemory& fill(DType dtype, int64_t count) {
    with_type(dtype, [&](auto zero) {
      fill_normal_kernel<<<2048, 256>>>(as<decltype(zero)>(), count, ++seed());
    });
    return *this;
  }
  static uint32_t& seed() {
    static uint32_t value = 0;
    return value;
  }

 private:
  void* data_ = nullptr;
};

constexpr int64_t kRotation = int64_t{400} << 20;  // several times the L2: a buffer comes back cold
inline double copy_tb_per_s = 0.0;

/// Median microseconds of one run(set), over rotating sets.
inline double time_us(int sets, const std::function<void(int)>& run) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  const int inner = std::max(sets, 8);
  std::vector<float> times;
  for (int round = 0; round < 9; ++round) {
    cudaEventRecord(start);
    for (int i = 0; i < inner; ++i) run(i % sets);
    cudaEventRecord(stop);
    SP24_CHECK_CUDA(cudaEventSynchronize(stop));
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (round > 0) times.push_back(ms * 1e3f / inner);
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(start), cudaEventDestroy(stop);
  return times[times.size() / 2];
}

inline void report(const std::string& name, double bytes, double us) {
  const double tb_per_s = bytes / us * 1e-6;
  std::printf("%s,%.2f,%.3f,%.1f%%\n", name.c_str(), us, tb_per_s,
              copy_tb_per_s > 0 ? 100 * tb_per_s / copy_tb_per_s : 100.0);
  std::fflush(stdout);
}

inline int sets_for(double bytes) {
  return static_cast<int>(std::max(2.0, std::min(64.0, std::ceil(kRotation / bytes))));
}

inline void bench_copy() {
  const int64_t bytes = int64_t{1} << 30;
  DeviceMemory from(bytes), to(bytes);
  const double us = time_us(2, [&](int i) {
    cudaMemcpyAsync(i ? from.as() : to.as(), i ? to.as() : from.as(), bytes,
                    cudaMemcpyDeviceToDevice);
  });
  copy_tb_per_s = 2.0 * static_cast<double>(bytes) / us * 1e-6;
  report("copy 1 GiB", 2.0 * static_cast<double>(bytes), us);
}

struct BenchWeight {
  DeviceMemory w, mask, packed, E, packed_t, E_t;
  PackArgs args;

  BenchWeight(Shape s, DType dtype, Order order)
      : w(s.rows * s.cols * bytes_of(dtype)),
        mask(s.rows * s.cols / 8),
        packed(s.rows * s.cols),
        E(meta_bytes(s.rows, s.cols)),
        packed_t(s.rows * s.cols),
        E_t(meta_bytes(s.cols, s.rows)) {
    w.fill(dtype, s.rows * s.cols);
    args.w = {w.as(),
              dtype,
              s.rows,
              s.cols,
              order == Order::kRows ? s.cols : 1,
              order == Order::kRows ? 1 : s.rows};
    args.mask = mask.as<uint16_t>(), args.packed = packed.as(), args.packed_t = packed_t.as();
    args.E = E.as<uint8_t>(), args.E_t = E_t.as<uint8_t>();
    cuda::search_mask(&args, 1, nullptr);
  }
};

inline void bench_packing() {
  for (const Shape s :
       {Shape{14336, 4096}, Shape{11008, 4096}, Shape{4096, 11008}, Shape{3072, 768}}) {
    for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
      for (Order order : kOrders) {
        const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols),
                     in = bytes_of(dtype);
        const int sets = sets_for(elements * (in + 2.375));
        std::vector<std::unique_ptr<BenchWeight>> weights;
        for (int i = 0; i < sets; ++i)
          weights.push_back(std::make_unique<BenchWeight>(s, dtype, order));
        const std::string what =
            concat(" ", s.rows, "x", s.cols, " ", sparse24::name_of(dtype), " by ", name_of(order));
        report("pack_by_mask" + what, elements * (in + 2.375),
               time_us(sets, [&](int i) { cuda::pack_by_mask(&weights[i]->args, 1, nullptr); }));
        report("search_and_pack" + what, elements * (in + 2.375),
               time_us(sets, [&](int i) { cuda::search_and_pack(&weights[i]->args, 1, nullptr); }));
        report("search_mask" + what, elements * (in + 0.125),
               time_us(sets, [&](int i) { cuda::search_mask(&weights[i]->args, 1, nullptr); }));
      }
    }
  }
  for (DType dtype : {DType::kBFloat16,
                      DType::kFloat32}) {  // all FFN weights of GPT-2 124M, several models in turn
    const double elements = 24.0 * 3072 * 768, in = bytes_of(dtype);
    std::vector<std::unique_ptr<BenchWeight>> weights;
    std::vector<PackArgs> args;
    for (int i = 0; i < 48; ++i) {
      weights.push_back(std::make_unique<BenchWeight>(i % 2 ? Shape{3072, 768} : Shape{768, 3072},
                                                      dtype, Order::kRows));
      args.push_back(weights.back()->args);
    }
    const std::string what = concat(" 24 of 3072x768 ", sparse24::name_of(dtype));
    report("pack_by_mask" + what, elements * (in + 2.375),
           time_us(2, [&](int i) { cuda::pack_by_mask(&args[24 * i], 24, nullptr); }));
    report("search_and_pack" + what, elements * (in + 2.375),
           time_us(2, [&](int i) { cuda::search_and_pack(&args[24 * i], 24, nullptr); }));
  }
}

inline void bench_mvue() {
  for (const Shape s :
       {Shape{8192, 11008}, Shape{16384, 14336}, Shape{16384, 4096}, Shape{16384, 3072}}) {
    for (Order order : kOrders) {
      const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols);
      const int sets = sets_for(elements * 3.125);
      std::vector<std::unique_ptr<DeviceMemory>> dy, packed, E;
      for (int i = 0; i < sets; ++i) {
        dy.push_back(std::make_unique<DeviceMemory>(s.rows * s.cols * 2)),
            packed.push_back(std::make_unique<DeviceMemory>(s.rows * s.cols));
        E.push_back(std::make_unique<DeviceMemory>(meta_bytes(s.cols, s.rows)));
        dy.back()->fill(DType::kBFloat16, s.rows * s.cols);
      }
      DeviceMemory seed(16);
      cudaMemset(seed.as(), 7, 16);
      report(concat("mvue_pack ", s.rows, "x", s.cols, " by ", name_of(order)), elements * 3.125,
             time_us(sets, [&](int i) {
               const ConstMatrix view = {dy[i]->as(),
                                         DType::kBFloat16,
                                         s.rows,
                                         s.cols,
                                         order == Order::kRows ? s.cols : 1,
                                         order == Order::kRows ? 1 : s.rows};
               cuda::mvue_pack({view, seed.as<int64_t>(), packed[i]->as(), E[i]->as<uint8_t>()},
                               nullptr);
             }));
    }
  }
}

inline void bench_decay() {
  const Shape s = {14336, 4096};
  const double elements = static_cast<double>(s.rows) * static_cast<double>(s.cols);
  for (DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (Order order : kOrders) {
      DeviceMemory grad(s.rows * s.cols * 4), w(s.rows * s.cols * 4), mask(s.rows * s.cols / 8),
          mask_b(s.rows * s.cols / 8), flips(8);
      grad.fill(dtype, s.rows * s.cols), w.fill(dtype, s.rows * s.cols);
      mask.fill(DType::kBFloat16, s.rows * s.cols / 16),
          mask_b.fill(DType::kBFloat16, s.rows * s.cols / 16);
      const int64_t row_stride = order == Order::kRows ? s.cols : 1,
                    col_stride = order == Order::kRows ? 1 : s.rows;
      const MaskedDecayArgs args = {{grad.as(), dtype, s.rows, s.cols, row_stride, col_stride},
                                    {w.as(), dtype, s.rows, s.cols, row_stride, col_stride},
                                    mask.as<uint16_t>(),
                                    1e-7f,
                                    nullptr};
      report(concat("masked_decay 14336x4096 ", sparse24::name_of(dtype), " by ", name_of(order)),
             elements * (3.0 * bytes_of(dtype) + 0.125),
             time_us(1, [&](int) { cuda::masked_decay(&args, 1, nullptr); }));
      if (order == Order::kColumns || dtype == DType::kFloat32) continue;
      const MaskFlipsArgs flip_args = {mask.as<uint16_t>(), mask_b.as<uint16_t>(),
                                       s.rows * s.cols / 16, flips.as<int64_t>()};
      report("mask_flips 14336x4096 (warm)", elements * 0.25,
             time_us(1, [&](int) { cuda::mask_flips(&flip_args, 1, nullptr); }));
      const ConstMatrix view = {w.as(), dtype, s.rows, s.cols, row_stride, col_stride};
      report("mask_gap 14336x4096", elements * 2.25,
             time_us(1, [&](int) { cuda::mask_gap(view, grad.as<float>(), nullptr); }));
    }
  }
}

inline void bench_activations() {
  for (const Shape s : {Shape{8192, 11008}, Shape{16384, 14336}, Shape{16384, 3072}}) {
    const int64_t tokens = s.rows, d_ff = s.cols;
    const double elements = static_cast<double>(tokens) * static_cast<double>(d_ff);
    const int sets = sets_for(elements * 6);
    std::vector<std::unique_ptr<DeviceMemory>> in, h, d_h, d_in, packed, E;
    for (int i = 0; i < sets; ++i) {
      in.push_back(std::make_unique<DeviceMemory>(tokens * d_ff * 4)),
          d_in.push_back(std::make_unique<DeviceMemory>(tokens * d_ff * 4));
      h.push_back(std::make_unique<DeviceMemory>(tokens * d_ff * 2)),
          d_h.push_back(std::make_unique<DeviceMemory>(tokens * d_ff * 2));
      packed.push_back(std::make_unique<DeviceMemory>(tokens * d_ff * 2)),
          E.push_back(std::make_unique<DeviceMemory>(meta_bytes(2 * d_ff, tokens)));
      in.back()->fill(DType::kBFloat16, tokens * d_ff * 2),
          d_h.back()->fill(DType::kBFloat16, tokens * d_ff);
    }
    DeviceMemory seed(16);
    cudaMemset(seed.as(), 7, 16);
    const auto view = [&](auto* data, int64_t cols, Order order) {
      MatrixView<decltype(data)> m = {data,
                                      DType::kBFloat16,
                                      tokens,
                                      cols,
                                      order == Order::kRows ? cols : 1,
                                      order == Order::kRows ? 1 : tokens};
      return m;
    };
    const auto constant = [&](void* data, int64_t cols, Order order) {
      return view(static_cast<const void*>(data), cols, order);
    };
    const std::string shape = concat(" ", tokens, "x", d_ff);
    for (Activation kind : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh}) {
      for (Order in_order : kOrders) {
        for (Order h_order : kOrders) {
          if (kind != Activation::kSilu && in_order != h_order) continue;
          report(concat("forward", shape, " kind ", static_cast<int>(kind), " in by ",
                        name_of(in_order), ", out by ", name_of(h_order)),
                 elements * 6, time_us(sets, [&](int i) {
                   cuda::activation_forward({kind, true, constant(in[i]->as(), 2 * d_ff, in_order),
                                             view(h[i]->as(), d_ff, h_order)},
                                            nullptr);
                 }));
        }
      }
    }
    report(concat("forward plain", shape, " kind 2 by rows"), elements * 4,
           time_us(sets, [&](int i) {
             cuda::activation_forward(
                 {Activation::kGeluTanh, false, constant(in[i]->as(), d_ff, Order::kRows),
                  view(h[i]->as(), d_ff, Order::kRows)},
                 nullptr);
           }));
    for (int fused = 0; fused < 2; ++fused) {
      for (Activation kind : {Activation::kSilu, Activation::kGeluTanh}) {
        for (int orders : {0, 1, 2, 3}) {  // gate_up by columns: 1; d_h, d_gate_up by columns: 2
          const Order in_order = kOrders[orders & 1], d_order = kOrders[orders >> 1];
          report(concat(fused ? "backward + mvue" : "backward", shape, " kind ",
                        static_cast<int>(kind), " gate_up by ", name_of(in_order),
                        ", gradients by ", name_of(d_order)),
                 elements * (fused ? 12.25 : 10), time_us(sets, [&](int i) {
                   ActivationBackwardArgs args;
                   args.kind = kind, args.d_h = constant(d_h[i]->as(), d_ff, d_order);
                   args.gate_up = constant(in[i]->as(), 2 * d_ff, in_order),
                   args.d_gate_up = view(d_in[i]->as(), 2 * d_ff, d_order);
                   if (fused)
                     args.seed = seed.as<int64_t>(), args.packed = packed[i]->as(),
                     args.E = E[i]->as<uint8_t>();
                   cuda::activation_backward(args, nullptr);
                 }));
        }
      }
    }
  }
}

inline void run_benchmarks() {
  std::printf("what,us,TB/s,of copy\n");
  bench_copy();
  bench_packing();
  bench_mvue();
  bench_decay();
  bench_activations();
}

}  // namespace gpu_testing
