// tile_sums.cuh: sums of a gradient's columns over the 64 tokens of a tile, for the gradient of a
// bias.
//
//   tile_sums  [ceil(tokens / 64), features] fp32: row r sums tokens 64 r to 64 r + 63
//
// MVUE packing holds every element of the gradient in registers, so its kernels add them up on the
// way. That spares the bias its own read of the gradient; what is left to add is 1/32 of its bytes.
// The order is fixed, and the CPU's too: eight tokens of an octet, then the octets of the tile.
//
// Traffic  Of the kernel that reads a gradient for them alone: 2 B an element, and 1/16 B written.
//          8192 x 4096: 69 MB, 16 us at 4.2 TB/s.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/cuda_check.h"
#include "common/element.cuh"
#include "common/pair16.h"
#include "common/tile.h"
#include "sparse24/types.h"

namespace sparse24 {

/// Sums of one thread's eight tokens wait here for those of the tile's other seven octets.
struct OctetSums {
  static constexpr int kOctets = kTileRows / 8;
  float of[kOctets][kTileCols];

  /// This thread's sums of neighbouring features of octet row / 8.
  template <int kFeatures>
  __device__ __forceinline__ void put(int row, int col, const float (&sums)[kFeatures]) {
    static_assert(kFeatures % 4 == 0);
    SP24_UNROLL
    for (int i = 0; i < kFeatures; i += 4) {
      *reinterpret_cast<float4*>(&of[row / 8][col + i]) =
          make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
    }
  }

  /// After a barrier: one thread a feature adds the octets in order and stores the tile's sum.
  __device__ __forceinline__ void store(float* tile_sums, uint32_t tile_row, uint32_t tile_col,
                                        uint32_t features) const {
    const uint32_t feature = tile_col * kTileCols + threadIdx.x;
    if (threadIdx.x >= kTileCols || feature >= features) return;
    float sum = 0.0f;
    SP24_UNROLL
    for (int octet = 0; octet < kOctets; ++octet) sum += of[octet][threadIdx.x];
    tile_sums[uint64_t{tile_row} * features + feature] = sum;
  }
};

/// The two features of a pair of 16-bit values.
template <typename T>
__device__ __forceinline__ void add_pair(uint32_t pair, float& low, float& high) {
  low += low_value<T>(pair);
  high += high_value<T>(pair);
}

/// For gradients whose packing does not sum: any strides, one thread a feature of a tile.
template <typename T>
__global__ void __launch_bounds__(kTileCols)
    tile_sums_kernel(ConstMatrix dy, uint32_t tile_cols, float* tile_sums) {
  const uint32_t tile_row = blockIdx.x / tile_cols, tile_col = blockIdx.x % tile_cols;
  const int64_t feature = int64_t{tile_col} * kTileCols + threadIdx.x;
  if (feature >= dy.cols) return;
  const int64_t first = int64_t{tile_row} * kTileRows;
  const int64_t end = first + kTileRows < dy.rows ? first + kTileRows : dy.rows;
  float sum = 0.0f;
  for (int64_t octet = first; octet < end; octet += 8) {
    float of_octet = 0.0f;
    for (int64_t token = octet; token < octet + 8 && token < end; ++token)
      of_octet += to_float(element<const T>(dy, token, feature));
    sum += of_octet;
  }
  tile_sums[tile_row * dy.cols + feature] = sum;
}

template <typename T>
void launch_tile_sums(const ConstMatrix& dy, float* tile_sums, cudaStream_t stream) {
  const uint32_t tile_rows = static_cast<uint32_t>((dy.rows + kTileRows - 1) / kTileRows);
  const uint32_t tile_cols = static_cast<uint32_t>((dy.cols + kTileCols - 1) / kTileCols);
  tile_sums_kernel<T><<<tile_rows * tile_cols, kTileCols, 0, stream>>>(dy, tile_cols, tile_sums);
  SP24_CHECK_LAUNCH("sums over tiles of [", dy.rows, ", ", dy.cols, "]");
}

}  // namespace sparse24
