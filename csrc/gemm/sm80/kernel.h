// kernel.h: one sparse GEMM kernel for sm_80, 86 and 89, with mma.sp. 8 bits from sm_89 on.
//
//   out(m, n) = [scale *] lhs(m, k) rhs(k, n) [+ bias(m)] [+ out(m, n)] [+ decay(m, n)],
//   lhs 2:4 along k
//
//   K-major, K-major     forward               packed [m, k/2]   rhs [n, k]   out [n, m]
//                        forward_of_input      the same                       out [m, n]
//                        8 bits, all passes    the same                       out as of 16 bits
//   K-major, MN-major    grad_input_of_output  packed [m, k/2]   rhs [k, n]   out [m, n]
//   MN-major, K-major    grad_input            packed [k/2, m]   rhs [n, k]   out [n, m]
//   MN-major, MN-major   grad_weight           packed [k/2, m]   rhs [k, n]   out [m, n]
//                        grad_weight_of_input  the same                       out [n, m]
//
//   With a forward product, if wanted, h = act(out), or act(gate) * up of two halves.
//
// Parts     a ring of cp.async and mma.sp (mainloop.h, loader.h), sums to memory (epilogue.h), the
//           order of the tiles and stream-K as on Hopper (gemm/scheduler.h). One block a
//           multiprocessor goes through its tiles; the first K tiles of the next arrive while the
//           sums of one are stored.
// Compiles  in seconds: nothing here is CUTLASS' but a division by constants.
#pragma once

#include <algorithm>
#include <atomic>

#include "common/cuda_check.h"
#include "common/metadata.h"
#include "gemm/config.h"
#include "gemm/scheduler.h"
#include "gemm/sm80/epilogue.h"
#include "gemm/sm80/launch.h"
#include "gemm/sm80/mainloop.h"
#include "gemm/sm80/partial_sums.h"

namespace sparse24::gemm::sm80 {

template <DType kFormat>
struct StorageOf;
template <>
struct StorageOf<DType::kBFloat16> {
  using type = BFloat16;
};
template <>
struct StorageOf<DType::kFloat16> {
  using type = Float16;
};
template <>
struct StorageOf<DType::kFloat8E4M3> {  // of outputs
  using type = BFloat16;
};

/// `Name` is what profilers and ptxas call it: the row of kernels.def (cmake/allowed_spills.txt).
template <typename Mainloop_, typename Name>
struct Kernel {
  using Mainloop = Mainloop_;
  using TileScheduler = Scheduler<1, 1>;
  static constexpr int kThreads = Mainloop::kThreads;
  static constexpr int kSums = Mainloop::kTileM * Mainloop::kTileN / kThreads;
  using Sums = PartialSums<kThreads, kSums>;
  using Storer = Epilogue<typename StorageOf<Mainloop::kFormat>::type, Mainloop::kElementBytes,
                          Mainloop::Lhs::kKMajor || !Mainloop::Rhs::kKMajor>;

  struct Params {
    typename Mainloop::Params mainloop;
    EpilogueParams epilogue;
    TileScheduler::Params scheduler;
    typename Sums::Params sums;
  };
  static int shared_bytes(int stages) { return stages * Mainloop::kStageBytes; }

  CUTLASS_DEVICE static void run(const Params& params, char* shared) {
    // Staged lines are exchanged within 128 bytes: stages begin at multiples of that.
    static_assert(Mainloop::kStageBytes % 128 == 0);
    static_assert(kThreads / 32 * kChunkBytes <= Mainloop::kStageBytes);
    TileScheduler scheduler(params.scheduler);
    Mainloop mainloop(params.mainloop, shared, thread_in_block());
    Part part = scheduler.next();
    if (part.valid) mainloop.start(part, thread_in_block());
    while (part.valid) {
      typename Mainloop::Sums sums;
      mainloop.multiply(sums, part.k_tiles());
      const Part next = scheduler.next();
      if (next.valid) mainloop.start(next, thread_in_block());
      finish(params, scheduler, part, shared + mainloop.free_stage(), sums);
      part = next;
    }
  }

