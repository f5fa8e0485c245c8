// partial_sums.h: sums of a part of a tile, handed from one block to another through the workspace.
//
// A slot of a cluster (stream_k.h) has a place for each of its blocks, in which accumulators are in
// the order of registers, 16 bytes of a thread beside those of its neighbour. A flag for each
// warpgroup tells that they are there; the host zeroes flags before the launch.
#pragma once

#include <cstdint>

#include "cutlass/cutlass.h"
#include "gemm/config.h"
#include "gemm/sm90/warpgroup.h"

namespace sparse24::gemm::sm90 {

template <int kWarpgroups, int kAccumulators>
class PartialSums {
 public:
  static constexpr int kThreads = kWarpgroups * cutlass::NumThreadsPerWarpGroup;
  static constexpr int64_t kSlotFloats = int64_t{kThreads} * kAccumulators;
  static_assert(kAccumulators % 4 == 0 && kWarpgroups == 2);  // as workspace_bytes has it

  struct Params {
    uint32_t* flags = nullptr;
    float* slots = nullptr;
  };
  static Params to_params(void* workspace, int blocks) {
    return {static_cast<uint32_t*>(workspace),
            reinterpret_cast<float*>(static_cast<char*>(workspace) + stream_k_flag_bytes(blocks))};
  }

  /// `place` counts the places of all slots; `thread` the multiplying threads of a block.
  template <typename Accumulators>
  CUTLASS_DEVICE static void give(const Params& params, int place, int thread,
                                  const Accumulators& sums) {
    float4* slot = reinterpret_cast<float4*>(params.slots + place * kSlotFloats) + thread;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAccumulators / 4; ++i) {
      __stcg(slot + i * kThreads,
             make_float4(sums(4 * i), sums(4 * i + 1), sums(4 * i + 2), sums(4 * i + 3)));
    }
    __threadfence();
    const int warpgroup = thread / cutlass::NumThreadsPerWarpGroup;
    synchronize_warpgroup(warpgroup);
    if (thread % cutlass::NumThreadsPerWarpGroup == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(params.flags + place * kWarpgroups +
                                                               warpgroup),
                   "r"(1)
                   : "memory");
    }
  }

  template <typename Accumulators>
  CUTLASS_DEVICE static void add(const Params& params, int place, int thread, Accumulators& sums) {
    const uint32_t* flag =
        params.flags + place * kWarpgroups + thread / cutlass::NumThreadsPerWarpGroup;
    uint32_t ready = 0;
    while (true) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(flag) : "memory");
      if (ready != 0) break;
      __nanosleep(40);
    }
    const float4* slot =
        reinterpret_cast<const float4*>(params.slots + place * kSlotFloats) + thread;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAccumulators / 4; ++i) {
      const float4 more = __ldcg(slot + i * kThreads);
      sums(4 * i) += more.x;
      sums(4 * i + 1) += more.y;
      sums(4 * i + 2) += more.z;
      sums(4 * i + 3) += more.w;
    }
  }
};

}  // namespace sparse24::gemm::sm90
