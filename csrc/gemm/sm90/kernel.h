// kernel.h: one sparse GEMM kernel for Hopper, out of CUTLASS' parts and our main loop.
//
//   out(m, n) = [scale *] lhs(m, k) rhs(k, n) [+ bias(m)] [+ out(m, n)] [+ decay(m, n)],
//   lhs 2:4 sparse along k; decay in weight gradients alone
//
//   16 bits      forward                packed [m, k/2] K-major    rhs [n, k] K-major   out [n, m]
//                grad_input             packed [k/2, m] MN-major   rhs [n, k] K-major   out [n, m]
//                grad_weight            packed [k/2, m] MN-major   rhs [k, n] MN-major  out [m, n]
//                grad_weight_of_input   packed [k/2, m] MN-major   rhs [k, n] MN-major  out [n, m]
//                forward_of_input       packed [m, k/2] K-major    rhs [n, k] K-major   out [m, n]
//                grad_input_of_output   packed [m, k/2] K-major    rhs [k, n] MN-major  out [m, n]
//   8 bits       the first four         packed [m, k/2] K-major    rhs [n, k] K-major   as above
//
//   With a forward product, if wanted, h = act(out), or act(gate) * up of two halves.
//
// Parts     loads by TMA are CUTLASS' sparse collective, told of other rows by gated_rows.h; main
//           loop (mainloop.h), epilogues (epilogue.h, activated_epilogue.h), order of the tiles
//           (scheduler.h) and the kernel that joins them (persistent.h) are ours.
// Stages    as many K tiles as fit beside the epilogue's 32 or 48 KB: four at 128x256, five at
//           128x192.
// Bytes     a K tile of 64 at 128x256: lhs 8 KB + E 1 KB + rhs 32 KB for 2 x 256 x 128 x 64 dense
//           flops; rhs comes once for the two blocks of a cluster. With 8 bits the same, of 128 k,
//           but for E, 2 KB.
// Bound     8192 tokens, 4096 -> 11008: 739 GFLOP in dense count, 373 us at the 1979 TFLOP/s of an
//           H200's sparse bf16; 8 bits half of it.
#pragma once

#include <atomic>

#include "common/cuda_check.h"
#include "common/metadata.h"
#include "cute/tensor.hpp"
#include "cutlass/device_kernel.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "gemm/config.h"
#include "gemm/sm90/activated_epilogue.h"
#include "gemm/sm90/epilogue.h"
#include "gemm/sm90/gated_rows.h"
#include "gemm/sm90/launch.h"
#include "gemm/sm90/mainloop.h"
#include "gemm/sm90/persistent.h"

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
template <>
struct ElementOf<DType::kFloat8E4M3> {
  using type = cutlass::float_e4m3_t;
};
template <>
struct ElementOf<DType::kFloat8E5M2> {
  using type = cutlass::float_e5m2_t;
};

constexpr int kSharedBytesOfBlock = 227 * 1024;

/// How many K tiles of both operands and E fit into shared memory.
template <int kTileM, int kTileN, int kTileK, int kElementBytes>
struct Stages {
  static constexpr int kBytes =
      kTileM * kTileK / 2 * kElementBytes + kTileM * kTileK / 8 + kTileN * kTileK * kElementBytes;
  static constexpr int fitting(int beside) { return (kSharedBytesOfBlock - beside) / kBytes; }
};

template <typename Name, GemmPass kPass, GemmEpilogue kEpilogue, DType kFormat, DType kOutDType,
          Accumulation kAccumulation, int kTileM, int kTileN, int kTileK, int kClusterM,
          int kClusterN>
struct SparseGemm {
  static constexpr bool kFloat8 = is_float8(kFormat);
  using ElementLhs = typename ElementOf<kFormat>::type;
  using ElementRhs = typename ElementOf<kFloat8 ? DType::kFloat8E4M3 : kFormat>::type;
  using Output = typename ElementOf<kOutDType>::type;
  using Bias = cute::conditional_t<kFloat8, Output, ElementRhs>;
  using TileShape = cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kTileK>>;
  using ClusterShape = cute::Shape<cute::Int<kClusterM>, cute::Int<kClusterN>, cute::_1>;

  static constexpr bool kGated = kEpilogue == GemmEpilogue::kGate;
  static constexpr bool kActivated = kEpilogue != GemmEpilogue::kPlain;
  static constexpr bool kMContiguous = !is_m_by_n(kPass);

  // CUTLASS names layouts after BLAS: RowMajor lhs is K-major, ColumnMajor rhs is K-major.
  using LayoutLhs = cute::conditional_t<lhs_orientation(kPass, kFormat) == Orientation::kKMajor,
                                        cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using LayoutRhs = cute::conditional_t<rhs_orientation(kPass, kFormat) == Orientation::kKMajor,
                                        cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignment = 16 / sizeof(ElementRhs);  // what TMA wants of every row

  using Epilogue = cute::conditional_t<
      kActivated, ActivatedEpilogue<Output, TileShape, kGated, kFloat8>,
      WarpgroupEpilogue<Bias, Output, TileShape, kMContiguous, is_grad_weight(kPass), kFloat8>>;
  // Barriers, and the gap up to the 1024 bytes that swizzled tiles are aligned to.
  static constexpr int kSharedBesideStages = sizeof(typename Epilogue::TensorStorage) + 1024;
  // For 8 bits the name of the schedule that picks the same collective; sums are ours (mainloop.h).
  using Schedule =
      cute::conditional_t<kFloat8, cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum,
                          cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, ElementLhs, LayoutLhs, kAlignment,
      ElementRhs, LayoutRhs, kAlignment, float, TileShape, ClusterShape,
      cutlass::gemm::collective::StageCount<
          Stages<kTileM, kTileN, kTileK, sizeof(ElementRhs)>::fitting(kSharedBesideStages)>,
      Schedule>::CollectiveOp;
  using SparseConfig = typename Collective::SparseConfig;
  using Mainloop = SparseMainloop<typename InTurns<Collective, kGated>::type, kGated,
                                  kAccumulation == Accumulation::kPromoted>;
  using Kernel = PersistentKernel<Mainloop, Epilogue, ClusterShape, Name>;
  static_assert(Kernel::kSharedBytes <= kSharedBytesOfBlock);

