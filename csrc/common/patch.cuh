// patch.cuh: one thread's 8x8 patch of a matrix, from memory to registers and back.
//
// A line is eight neighbours in memory: part of a row of a row-major matrix, or of a column of a column-major one. All
// eight loads of a patch are issued before the first is used. Lines from `valid` on are zero, and not stored.
#pragma once

#include <cstdint>

#include "common/pair16.h"
#include "common/tile.h"
#include "common/vector.cuh"

namespace sparse24 {

/// 16-bit elements: `first` is the address of the patch's first element, ld the distance of lines in elements.
__device__ __forceinline__ Patch16 load_patch16(const uint16_t* first, int64_t ld, int valid) {
  Patch16 patch;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (i < valid) v = load16(first + i * ld);
    patch.line[i][0] = v.x, patch.line[i][1] = v.y, patch.line[i][2] = v.z, patch.line[i][3] = v.w;
  }
  return patch;
}

__device__ __forceinline__ void store_patch16(uint16_t* first, int64_t ld, int valid, const Patch16& patch) {
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    if (i < valid) {
      store16(first + i * ld,
              make_uint4(patch.line[i][0], patch.line[i][1], patch.line[i][2], patch.line[i][3]));
    }
  }
}

/// fp32 elements of lanes that are `paired` (tile.h). A pair of lanes loads the same two stretches of a line, side by
/// side, and exchanges what the other owns. `along` is the patch's place in its line, `half_line` half of what the
/// warp's lanes span; a line ends at `extent`, a multiple of 4. All lanes of the warp must call this.
__device__ __forceinline__ void load_patch32(float (&value)[kPatch][kPatch], const float* line, int64_t ld,
                                             int64_t along, int half_line, int64_t extent, int valid) {
  const bool odd = threadIdx.x % 2 == 1;
  const int64_t near = odd ? along - half_line + 4 : along, far = near + half_line;
  uint4 low[kPatch], high[kPatch];
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    low[i] = high[i] = make_uint4(0, 0, 0, 0);
    if (i < valid && near < extent) low[i] = load16(line + i * ld + near);
    if (i < valid && far < extent) high[i] = load16(line + i * ld + far);
  }
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
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
