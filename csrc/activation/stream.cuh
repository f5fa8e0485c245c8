// stream.cuh: elementwise passes over matrices that all have the same layout.
//
// A row- or column-major matrix is a number of lines, each contiguous. The up half of a gated
// operand lies d_ff columns behind its gate half. So row- and column-major are the same kernel:
// thread after thread takes a vector of 16 bytes in memory order.
//
// Small blocks of threads with one vector each, and loads without any cache hint, were the fastest
// of all that was measured (docs/kernels/activation.md): 2048 threads an SM keep 64 KB in flight,
// and L1::no_allocate or an eviction priority for L2 cost 3 %.
#pragma once

#include <cstdint>

#include "common/convert.h"
#include "common/layout.h"
#include "common/pair16.h"
#include "common/vector.cuh"
#include "sparse24/types.h"

namespace sparse24 {

/// One operand of a streaming pass.
struct StreamOperand {
  const void* data;
  uint32_t line_bytes;  // between lines
  int64_t half_bytes;   // from a gate to its up
};

template <typename Pointer>
StreamOperand stream_operand(const MatrixView<Pointer>& m, Layout layout, int64_t d_ff) {
  const int64_t bytes = bytes_of(m.dtype),
                stride = layout == Layout::kRowMajor ? m.row_stride : m.col_stride;
  return {m.data, static_cast<uint32_t>(stride * bytes),
          d_ff * bytes * (layout == Layout::kRowMajor ? 1 : stride)};
}

/// One 16-byte vector as fp32 values, and back.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);

  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[kSize]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    SP24_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = __uint_as_float(words[i]);
      } else {
        x[i] = i % 2 == 0 ? low_value<T>(words[i / 2]) : high_value<T>(words[i / 2]);
      }
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&x)[kSize]) {
    uint32_t words[4];
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(x[i]);
      } else {
        words[i] = make_pair16<T>(x[2 * i], x[2 * i + 1]);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

constexpr int kStreamThreads = 128;

/// Where a vector lies: its line, and its place in it, counted in vectors.
struct StreamPosition {
  uint32_t line, along;
};

__device__ __forceinline__ StreamPosition stream_position(uint32_t vector,
                                                          uint32_t vectors_per_line) {
  const uint32_t line = vector / vectors_per_line;
  return {line, vector - line * vectors_per_line};
}

__device__ __forceinline__ const char* stream_address(const StreamOperand& operand,
                                                      StreamPosition p) {
  return static_cast<const char*>(operand.data) + uint64_t{operand.line_bytes} * p.line +
         uint64_t{p.along} * 16;
}

__device__ __forceinline__ uint4 stream_load(const void* address) {
  return *static_cast<const uint4*>(address);
}

/// The number of vectors in one half, and in a line of it.
struct StreamExtent {
  uint32_t vectors, per_line;

  uint32_t blocks() const { return (vectors - 1) / kStreamThreads + 1; }
};

template <typename Pointer>
StreamExtent stream_extent(const MatrixView<Pointer>& h, Layout layout) {
  const int64_t per_vector = 16 / bytes_of(h.dtype);
  const int64_t lines = layout == Layout::kRowMajor ? h.rows : h.cols;
  const int64_t per_line = (layout == Layout::kRowMajor ? h.cols : h.rows) / per_vector;
  SP24_CHECK(lines * per_line <= (int64_t{1} << 32) - kStreamThreads,
             "h must have fewer than 2^36 bytes, got [", h.rows, ", ", h.cols, "]");
  return {static_cast<uint32_t>(lines * per_line), static_cast<uint32_t>(per_line)};
}

}  // namespace sparse24
