// kernel.h: one sparse GEMM kernel for Hopper, out of CUTLASS' parts and our main loop.
//
//   out(m, n) = lhs(m, k) rhs(k, n) [+ bias(m)] [+ out(m, n)],  lhs 2:4 sparse along k
//
//   forward      packed [m, k/2] K-major    rhs [n, k] K-major    out [n, m], m contiguous
//   grad_input   packed [k/2, m] MN-major   rhs [n, k] K-major    out [n, m], m contiguous
//   grad_weight  packed [k/2, m] MN-major   rhs [k, n] MN-major   out [m, n], n contiguous
//
// Roles     one warp loads by TMA; two warpgroups multiply, 64 rows of the tile each, and store by
// TMA through shared
//           memory; persistent over tiles.
// Stages    as many K tiles as fit beside the epilogue: four of 41 KB at 128x256x64.
// Bytes     a K tile of 64 at 128x256: lhs 8 KB + E 1 KB + rhs 32 KB for 2 x 256 x 128 x 64 dense
// flops. Epilogue  alpha acc + beta out + bias, beta and bias at run time: a null bias and beta = 0
// read nothing.
#pragma once

#include <atomic>

#include "common/cuda_check.h"
#include "common/metadata.h"
#include "cute/tensor.hpp"
#include "cutlass/cluster_launch.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "gemm/config.h"
#include "gemm/launch.h"
#include "gemm/sm90/mainloop.h"
#include "sparse24/compress.h"

namespace sparse24::gemm::sm90 {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kFloat32> {
  using type = float;
};
template <>
struct ElementOf<DType::kBFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<DType::kFloat16> {
  using type = cutlass::half_t;
};

template <GemmPass kPass, DType kDType, DType kOutDType, int kTileM, int kTileN, int kTileK,
          int kClusterM, int kClusterN>
struct SparseGemm {
  using Element = typename ElementOf<kDType>::type;
  using Output = typename ElementOf<kOutDType>::type;
  using TileShape = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kTileK>>;
  using ClusterShape = cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>;

  // CUTLASS names layouts after BLAS: RowMajor lhs is K-major, ColumnMajor rhs is K-major.
  using LayoutLhs = cute::conditional_t<kPass == GemmPass::kForward, cutlass::layout::RowMajor,
                                        cutlass::layout::ColumnMajor>;
  using LayoutRhs = cute::conditional_t<kPass == GemmPass::kGradWeight, cutlass::layout::RowMajor,
                                        cutlass::layout::ColumnMajor>;
  using LayoutOut = cute::conditional_t<kPass == GemmPass::kGradWeight, cutlass::layout::RowMajor,
                                        cutlass::layout::ColumnMajor>;
  static constexpr int kAlignment =
      8;  // elements of 16 bits: 16 bytes, what TMA wants of every row
  static constexpr int kOutAlignment = 16 / sizeof(Output);

  using Fusion =
      cutlass::epilogue::fusion::LinCombPerRowBias<Output, float, Element, Output, float>;
  // CUTLASS keeps four epilogue tiles in shared memory: 32 KB, whatever the output. Half of that
  // would leave room for a fifth stage, but stores of narrower tiles cost short K loops more than
  // the stage gives (docs/kernels/gemm.md).
  using EpilogueTile = cute::Shape<cute::Int<kTileM>, cute::Int<64 / sizeof(Output)>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, TileShape, ClusterShape,
      EpilogueTile, float, float, Output, LayoutOut, kOutAlignment, Output, LayoutOut,
      kOutAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using StockMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, LayoutLhs, kAlignment,
      Element, LayoutRhs, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Mainloop = SparseMainloop<StockMainloop>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, cutlass::gemm::PersistentScheduler>;

  static typename Kernel::Arguments arguments(const SparseGemmArgs& args, const GemmConfig& config,
                                              int multiprocessors) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n),
              k = static_cast<int>(args.k);
    // The gradient operand is padded with zero rows; rhs ends at k, and TMA fills zeros past it.
    const int packed_k =
        kPass == GemmPass::kGradWeight ? static_cast<int>(padded_tokens(args.k)) : k;
    const auto packed_shape = cute::make_shape(m, n, packed_k, 1);

