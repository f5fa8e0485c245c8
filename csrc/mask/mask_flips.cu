// mask_flips.cu: how many elements changed sides between two masks, for a list of tensors.
//
//   mask_a, mask_b  uint16 [blocks];  flips  one int64 on the device a tensor
//
// Work     A block of threads takes a chunk of 16384 blocks of one of up to 32 tensors: 16-byte
//          loads where both masks allow them, population counts of the differing bits, one atomic
//          addition.
// Traffic  4 B a mask block, 1/4 B an element. 11008 x 4096: 11 MB, 3 us at 4.2 TB/s.
#include <cuda_runtime.h>

#include "common/block_sum.cuh"
#include "common/cuda_check.h"
#include "common/layout.h"
#include "common/metadata.h"
#include "common/tensor_list.h"
#include "common/vector.cuh"
#include "mask/mask_cuda.h"

namespace sparse24 {
namespace {

using FlipsList = TensorList<MaskFlipsArgs>;
static_assert(sizeof(FlipsList) <= kKernelParameterBytes,
              "a launch's tensors must fit its parameters");

constexpr int64_t kChunk = 16384;  // mask blocks: 8 vectors a thread
constexpr int kPerVector = 8;

__global__ void zero_flips_kernel(const __grid_constant__ FlipsList list) {
  if (static_cast<int>(threadIdx.x) < list.count) *list.tensor[threadIdx.x].flips = 0;
}

__global__ void __launch_bounds__(kCountThreads)
    mask_flips_kernel(const __grid_constant__ FlipsList list) {
  const int index = list.find(blockIdx.x);
  const MaskFlipsArgs& t = list.tensor[index];
  const int64_t start = int64_t{blockIdx.x - list.first_tile[index]} * kChunk;
  const uint16_t *a = t.mask_a + start, *b = t.mask_b + start;
  const int blocks = static_cast<int>(t.blocks - start < kChunk ? t.blocks - start : kChunk);
  const bool aligned = (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
  const int vectors = aligned ? blocks / kPerVector : 0;

  int flips = 0;
  SP24_UNROLL
  for (int i = 0; i < kChunk / kPerVector / kCountThreads; ++i) {
    const int at = i * kCountThreads + static_cast<int>(threadIdx.x);
    if (at < vectors) {
      const uint4 x = load16_cached(a + at * kPerVector), y = load16_cached(b + at * kPerVector);
      flips += __popc(x.x ^ y.x) + __popc(x.y ^ y.y) + __popc(x.z ^ y.z) + __popc(x.w ^ y.w);
    }
  }
  for (int at = vectors * kPerVector + static_cast<int>(threadIdx.x); at < blocks;
       at += kCountThreads) {
    flips += __popc(static_cast<uint32_t>(a[at] ^ b[at]));
  }
  add_block_sum(flips, t.flips);
}

}  // namespace

namespace cuda {

void mask_flips(const MaskFlipsArgs* tensors, int count, cudaStream_t stream) {
  FlipsList list;
  const auto flush = [&] {
    if (list.count == 0) return;
    zero_flips_kernel<<<1, kTensorsPerLaunch, 0, stream>>>(list);
    if (list.tiles() > 0) mask_flips_kernel<<<list.tiles(), kCountThreads, 0, stream>>>(list);
    SP24_CHECK_LAUNCH("mask_flips of ", list.count, " tensors, the first of ",
                      list.tensor[0].blocks, " blocks");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    if (list.full()) flush();
    list.add(tensors[i], static_cast<uint32_t>(round_up(tensors[i].blocks, kChunk) / kChunk));
  }
  flush();
}

}  // namespace cuda
}  // namespace sparse24
