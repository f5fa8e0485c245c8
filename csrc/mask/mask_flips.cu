// mask_flips.cu: how many elements two masks disagree on, for many pairs of masks in one launch.
//
//   mask_a, mask_b   uint16, one a block;  flips   one int64 a pair
//
// Work     A thread compares eight blocks, a warp adds up, its first lane adds to the pair's count: integers, so the
//          order of the additions does not show. Counts are zeroed by a launch of one block before.
// Traffic  4 B a block, 1/4 B an element of the weight.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/metadata.h"
#include "common/tensor_list.h"
#include "common/vector.cuh"
#include "mask/mask_cuda.h"

namespace sparse24 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerThread = 8;
constexpr int kBlocksPerTile = kThreads * kBlocksPerThread;

using FlipsList = TensorList<MaskFlipsArgs>;
static_assert(sizeof(FlipsList) <= kKernelParameterBytes, "a launch's masks must fit its parameters");

__global__ void zero_flips_kernel(const __grid_constant__ FlipsList list) {
  if (threadIdx.x < list.count) *list.tensor[threadIdx.x].flips = 0;
}

__global__ void __launch_bounds__(kThreads) mask_flips_kernel(const __grid_constant__ FlipsList list) {
  const int index = list.find(blockIdx.x);
  const MaskFlipsArgs& t = list.tensor[index];
  const int64_t first =
      int64_t{blockIdx.x - list.first_tile[index]} * kBlocksPerTile + threadIdx.x * kBlocksPerThread;
  const bool aligned = (reinterpret_cast<uintptr_t>(t.mask_a) | reinterpret_cast<uintptr_t>(t.mask_b)) % 16 == 0;
  int flips = 0;
  if (aligned && first + kBlocksPerThread <= t.blocks) {
    const uint4 a = load16(t.mask_a + first), b = load16(t.mask_b + first);
    flips = __popc(a.x ^ b.x) + __popc(a.y ^ b.y) + __popc(a.z ^ b.z) + __popc(a.w ^ b.w);
  } else {
    for (int64_t i = first; i < first + kBlocksPerThread && i < t.blocks; ++i) {
      flips += __popc(static_cast<uint32_t>(t.mask_a[i] ^ t.mask_b[i]));
    }
  }
  flips = __reduce_add_sync(0xFFFFFFFFu, flips);
  if (threadIdx.x % 32 == 0 && flips != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(t.flips), static_cast<unsigned long long>(flips));
  }
}

}  // namespace

namespace cuda {

void mask_flips(const MaskFlipsArgs* tensors, int count, cudaStream_t stream) {
  FlipsList list;
  const auto flush = [&] {
    if (list.count == 0) return;
    zero_flips_kernel<<<1, kTensorsPerLaunch, 0, stream>>>(list);
    if (list.tiles() > 0) mask_flips_kernel<<<list.tiles(), kThreads, 0, stream>>>(list);
    SP24_CHECK_LAUNCH("mask_flips of ", list.count, " masks, the first of ", list.tensor[0].blocks, " blocks");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    if (list.full()) flush();
    list.add(tensors[i], static_cast<uint32_t>(round_up(tensors[i].blocks, kBlocksPerTile) / kBlocksPerTile));
  }
  flush();
}

}  // namespace cuda
}  // namespace sparse24
