// mainloop.h: the K loop of the sparse GEMM on Hopper, with one batch of wgmma always in flight.
//
// CUTLASS' sparse collective supplies the types, the TMA loads and the shared-memory layouts. Its
// own loop waits for a K tile's wgmma before it fetches the metadata of the next, so the tensor
// cores drain once a tile. This loop keeps the previous tile's wgmma running meanwhile: metadata
// registers are double-buffered, and a stage goes back to the producer one tile later, when the
// wait for the batch after it shows that it has been read.
//
// Promoted  sums of 8-bit products: the tensor cores add them with some 14 bits, so the sums of
//           every two K tiles (256 k) are added to accumulators in fp32. The tensor cores are the
//           other warpgroup's meanwhile.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "gemm/sm90/metadata_words.h"

namespace sparse24::gemm::sm90 {

/// kGated: rows come in turns from the two halves of the weight (gated_rows.h).
template <typename Stock, bool kGated = false, bool kPromoted = false>
struct SparseMainloop : Stock {
  using Stock::Stock;
  using typename Stock::MainloopPipeline;
  using typename Stock::Params;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using typename Stock::TiledMma;
  using typename Stock::TileShape;

  static constexpr int kElementBytes = sizeof(typename Stock::ElementB);
  static constexpr int kTileM = cute::size<0>(TileShape{});
  static constexpr int kTileK = cute::size<2>(TileShape{});
  static constexpr int kStages = Stock::DispatchPolicy::Stages;
  static constexpr int kMetaStageBytes = kTileM * kTileK / 8;
  static_assert(kTileK * kElementBytes == 128, "E's blocks are as long as a K tile");

  static constexpr int kWarpgroups = cute::size(TiledMma{}) / cutlass::NumThreadsPerWarpGroup;
  static constexpr int kMmaK = 2;  // wgmma steps along a K tile, of 64 bytes of rhs' rows
  static_assert(kTileM == 64 * kWarpgroups);

  /// The metadata words of one K tile, for one thread: one for each step.
  using MetaFragment =
      decltype(cute::make_tensor<uint32_t>(cute::Shape<cute::_1, cute::_1, cute::Int<kMmaK>>{}));

  /// The sums of `k_tiles` from stage `read` on; `release` gives a stage back (stage_release.h).
  template <typename Release, typename Accumulators>
  CUTLASS_DEVICE static void multiply(MainloopPipeline& pipeline, const Release& release,
                                      PipelineState read, Accumulators& accumulators, int k_tiles,
                                      int thread, TensorStorage& shared) {
    using namespace cute;
    const int warpgroup = __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);
    Tensor sA = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Stock::SmemLayoutA{});
    Tensor sB = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Stock::SmemLayoutB{});
    // wgmma operands come from shared memory: a thread's slice is its warpgroup's, and fragments
    // are descriptors.
    auto slice = TiledMma{}.get_thread_slice(warpgroup * cutlass::NumThreadsPerWarpGroup);
    Tensor a = slice.make_fragment_A(slice.partition_A(sA));  // (MMA, MMA_M, MMA_K, stage)
    Tensor b = slice.make_fragment_B(slice.partition_B(sB));  // (MMA, MMA_N, MMA_K, stage)
    static_assert(decltype(size<2>(a))::value == kMmaK);
    const MetadataWords<kElementBytes, kGated> meta(&shared.smem_E, thread);
    TiledMma tiled_mma;
    Lead lead(warpgroup, k_tiles);

    /// Starts the products of the next K tile; what `sums` hold is kept unless accumulate_ is Zero.
    const auto start = [&](auto& words, auto& sums) {
      pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
      const int stage = read.index();
      meta.load(stage * kMetaStageBytes, words);
      warpgroup_fence_operand(sums);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kMmaK; ++k) {
        cute::gemm(tiled_mma, make_zip_tensor(a(_, _, k, stage), words(_, _, k)), b(_, _, k, stage),
                   sums);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      ++read;
      lead.let_other_start();
    };
    PipelineState behind = read;  // the stage to give back next
    const auto give_back = [&] {
      release(behind.index());
      ++behind;
    };
    if constexpr (kPromoted) {
      sum_promoted(tiled_mma, start, give_back, accumulators, k_tiles);
    } else {
      sum(tiled_mma, start, give_back, accumulators, k_tiles);
    }
  }

 private:
  /// The first warpgroup is a K tile ahead, so that each stores while the other multiplies.
  class Lead {
   public:
    static constexpr int kTiles = 1;
    static_assert(kWarpgroups == 2 && kTiles < kStages);

    CUTLASS_DEVICE Lead(int warpgroup, int k_tiles) {
      // Fewer K tiles than stages: the first warpgroup might come round to the barrier again before
      // the second has passed it.
      const bool staggered = k_tiles >= kStages;
      if (staggered && warpgroup == 1) cutlass::arch::NamedBarrier::sync(kThreads, kBarrier);
      until_other_starts_ = staggered && warpgroup == 0 ? kTiles : 0;
    }
    CUTLASS_DEVICE void let_other_start() {
      if (until_other_starts_ > 0 && --until_other_starts_ == 0) {
        cutlass::arch::NamedBarrier::arrive(kThreads, kBarrier);
      }
    }

   private:
    static constexpr uint32_t kThreads = 2 * cutlass::NumThreadsPerWarpGroup;
    static constexpr uint32_t kBarrier = 2;  // of CUTLASS' NamedBarrier
    int until_other_starts_;
  };

  template <typename Start, typename GiveBack, typename Accumulators>
  CUTLASS_DEVICE static void sum(TiledMma& tiled_mma, const Start& start, const GiveBack& give_back,
                                 Accumulators& accumulators, int k_tiles) {
    using namespace cute;
    MetaFragment even, odd;
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    start(even, accumulators);

    const auto step = [&](auto& words) {
      start(words, accumulators);
      warpgroup_wait<1>();  // the batch before this one: its stage has been read
      warpgroup_fence_operand(accumulators);
      give_back();
    };
    int left = k_tiles - 1;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; left >= 2; left -= 2) {
      step(odd);
      step(even);
    }
    if (left == 1) step(odd);
    warpgroup_fence_operand(accumulators);
    warpgroup_wait<0>();
    give_back();
  }

  template <typename Start, typename GiveBack, typename Accumulators>
  CUTLASS_DEVICE static void sum_promoted(TiledMma& tiled_mma, const Start& start,
                                          const GiveBack& give_back, Accumulators& accumulators,
                                          int k_tiles) {
    using namespace cute;
    static_assert(kElementBytes == 1 && kStages > 2);
    MetaFragment even, odd;
    Tensor sums = make_fragment_like(accumulators);
    clear(accumulators);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int left = k_tiles; left > 0; left -= 2) {
      tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
      start(even, sums);
      if (left > 1) {
        start(odd, sums);
        warpgroup_wait<1>();
        give_back();
      }
      warpgroup_wait<0>();
      warpgroup_fence_operand(sums);
      give_back();
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(accumulators); ++i) accumulators(i) += sums(i);
    }
  }
};

}  // namespace sparse24::gemm::sm90
