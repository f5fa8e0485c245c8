// persistent.h: the kernel that puts main loop, epilogue and scheduler together.
//
// Roles      one warp of warpgroup 0 loads by TMA. The other two warpgroups multiply, 64 rows of
//            the tile each, and store what they have multiplied. Nothing joins them but the stages
//            that both read.
// Registers  setmaxnreg moves them from the loading warpgroup to the multiplying ones.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/pipeline/pipeline.hpp"
#include "gemm/scheduler.h"
#include "gemm/sm90/partial_sums.h"
#include "gemm/sm90/stage_release.h"

namespace sparse24::gemm::sm90 {

/// `Name` is what profilers and ptxas call it: the row of kernels.def (cmake/allowed_spills.txt).
template <typename Mainloop, typename Epilogue, typename ClusterShape, typename Name>
class PersistentKernel {
 public:
  using TileShape = typename Mainloop::TileShape;
  using TiledMma = typename Mainloop::TiledMma;
  using TileScheduler = Scheduler<cute::size<0>(ClusterShape{}), cute::size<1>(ClusterShape{})>;
  static constexpr int kConsumers = cute::size(TiledMma{});
  static constexpr int kWarpgroups = kConsumers / cutlass::NumThreadsPerWarpGroup;
  static constexpr int kAccumulators =
      cute::size<0>(TileShape{}) * cute::size<1>(TileShape{}) / kConsumers;
  using Sums = PartialSums<kWarpgroups, kAccumulators>;

  // 64 K registers in all, given in units of 8 a thread.
  static constexpr uint32_t kLoadRegisters = 40, kMmaRegisters = 232;
  static_assert(kAccumulators <= 128);
  static_assert(cutlass::NumThreadsPerWarpGroup * (kLoadRegisters + kWarpgroups * kMmaRegisters) <=
                65536);

  // What cutlass::device_kernel asks for.
  using ArchTag = cutlass::arch::Sm90;
  static constexpr uint32_t MaxThreadsPerBlock = kConsumers + cutlass::NumThreadsPerWarpGroup;
  static constexpr uint32_t MinBlocksPerMultiprocessor = 1;
  struct SharedStorage {
    alignas(16) typename Mainloop::PipelineStorage pipeline;
    alignas(1024) typename Epilogue::TensorStorage epilogue;
    alignas(1024) typename Mainloop::TensorStorage mainloop;
  };
  static constexpr int kSharedBytes = sizeof(SharedStorage);

  struct Params {
    cute::Shape<int, int, int, int> problem;  // m, n, k, 1
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    typename TileScheduler::Params scheduler;
    typename Sums::Params sums;
  };

  CUTLASS_DEVICE void operator()(const Params& params, char* smem) {
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(smem);
    const int thread = int(threadIdx.x), warp = cutlass::canonical_warp_idx_sync();
    const bool loads = cutlass::canonical_warp_group_idx() == 0;
    if (warp == 0 && cute::elect_one_sync()) {
      Mainloop::prefetch_tma_descriptors(params.mainloop);
      Epilogue::prefetch_tma_descriptors(params.epilogue);
    }

    typename Pipeline::Params pipeline_params;
    pipeline_params.role =
        loads ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = thread % cutlass::NumThreadsPerWarpGroup == 0;
    pipeline_params.num_consumers = kConsumers;
    pipeline_params.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(shared.pipeline, pipeline_params, ClusterShape{});
    // The barriers of all blocks of a cluster must exist before any of them is used.
    if constexpr (cute::size(ClusterShape{}) > 1) {
      cute::cluster_arrive_relaxed();
      cute::cluster_wait();
    } else {
      __syncthreads();
    }

    TileScheduler scheduler(params.scheduler);
    if (loads) {
      cutlass::arch::warpgroup_reg_dealloc<kLoadRegisters>();
      if (warp == 0) load(params, shared, pipeline, scheduler);
    } else {
      cutlass::arch::warpgroup_reg_alloc<kMmaRegisters>();
      multiply(params, shared, pipeline, scheduler);
    }
  }

 private:
  using Pipeline = typename Mainloop::MainloopPipeline;

  CUTLASS_DEVICE static void load(const Params& params, SharedStorage& shared, Pipeline& pipeline,
                                  TileScheduler& scheduler) {
    using namespace cute;
    Mainloop mainloop;
    const auto inputs = mainloop.load_init(params.problem, params.mainloop);
    const auto k_shape = shape<3>(get<0>(inputs));
    auto state = cutlass::make_producer_start_state<Pipeline>();
    const int lane = cutlass::canonical_lane_idx();
    const uint32_t rank = block_rank_in_cluster();
    for (Part part = scheduler.next(); part.valid; part = scheduler.next()) {
      mainloop.load(params.mainloop, pipeline, state, inputs,
                    make_coord(part.m_tile, part.n_tile, _, 0),
                    make_coord_iterator(idx2crd(part.k_begin, k_shape), k_shape), part.k_tiles(),
                    lane, rank, shared.mainloop);
      state.advance(part.k_tiles());
    }
    mainloop.load_tail(pipeline, state);  // other blocks of the cluster may still signal this one
  }

  CUTLASS_DEVICE static void multiply(const Params& params, SharedStorage& shared,
                                      Pipeline& pipeline, TileScheduler& scheduler) {
    using namespace cute;
    Mainloop mainloop;
    Epilogue epilogue(params.epilogue, shared.epilogue);
    typename Mainloop::PipelineState state;
    TiledMma tiled_mma;
    const auto block_of = [](int slot) {
      return slot * int(size(ClusterShape{})) + int(block_rank_in_cluster());
    };
    for (Part part = scheduler.next(); part.valid; part = scheduler.next()) {
      auto accumulators = partition_fragment_C(tiled_mma, take<0, 2>(TileShape{}));
      const int thread = thread_in_block() - cutlass::NumThreadsPerWarpGroup;
      const StageRelease<ClusterShape, Pipeline> release(shared.pipeline, thread);
      mainloop.multiply(pipeline, release, state, accumulators, part.k_tiles(), thread,
                        shared.mainloop);
      state.advance(part.k_tiles());
      if (part.slot >= 0) {
        Sums::give(params.sums, block_of(part.slot), thread, accumulators);
        continue;
      }
      scheduler.for_each_slot(
          part, [&](int slot) { Sums::add(params.sums, block_of(slot), thread, accumulators); });
      epilogue.store(params.problem, part.m_tile, part.n_tile, accumulators, thread);
    }
    epilogue.finish();
  }
};

}  // namespace sparse24::gemm::sm90
