// unpack8.cuh: the dense form of an 8-bit packed operand.
//
//   packed   [m, k/2], E for (m, k), in the order of 8 bits; one float scale
//   out      [m, k] row-major fp32, bf16 or fp16, or `transposed` [k, m]: scale * packed, rounded
//            once
//
// Work     A thread takes one byte of E: four packed values to eight elements. Neighbouring threads
//          share a row of out: they follow k, or m where out is transposed.
// Traffic  0.625 B read, 2 or 4 B written an element. 11008 x 4096 to bf16: 118 MB, 28 us at
//          4.2 TB/s.
#pragma once

#include "common/float8.h"
#include "common/metadata.h"
#include "sparse24/pack.h"

namespace sparse24 {

constexpr int kUnpackThreads = 256;

template <typename F, typename T>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack8_kernel(const F* packed, const uint8_t* E, const float* scale, T* out,
                   int64_t out_stride, int64_t m, int64_t k, bool transposed) {
  const int64_t octets = (k + 7) / 8, index = int64_t{blockIdx.x} * kUnpackThreads + threadIdx.x;
  if (index >= m * octets) return;
  const int64_t row = transposed ? index % m : index / octets;
  const int64_t octet = transposed ? index / m : index % octets;
  const uint32_t byte = E[meta8_byte_offset(row, 8 * octet, m)];
  const float factor = scale == nullptr ? 1.0f : *scale;
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t first = 8 * octet + 4 * half;
    if (first >= k) continue;
    const F* kept = packed + row * (k / 2) + first / 2;
    const uint32_t nibble = byte >> (4 * half) & 0xFu;
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      // Equal positions, which no valid E has, keep the second.
      const float x = i == meta_second(nibble)  ? to_float(kept[1]) * factor
                      : i == meta_first(nibble) ? to_float(kept[0]) * factor
                                                : 0.0f;
      out[transposed ? (first + i) * out_stride + row : row * out_stride + first + i] =
          from_float<T>(x);
    }
  }
}

}  // namespace sparse24
