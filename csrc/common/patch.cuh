// patch.cuh: one thread's 8x8 patch of a matrix, from memory to registers and back.
//
// A line is eight neighbours in memory: part of a row of a row-major matrix, or of a column of a
// column-major one. All eight loads of a patch are issued before the first is used. Lines from
// `valid` on are zero, and not stored; kStep says that `valid` is a multiple of it. Lines lie
// `stride` bytes apart, below 2^32: then an address is one multiply-add.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/pair16.h"
#include "common/tile.h"
#include "common/vector.cuh"

namespace sparse24 {

template <typename T>
__device__ __forceinline__ T* advance(T* pointer, uint32_t stride, uint32_t count) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(pointer) + uint64_t{stride} * count);
}

/// 16-bit elements; `first` is the address of the patch's first element. kCached: see vector.cuh.
template <int kStep, bool kCached = false>
__device__ __forceinline__ Patch16 load_patch16(const uint16_t* first, uint32_t stride, int valid) {
  const auto load = [](const void* from) { return kCached ? load16_cached(from) : load16(from); };
  uint4 v[kPatch];
  if (valid >= kPatch) {  // nearly always: no zeros to prepare, no conditions to keep
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) v[i] = load(advance(first, stride, i));
  } else {
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      v[i] = make_uint4(0, 0, 0, 0);
      if (i / kStep * kStep < valid) v[i] = load(advance(first, stride, i));
    }
  }
  Patch16 patch;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    patch.line[i][0] = v[i].x, patch.line[i][1] = v[i].y;
    patch.line[i][2] = v[i].z, patch.line[i][3] = v[i].w;
  }
  return patch;
}

template <int kStep>
__device__ __forceinline__ void store_patch16(uint16_t* first, uint32_t stride, int valid,
                                              const Patch16& patch) {
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    if (i / kStep * kStep < valid) {
      store16(advance(first, stride, i),
              make_uint4(patch.line[i][0], patch.line[i][1], patch.line[i][2], patch.line[i][3]));
    }
  }
}

/// fp32 elements of lanes that are `paired` (tile.h). A pair of lanes loads the same two stretches
/// of a line, side by side, and exchanges what the other owns. `along` is the patch's place in its
/// line, `half_line` half of what the warp's lanes span; a line ends at `extent`, a multiple of 4.
/// All lanes of the warp must call this. kCached: see vector.cuh.
template <int kStep, bool kCached = false, int kLines>
__device__ __forceinline__ void load_patch32(float (&value)[kLines][kPatch], const float* line,
                                             uint32_t stride, int along, int half_line, int extent,
                                             int valid) {
  const bool odd = threadIdx.x % 2 == 1;
  const int near = odd ? along - half_line + 4 : along, far = near + half_line;
  const auto load = [](const void* from) { return kCached ? load16_cached(from) : load16(from); };
  uint4 low[kLines], high[kLines];
  SP24_UNROLL
  for (int i = 0; i < kLines; ++i) {
    low[i] = high[i] = make_uint4(0, 0, 0, 0);
    const float* at = advance(line + near, stride, i);
    if (i / kStep * kStep < valid && near < extent) low[i] = load(at);
    if (i / kStep * kStep < valid && far < extent) high[i] = load(at + half_line);
  }
  SP24_UNROLL
  for (int i = 0; i < kLines; ++i) {
    const uint32_t near_words[4] = {low[i].x, low[i].y, low[i].z, low[i].w};
    const uint32_t far_words[4] = {high[i].x, high[i].y, high[i].z, high[i].w};
    SP24_UNROLL
    for (int j = 0; j < 4; ++j) {
      const uint32_t given = odd ? near_words[j] : far_words[j];
      const uint32_t taken = __shfl_xor_sync(0xFFFFFFFFu, given, 1);
      value[i][j] = __uint_as_float(odd ? taken : near_words[j]);
      value[i][j + 4] = __uint_as_float(odd ? far_words[j] : taken);
    }
  }
}

}  // namespace sparse24
