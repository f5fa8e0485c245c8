// quantize.cu: a matrix in e4m3, both layouts from one read, or its amax alone; by a scale that is
// known, or by its own, which takes one more read.
//
//   x      [rows, cols] bf16, fp16 or fp32; row-major in whole vectors is the fast way
//   x8     [rows, cols], x8_t [cols, rows padded to 32]; scale, amax, counters: quantize.h
//
// Work     tile_outputs.cuh: 128 x 128 elements a block, 8 x 8 a thread. amax alone: a pass over
//          vectors, four a thread at once.
// Traffic  bf16: 2 B read, 1 B written for each of x8 and x8_t; amax alone 2 B read.
//          8192 x 4096: 134 MB, 32 us at 4.2 TB/s; amax alone 67 MB, 16 us.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/cuda_check.h"
#include "common/float8_scale.cuh"
#include "pack/pack_cuda.h"
#include "pack/tile_outputs.cuh"

namespace sparse24 {
namespace {

struct QuantizeParams {
  ConstMatrix x;
  bool vectors;
  TileOutputs to;
};

template <typename T>
__device__ __forceinline__ DensePatch<T> load_any(const QuantizeParams& p, const PatchPlace& at) {
  const int row = at.token(), col = at.feature(), rows = p.to.tokens, cols = p.to.features;
  if constexpr (sizeof(T) == 2) {
    return load_dense<T>(p.x, p.vectors, row, col, cols);
  } else {
    DensePatch<T> patch;
    const float* first = static_cast<const float*>(p.x.data) + row * p.x.row_stride + col;
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int j = 0; j < kPatch; j += 4) {
        float (&value)[kPatch] = patch.lines[i];
        uint4 v = make_uint4(0, 0, 0, 0);
        if (p.vectors && row + i < rows && col + j < cols)
          v = load16_cached(first + i * p.x.row_stride + j);
        value[j] = __uint_as_float(v.x), value[j + 1] = __uint_as_float(v.y);
        value[j + 2] = __uint_as_float(v.z), value[j + 3] = __uint_as_float(v.w);
        if (!p.vectors) {
          SP24_UNROLL
          for (int n = j; n < j + 4; ++n) value[n] = read_value(p.x, row + i, col + n);
        }
      }
    }
    return patch;
  }
}

template <typename T>
__global__ void __launch_bounds__(kTile8Threads, sizeof(T) == 2 ? 3 : 2)
    quantize_kernel(const __grid_constant__ QuantizeParams p) {
  __shared__ alignas(16) TileMemory<NoPacking> memory;
  const PatchPlace at = patch_place(p.to);
  write_outputs<T, NoPacking>(p.to, memory, load_any<T>(p, at), at);
}

// ---- amax alone -------------------------------------------------------------------------------

constexpr int kAmaxThreads = 256, kAmaxVectors = 4;

/// Bits of the largest finite magnitude in a vector of T.
template <typename T>
__device__ __forceinline__ uint32_t vector_amax(uint4 v, uint32_t seen) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      seen = raise_amax(seen, __uint_as_float(words[i]));
    } else {
      seen = raise_amax(seen, low_value<T>(words[i]));
      seen = raise_amax(seen, high_value<T>(words[i]));
    }
  }
  return seen;
}

/// Lines of whole vectors: `per_line` of them, `vectors` in all.
template <typename T>
__global__ void __launch_bounds__(kAmaxThreads)
    amax_kernel(const char* x, int64_t line_bytes, uint32_t per_line, uint64_t vectors,
                float* amax) {
  __shared__ uint32_t of_warp[kAmaxThreads / 32];
  uint32_t seen = 0;
  const uint64_t step = uint64_t{gridDim.x} * kAmaxThreads;
  for (uint64_t first = uint64_t{blockIdx.x} * kAmaxThreads + threadIdx.x; first < vectors;
       first += kAmaxVectors * step) {
    uint4 v[kAmaxVectors];
    SP24_UNROLL
    for (int i = 0; i < kAmaxVectors; ++i) {
      v[i] = make_uint4(0, 0, 0, 0);
      const uint64_t at = first + i * step, line = at / per_line;
      if (at < vectors) v[i] = load16_cached(x + line * line_bytes + (at - line * per_line) * 16);
    }
    SP24_UNROLL
    for (int i = 0; i < kAmaxVectors; ++i) seen = vector_amax<T>(v[i], seen);
  }
  store_amax<kAmaxThreads>(seen, amax, of_warp);
}

/// Any strides, element by element.
template <typename T>
__global__ void __launch_bounds__(kAmaxThreads) amax_element_kernel(ConstMatrix x, float* amax) {
  __shared__ uint32_t of_warp[kAmaxThreads / 32];
  uint32_t seen = 0;
  for (int64_t i = int64_t{blockIdx.x} * kAmaxThreads + threadIdx.x; i < x.rows * x.cols;
       i += int64_t{gridDim.x} * kAmaxThreads)
    seen = raise_amax(seen, to_float(element<const T>(x, i / x.cols, i % x.cols)));
  store_amax<kAmaxThreads>(seen, amax, of_warp);
}

/// A few waves of blocks that loop: few atomics, and the walk is as good as any.
constexpr uint32_t kAmaxBlocks = 132 * 8 * 2;

template <typename T>
void launch_amax(const ConstMatrix& x, float* amax, cudaStream_t stream) {
  const Layout layout = vector_layout(x);
  if (layout == Layout::kStrided) {
    amax_element_kernel<T><<<kAmaxBlocks, kAmaxThreads, 0, stream>>>(x, amax);
    return;
  }
  const bool by_rows = layout == Layout::kRowMajor;
  const int64_t bytes = bytes_of(x.dtype), along = by_rows ? x.cols : x.rows;
  const uint32_t per_line = static_cast<uint32_t>(along * bytes / 16);
  const uint64_t vectors = static_cast<uint64_t>(by_rows ? x.rows : x.cols) * per_line;
  const uint64_t blocks =
      std::min<uint64_t>((vectors + kAmaxThreads - 1) / kAmaxThreads, kAmaxBlocks);
  const int64_t line_bytes = (by_rows ? x.row_stride : x.col_stride) * bytes;
  amax_kernel<T><<<static_cast<uint32_t>(blocks), kAmaxThreads, 0, stream>>>(
      static_cast<const char*>(x.data), line_bytes, per_line, vectors, amax);
}

}  // namespace

namespace cuda {

void quantize(const QuantizeArgs& args, cudaStream_t stream) {
  const ConstMatrix& x = args.x;
  if (x.rows == 0 || x.cols == 0) return;
  check_extents32(x.rows, x.cols, "x");
  const bool casts = args.to.x8 != nullptr || args.to.x8_t != nullptr;
  Float8Output to = args.to;
  with_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.own_scale != nullptr) {
      find_scale(args.own_scale, stream, [&](float* amax) { launch_amax<T>(x, amax, stream); });
      to.scale = args.own_scale;
    }
    if (!casts) {
      if (to.amax != nullptr) launch_amax<T>(x, to.amax, stream);
      return;
    }
    // Patches of 16-bit elements are whole or outside along a row; fp32 ones come in halves.
    const bool vectors = vector_layout(x) == Layout::kRowMajor;
    const QuantizeParams p = {x, vectors, tile_outputs(x.rows, x.cols, 1, to)};
    quantize_kernel<T><<<p.to.tile_rows * p.to.tile_cols, kTile8Threads, 0, stream>>>(p);
  });
  SP24_CHECK_LAUNCH("quantize of ", name_of(x.dtype), " [", x.rows, ", ", x.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