 private:
  /// Sums of a part to who owns its tile, or the tile's to memory by way of `chunks`, which all
  /// threads have read when they meet in the next multiply().
  CUTLASS_DEVICE static void finish(const Params& params, const TileScheduler& scheduler,
                                    const Part& part, char* chunks, typename Mainloop::Sums& sums) {
    const int thread = thread_in_block();
    float* const all = &sums[0][0][0];
    if (part.slot >= 0) {
      Sums::give(params.sums, part.slot, thread, all);
      return;
    }
    scheduler.for_each_slot(part, [&](int slot) { Sums::add(params.sums, slot, thread, all); });
    const int warp = thread / 32;
    float* const chunk = reinterpret_cast<float*>(chunks + warp * kChunkBytes);
    Storer(params.epilogue, chunk, part.m_tile * Mainloop::kTileM, part.n_tile * Mainloop::kTileN,
           warp % Mainloop::kWarpsM, warp / Mainloop::kWarpsM, thread % 32)
        .store(sums);
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    sparse_gemm_kernel(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(128) char sparse_gemm_shared[];
  Kernel::run(params, sparse_gemm_shared);
}

template <typename Name, Orientation kLhs, Orientation kRhs, DType kFormat, int kTileM, int kTileN,
          int kTileK_>
struct SparseGemm {
  using Loop = Mainloop<kFormat, kLhs, kRhs, kTileM, kTileN>;
  static_assert(kTileK_ == Loop::kTileK, "blocks of E are as long as a K tile");
  using Kernel = sm80::Kernel<Loop, Name>;

  static typename Kernel::Params params_of(const SparseGemmArgs& args, const GemmConfig& config,
                                           const Target& target, int stages) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n),
              k = static_cast<int>(args.k);
    // A gradient operand of 16 bits is padded with zero rows; rhs ends at k, and zeros follow.
    const int packed_k = is_grad_weight(args.pass) ? static_cast<int>(round_up(args.k, 8)) : k;
    const int width = args.epilogue == GemmEpilogue::kGate ? m / 2 : 0;
    typename Kernel::Params params;
    const int lhs_ld = kLhs == Orientation::kKMajor ? packed_k / 2 : m;
    params.mainloop.lhs = Loop::lhs_of(args.lhs.values, lhs_ld, m, packed_k / 2, width);
    params.mainloop.rhs = Loop::rhs_of(args.rhs.values, args.rhs.ld, n, k);
    params.mainloop.meta = Loop::Meta::source_of(args.lhs.E, m, width);
    params.mainloop.width = width;
    params.mainloop.stages = stages;
    params.epilogue = {m,
                       n,
                       width,
                       !is_m_by_n(args.pass),
                       args.out_dtype == DType::kFloat32,
                       args.accumulate,
                       args.out,
                       args.out_ld,
                       args.bias,
                       args.decay,
                       args.epilogue,
                       args.activation,
                       args.h,
                       args.h_ld,
                       args.lhs.scale,
                       args.rhs.scale};
    params.scheduler = Kernel::TileScheduler::to_params(
        m, n, k, kTileM, kTileN, kTileK_, config.strip, config.raster == Raster::kAlongM,
        config.stream_k, target.multiprocessors);
    params.sums = Kernel::Sums::to_params(args.workspace, params.scheduler.grid_clusters);
    return params;
  }

  static void launch(const SparseGemmArgs& args, const GemmConfig& config, const Target& target) {
    const int stages = stages_in(target.shared_bytes, Loop::kStageBytes);
    SP24_CHECK(stages >= 2, "sparse_gemm needs ", Kernel::shared_bytes(2),
               " bytes of shared memory a block, and the GPU has ", target.shared_bytes);
    allow_shared_memory(target.device);
    const auto stream = static_cast<cudaStream_t>(target.stream);
    typename Kernel::Params params = params_of(args, config, target, stages);
    const dim3 grid = Kernel::TileScheduler::grid(params.scheduler);
    if (config.stream_k) {
      SP24_CHECK_CUDA(cudaMemsetAsync(args.workspace, 0, stream_k_flag_bytes(grid.x), stream));
    }
    void* kernel_args[] = {&params};
    SP24_CHECK_CUDA(cudaLaunchKernel(reinterpret_cast<const void*>(&sparse_gemm_kernel<Kernel>),
                                     grid, dim3(Kernel::kThreads), kernel_args,
                                     Kernel::shared_bytes(stages), stream));
  }

 private:
  /// More than 48 KB of shared memory must be asked for, once on each device.
  static void allow_shared_memory(int device) {
    static std::atomic<uint64_t> asked{0};
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device < 64 && (asked.load(std::memory_order_relaxed) & bit)) return;
    int most = 0;
    SP24_CHECK_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    SP24_CHECK_CUDA(cudaFuncSetAttribute(sparse_gemm_kernel<Kernel>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         std::min(most, Kernel::shared_bytes(kMostStages))));
    asked.fetch_or(bit, std::memory_order_relaxed);
  }
};

}  // namespace sparse24::gemm::sm80

/// The body of a generated file: the launcher of one row of kernels.def.
#define SP24_DEFINE_GEMM_KERNEL(lhs, rhs, format, ...)                                            \
  namespace sparse24::gemm::sm80 {                                                                \
  struct SP24_SM80_NAME(lhs, rhs, format, __VA_ARGS__);                                           \
  void SP24_SM80_LAUNCHER(lhs, rhs, format, __VA_ARGS__)(const SparseGemmArgs& args,              \
                                                         const GemmConfig& config,                \
                                                         const Target& target) {                  \
    SparseGemm<SP24_SM80_NAME(lhs, rhs, format, __VA_ARGS__), Orientation::k##lhs,                \
               Orientation::k##rhs, DType::k##format, __VA_ARGS__>::launch(args, config, target); \
  }                                                                                               \
  }
