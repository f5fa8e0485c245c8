// quantize_patch.cuh: one thread's 8x8 patch in 8 bits, to nearest, and what it says about its
// matrix. A patch is anything with value(line, place) -> float.
#pragma once

#include <cstdint>

#include "common/amax.cuh"
#include "common/bytes.h"
#include "common/float8.h"
#include "common/pair16.h"
#include "common/tile.h"

namespace sparse24 {

/// Tiles deep of a band of the walk (raster.h): what tiles one below the other write of a line
/// along k are neighbours, and meet in L2.
constexpr uint32_t kBand8 = 4;

/// The sum with x * 0 makes NaN of Inf, which the conversion alone would clip; it leaves everything
/// finite as it is.
__device__ __forceinline__ float scaled_or_nan(float x, float inverse_scale) {
  return __fmaf_rn(x, 0.0f, x * inverse_scale);
}

/// What a thread gathers about its patch.
struct PatchStatistics {
  float amax = 0.0f;
  uint32_t clipped = 0, flushed = 0;

  /// x + 0 x is NaN where x is not finite, and a maximum passes NaN by.
  __device__ __forceinline__ void raise(float x) {
    amax = fmaxf(amax, fabsf(__fmaf_rn(x, 0.0f, x)));
  }
};

/// Line after line, statistics too: what a line was widened to is not kept for the next.
template <typename F, typename Patch>
__device__ __forceinline__ Patch8 quantize_patch(const Patch& patch, float inverse_scale,
                                                 bool wants_amax, bool wants_counts,
                                                 PatchStatistics& seen) {
  Patch8 out;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    float x[kPatch];
    SP24_UNROLL
    for (int j = 0; j < kPatch; ++j) x[j] = patch.value(i, j);
    SP24_UNROLL
    for (int w = 0; w < 2; ++w) {
      float y[4];
      SP24_UNROLL
      for (int j = 0; j < 4; ++j) y[j] = scaled_or_nan(x[4 * w + j], inverse_scale);
      out.line[i][w] = convert_quad8<F>(y[0], y[1], y[2], y[3]);
    }
    if (wants_amax) {
      SP24_UNROLL
      for (int j = 0; j < kPatch; ++j) seen.raise(x[j]);
    }
    if (wants_counts) {
      SP24_UNROLL
      for (int j = 0; j < kPatch; ++j)
        count_value<F>(x[j], inverse_scale, seen.clipped, seen.flushed);
    }
  }
  return out;
}

/// The largest finite magnitude alone.
template <typename Patch>
__device__ __forceinline__ void raise_patch(const Patch& patch, PatchStatistics& seen) {
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    SP24_UNROLL
    for (int j = 0; j < kPatch; ++j) seen.raise(patch.value(i, j));
  }
}

}  // namespace sparse24
