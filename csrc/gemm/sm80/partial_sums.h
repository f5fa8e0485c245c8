// partial_sums.h: sums of a part of a tile, handed from one block to another through the workspace.
//
// A slot (stream_k.h) has the sums in the order of registers, 16 bytes of a thread beside those of
// its neighbour. A flag tells that they are there; the host zeroes flags before the launch.
#pragma once

#include <cstdint>

#include "cutlass/cutlass.h"
#include "gemm/config.h"

namespace sparse24::gemm::sm80 {

template <int kThreads, int kSums>
class PartialSums {
 public:
  static_assert(kSums % 4 == 0);

  struct Params {
    uint32_t* flags = nullptr;
    float* slots = nullptr;
  };
  static Params to_params(void* workspace, int blocks) {
    return {static_cast<uint32_t*>(workspace),
            reinterpret_cast<float*>(static_cast<char*>(workspace) + stream_k_flag_bytes(blocks))};
  }

  /// By all threads of a block.
  CUTLASS_DEVICE static void give(const Params& params, int slot, int thread, const float* sums) {
    float4* to = place(params, slot, thread);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSums / 4; ++i) {
      __stcg(to + i * kThreads,
             make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
    }
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(params.flags + slot), "r"(1)
                   : "memory");
    }
  }

  CUTLASS_DEVICE static void add(const Params& params, int slot, int thread, float* sums) {
    uint32_t ready = 0;
    while (true) {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(ready)
                   : "l"(params.flags + slot)
                   : "memory");
      if (ready != 0) break;
      __nanosleep(40);
    }
    const float4* from = place(params, slot, thread);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kSums / 4; ++i) {
      const float4 more = __ldcg(from + i * kThreads);
      sums[4 * i] += more.x;
      sums[4 * i + 1] += more.y;
      sums[4 * i + 2] += more.z;
      sums[4 * i + 3] += more.w;
    }
  }

 private:
  CUTLASS_DEVICE static float4* place(const Params& params, int slot, int thread) {
    return reinterpret_cast<float4*>(params.slots + int64_t{slot} * kThreads * kSums) + thread;
  }
};

}  // namespace sparse24::gemm::sm80