    typename Kernel::Arguments out{};
    out.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    out.problem_shape = {m, n, k, 1};
    out.mainloop.ptr_A = static_cast<const Element*>(args.packed);
    out.mainloop.layout_a = StockMainloop::SparseConfig::fill_layoutA(packed_shape);
    out.mainloop.ptr_E = reinterpret_cast<const typename StockMainloop::ElementE*>(args.E);
    out.mainloop.layout_e = StockMainloop::SparseConfig::fill_layoutE(packed_shape);
    out.mainloop.ptr_B = static_cast<const Element*>(args.rhs);
    set_leading_dimension(out.mainloop.dB, args.rhs_ld);
    out.epilogue.thread.alpha = 1.0f;
    out.epilogue.thread.beta = args.accumulate ? 1.0f : 0.0f;
    out.epilogue.thread.bias_ptr = static_cast<const Element*>(args.bias);
    out.epilogue.ptr_C = static_cast<const Output*>(args.out);
    out.epilogue.ptr_D = static_cast<Output*>(args.out);
    set_leading_dimension(out.epilogue.dC, args.out_ld);
    set_leading_dimension(out.epilogue.dD, args.out_ld);
    out.hw_info.sm_count = multiprocessors;
    out.scheduler.max_swizzle_size = config.swizzle;
    using Order = typename Kernel::TileScheduler::RasterOrderOptions;
    out.scheduler.raster_order = config.raster == Raster::kAlongM ? Order::AlongM : Order::AlongN;
    return out;
  }

  static void launch(const SparseGemmArgs& args, const GemmConfig& config, int device,
                     int multiprocessors, cudaStream_t stream) {
    allow_shared_memory(device);
    auto params =
        Kernel::to_underlying_arguments(arguments(args, config, multiprocessors), args.workspace);
    const dim3 grid = Kernel::get_grid_shape(params), cluster(kClusterM, kClusterN, 1);
    void* kernel_args[] = {&params};
    const auto status = cutlass::ClusterLauncher::launch(
        grid, cluster, Kernel::get_block_shape(), Kernel::SharedStorageSize, stream,
        reinterpret_cast<const void*>(&cutlass::device_kernel<Kernel>), kernel_args);
    SP24_CHECK(status == cutlass::Status::kSuccess,
               "sparse_gemm launch failed: ", cudaGetErrorString(cudaGetLastError()));
  }

 private:
  /// A stride of (ld, 1, 0) or (1, ld, 0): the constant one is fixed by the type.
  template <typename Stride>
  static void set_leading_dimension(Stride& stride, int64_t ld) {
    if constexpr (cute::is_static_v<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>) {
      cute::get<1>(stride) = ld;
    } else {
      cute::get<0>(stride) = ld;
    }
  }

  /// More than 48 KB of shared memory must be asked for, once on each device.
  static void allow_shared_memory(int device) {
    static std::atomic<uint64_t> asked{0};
    const uint64_t bit = uint64_t{1} << (device % 64);
    if (device < 64 && (asked.load(std::memory_order_relaxed) & bit)) return;
    SP24_CHECK_CUDA(cudaFuncSetAttribute(cutlass::device_kernel<Kernel>,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         Kernel::SharedStorageSize));
    asked.fetch_or(bit, std::memory_order_relaxed);
  }
};

}  // namespace sparse24::gemm::sm90

/// The body of an instantiation file: the launcher of one row of kernels.def.
#define SP24_DEFINE_GEMM_KERNEL(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m,        \
                                cluster_n)                                                        \
  namespace sparse24::gemm {                                                                      \
  void SP24_GEMM_LAUNCHER(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m,              \
                          cluster_n)(const SparseGemmArgs& args, const GemmConfig& config,        \
                                     int device, int multiprocessors, cudaStream_t stream) {      \
    sm90::SparseGemm<GemmPass::k##pass, DType::k##dtype, DType::k##out_dtype, tile_m, tile_n,     \
                     tile_k, cluster_m, cluster_n>::launch(args, config, device, multiprocessors, \
                                                           stream);                               \
  }                                                                                               \
  }
