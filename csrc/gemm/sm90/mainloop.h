// mainloop.h: the K loop of the sparse GEMM on Hopper, with one batch of wgmma always in flight.
//
// CUTLASS' sparse collective supplies the types, the TMA loads and the shared-memory layouts. Its
// own loop waits for a K tile's wgmma before it fetches the metadata of the next, so the tensor
// cores drain once a tile. This loop keeps the previous tile's wgmma running meanwhile: metadata
// registers are double-buffered, and a stage goes back to the producer one tile later, when the
// wait for the batch after it shows that it has been read.
//
// Metadata  A 64 (m) x 64 (k) block of E is 512 bytes: 128 threads x two 32-bit words, one word for
// each wgmma of k 32.
//           Thread t of a warpgroup reads the 8 bytes at warp*128 + (t%2)*64 + (t%32/4)*8
//           (common/metadata.h). The halves of a word are of rows r and r + 8: in a gated product
//           of a feature of gate and the same of up, which come from two words.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"

namespace sparse24::gemm::sm90 {

/// kGated: rows come in turns from the two halves of the weight (gated_rows.h).
template <typename Stock, bool kGated = false>
struct SparseMainloop : Stock {
  using Stock::Stock;
  using typename Stock::MainloopPipeline;
  using typename Stock::Params;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using typename Stock::TiledMma;
  using typename Stock::TileShape;

  static constexpr int kTileM = cute::size<0>(TileShape{});
  static constexpr int kTileK = cute::size<2>(TileShape{});
  static constexpr int kStages = Stock::DispatchPolicy::Stages;
  static constexpr int kMetaStageBytes = kTileM * kTileK / 8;
  static_assert(kTileK == 64, "E has one order, that of a K tile of 64 (common/metadata.h)");

  static constexpr int kWarpgroups = cute::size(TiledMma{}) / cutlass::NumThreadsPerWarpGroup;
  static constexpr int kMmaK = kTileK / 32;  // wgmma steps along a K tile
  static_assert(kTileM == 64 * kWarpgroups);

  /// The metadata words of one K tile, for one thread: one for each step.
  using MetaFragment =
      decltype(cute::make_tensor<uint32_t>(cute::Shape<cute::_1, cute::_1, cute::Int<kMmaK>>{}));

  /// K tiles that the first warpgroup is ahead, so that each stores while the other multiplies.
  static constexpr int kLead = 1;
  static constexpr uint32_t kLeadBarrier = 2;  // of CUTLASS' NamedBarrier
  static_assert(kWarpgroups == 2 && kLead < kStages);

  template <typename Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, Accumulators& accumulators,
                          int k_tiles, int thread, TensorStorage& shared, Params const&) {
    using namespace cute;
    Tensor sA = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Stock::SmemLayoutA{});
    Tensor sB = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Stock::SmemLayoutB{});
    const int warpgroup = __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);
    TiledMma tiled_mma;
    // wgmma operands come from shared memory: a thread's slice is its warpgroup's, and fragments
    // are descriptors.
    auto slice = tiled_mma.get_thread_slice(warpgroup * cutlass::NumThreadsPerWarpGroup);
    Tensor a = slice.make_fragment_A(slice.partition_A(sA));  // (MMA, MMA_M, MMA_K, stage)
    Tensor b = slice.make_fragment_B(slice.partition_B(sB));  // (MMA, MMA_N, MMA_K, stage)

    const int lane = thread % 32, warp = thread % cutlass::NumThreadsPerWarpGroup / 32;
    // Gated: this warp's eight rows of gate are half of a group of sixteen, and so are those of up.
    const int sixteen = kGated ? warpgroup * 2 + warp / 2 : warpgroup * 4 + warp;
    const char* meta = reinterpret_cast<const char*>(&shared.smem_E) + sixteen * 128 +
                       lane % 2 * 64 + lane / 4 * 8;
    const uint32_t halves = warp % 2 ? 0x7632u : 0x5410u;

    const auto load_meta = [&](int stage, auto& words) {
      const char* from = meta + stage * kMetaStageBytes;
      uint2 pair = *reinterpret_cast<const uint2*>(from);
      if constexpr (kGated) {
        const uint2 up = *reinterpret_cast<const uint2*>(from + 512);
        pair.x = __byte_perm(pair.x, up.x, halves);
        pair.y = __byte_perm(pair.y, up.y, halves);
      }
      words(0, 0, 0) = pair.x;
      words(0, 0, 1) = pair.y;
    };
    const auto issue = [&](int stage, auto& words) {
      warpgroup_fence_operand(accumulators);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kMmaK; ++k) {
        cute::gemm(tiled_mma, make_zip_tensor(a(_, _, k, stage), words(_, _, k)), b(_, _, k, stage),
                   accumulators);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
    };

    // Fewer K tiles than stages: the first warpgroup might come round to the barrier again before
    // the second has passed it.
    const bool staggered = k_tiles >= kStages;
    if (staggered && warpgroup == 1) {
      cutlass::arch::NamedBarrier::sync(2 * cutlass::NumThreadsPerWarpGroup, kLeadBarrier);
    }
    int until_other_starts = staggered && warpgroup == 0 ? kLead : 0;
    const auto let_other_start = [&] {
      if (until_other_starts > 0 && --until_other_starts == 0) {
        cutlass::arch::NamedBarrier::arrive(2 * cutlass::NumThreadsPerWarpGroup, kLeadBarrier);
      }
    };

    MetaFragment even, odd;
    PipelineState release = read;
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;

    pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
    load_meta(read.index(), even);
    issue(read.index(), even);
    ++read;
    let_other_start();

    const auto step = [&](auto& words) {
      pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
      load_meta(read.index(), words);
      issue(read.index(), words);
      ++read;
      let_other_start();
      warpgroup_wait<1>();  // the batch before this one: its stage has been read
      warpgroup_fence_operand(accumulators);
      pipeline.consumer_release(release);
      ++release;
    };
    int left = k_tiles - 1;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; left >= 2; left -= 2) {
      step(odd);
      step(even);
    }
    if (left == 1) step(odd);
    warpgroup_fence_operand(accumulators);
  }

  /// Wait for the last batch and give its stage back.
  CUTLASS_DEVICE void mma_tail(MainloopPipeline pipeline, PipelineState release, int k_tiles) {
    release.advance(k_tiles - 1);
    cute::warpgroup_wait<0>();
    pipeline.consumer_release(release);
  }
};

}  // namespace sparse24::gemm::sm90