  static typename Kernel::Params params_of(const SparseGemmArgs& args, const GemmConfig& config,
                                           int multiprocessors) {
    const int m = static_cast<int>(args.m), n = static_cast<int>(args.n),
              k = static_cast<int>(args.k);
    // A 16-bit gradient operand is padded with zero rows; rhs ends at k, and TMA fills zeros past
    // it. 8-bit ones are both of whole units.
    const int packed_k = is_grad_weight(kPass) ? static_cast<int>(round_up(args.k, 8)) : k;
    const auto packed_shape = cute::make_shape(m, n, packed_k, 1);
    const auto problem = cute::make_shape(m, n, k, 1);

    typename Mainloop::Arguments operands{};
    operands.ptr_A = static_cast<const ElementLhs*>(args.lhs.values);
    operands.ptr_E = reinterpret_cast<const typename Mainloop::ElementE*>(args.lhs.E);
    if constexpr (kGated) {
      operands.layout_a = gated_packed_layout(m / 2, k);
      operands.layout_e = gated_meta_layout(SparseConfig::fill_layoutE(packed_shape));
    } else {
      operands.layout_a = SparseConfig::fill_layoutA(packed_shape);
      operands.layout_e = SparseConfig::fill_layoutE(packed_shape);
    }
    operands.ptr_B = static_cast<const ElementRhs*>(args.rhs.values);
    set_leading_dimension(operands.dB, args.rhs.ld);

    const auto scheduler = Kernel::TileScheduler::to_params(
        m, n, k, kTileM, kTileN, kTileK, config.strip, config.raster == Raster::kAlongM,
        config.stream_k, multiprocessors);
    const int blocks = scheduler.grid_clusters * kClusterM * kClusterN;
    return {problem, Mainloop::to_underlying_arguments(problem, operands, nullptr),
            Epilogue::to_params(m, n, epilogue_of(args)), scheduler,
            Kernel::Sums::to_params(args.workspace, blocks)};
  }

  static void launch(const SparseGemmArgs& args, const GemmConfig& config, const Target& target) {
    allow_shared_memory(target.device);
    const auto stream = static_cast<cudaStream_t>(target.stream);
    typename Kernel::Params params = params_of(args, config, target.multiprocessors);
    const dim3 grid = Kernel::TileScheduler::grid(params.scheduler);
    if (config.stream_k) {
      SP24_CHECK_CUDA(
          cudaMemsetAsync(args.workspace, 0, stream_k_flag_bytes(grid.x * grid.y), stream));
    }
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kClusterM, kClusterN, 1};
    cudaLaunchConfig_t launch{};
    launch.gridDim = grid;
    launch.blockDim = dim3(Kernel::MaxThreadsPerBlock);
    launch.dynamicSmemBytes = Kernel::kSharedBytes;
    launch.stream = stream;
    launch.attrs = &cluster;
    launch.numAttrs = 1;
    void* kernel_args[] = {&params};
    SP24_CHECK_CUDA(cudaLaunchKernelExC(
        &launch, reinterpret_cast<const void*>(&cutlass::device_kernel<Kernel>), kernel_args));
  }

 private:
  static typename Epilogue::Arguments epilogue_of(const SparseGemmArgs& args) {
    const auto out = static_cast<Output*>(args.out);
    const auto bias = static_cast<const Bias*>(args.bias);
    const Scales scales = {args.lhs.scale, args.rhs.scale};
    if constexpr (kActivated) {
      const auto h = static_cast<Output*>(args.h);
      return {out, args.out_ld, h, args.h_ld, bias, args.activation, scales};
    } else {
      return {out, args.out_ld, bias, args.accumulate, args.decay, scales};
    }
  }

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
                                         Kernel::kSharedBytes));
    asked.fetch_or(bit, std::memory_order_relaxed);
  }
};

}  // namespace sparse24::gemm::sm90

/// The body of a generated file: the launcher of one row of kernels.def.
#define SP24_DEFINE_GEMM_KERNEL(pass, epilogue, format, out_dtype, accumulation, ...)            \
  namespace sparse24::gemm::sm90 {                                                               \
  struct SP24_GEMM_NAME(pass, epilogue, format, out_dtype, accumulation, __VA_ARGS__);           \
  void SP24_GEMM_LAUNCHER(pass, epilogue, format, out_dtype, accumulation,                       \
                          __VA_ARGS__)(const SparseGemmArgs& args, const GemmConfig& config,     \
                                       const Target& target) {                                   \
    SparseGemm<SP24_GEMM_NAME(pass, epilogue, format, out_dtype, accumulation, __VA_ARGS__),     \
               GemmPass::k##pass, GemmEpilogue::k##epilogue, DType::k##format,                   \
               DType::k##out_dtype, Accumulation::k##accumulation, __VA_ARGS__>::launch(args,    \
                                                                                        config,  \
                                                                                        target); \
  }                                                                                              \
  }
