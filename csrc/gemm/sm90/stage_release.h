// stage_release.h: a stage of shared memory given back to those who fill it.
//
// A cluster's blocks share their loads, so each multiplying warpgroup tells every block that it has
// read a stage: the first thread of its b-th warp tells block b. This is consumer_release of
// CUTLASS' pipeline, but for who signals: its two registers are set at the kernel's start and would
// be spilled in the epilogue (warpgroup.h, thread_in_block); these are set once a tile.
#pragma once

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"

namespace sparse24::gemm::sm90 {

template <typename ClusterShape, typename Pipeline>
class StageRelease {
 public:
  /// `thread` is of the multiplying ones.
  CUTLASS_DEVICE StageRelease(typename Pipeline::SharedStorage& pipeline, int thread)
      : empty_(pipeline.empty_barrier_),
        block_(thread % cutlass::NumThreadsPerWarpGroup / 32),
        signals_(thread % 32 == 0 && block_ < kBlocks) {}

  CUTLASS_DEVICE void operator()(int stage) const { empty_[stage].arrive(block_, signals_); }

 private:
  static constexpr uint32_t kBlocks = cute::size(ClusterShape{});
  static_assert(cute::size<0>(ClusterShape{}) == kBlocks ||
                    cute::size<1>(ClusterShape{}) == kBlocks,
                "every block of a cluster shares loads with every other");
  static_assert(1 < kBlocks && kBlocks <= 4, "alone, CUTLASS' barriers count threads");

  typename Pipeline::EmptyBarrier* empty_;
  uint32_t block_;
  bool signals_;
};

}  // namespace sparse24::gemm::sm90
