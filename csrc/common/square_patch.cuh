// square_patch.cuh: one thread's square patch of a matrix of either layout, held by rows.
//
// A patch is as many lines as a 16-byte vector has elements: 8x8 of 16 bits, 4x4 of fp32 (and 4x4
// of 16 bits beside fp32). Column-major operands are turned in registers, by byte permutations.
// With the warps of common/tile.h (kSquare) each line of a warp is 64 or 128 contiguous bytes
// whatever the layout, so a mix of layouts costs neither shared memory nor partial sectors.
#pragma once

#include <cstdint>

#include "common/convert.h"
#include "common/layout.h"
#include "common/pair16.h"
#include "common/patch.cuh"
#include "sparse24/types.h"

namespace sparse24 {

template <typename T>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

template <typename T, int kSide = kVectorSize<T>>
struct SquarePatch {
  static constexpr int kWords = kSide * static_cast<int>(sizeof(T)) / 4;  // of a line
  static_assert(kWords == 4 || kWords == 2, "a line is one memory access");
  uint32_t word[kSide][kWords];
};

/// An operand of either layout; `half_bytes` leads from a gate to its up.
struct PatchOperand {
  void* data;
  uint32_t line_bytes;
  bool column_major;
  int64_t half_bytes;
};

template <typename Pointer>
PatchOperand patch_operand(const MatrixView<Pointer>& m, Layout layout, int64_t half_cols = 0) {
  const bool by_rows = layout == Layout::kRowMajor;
  const int64_t bytes = bytes_of(m.dtype), stride = by_rows ? m.row_stride : m.col_stride;
  return {const_cast<void*>(static_cast<const void*>(m.data)),
          static_cast<uint32_t>(stride * bytes), !by_rows,
          half_cols * bytes * (by_rows ? 1 : stride)};
}

template <typename T>
__device__ __forceinline__ char* patch_address(const PatchOperand& operand, int row, int col) {
  const uint32_t line = operand.column_major ? col : row, along = operand.column_major ? row : col;
  return advance(static_cast<char*>(operand.data), operand.line_bytes, line) +
         uint64_t{along} * sizeof(T);
}

/// Lines become the other direction.
template <typename T, int kSide>
__device__ __forceinline__ void turn(SquarePatch<T, kSide>& patch) {
  const SquarePatch<T, kSide> in = patch;
  SP24_UNROLL
  for (int i = 0; i < kSide; ++i) {
    SP24_UNROLL
    for (int w = 0; w < SquarePatch<T, kSide>::kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        patch.word[i][w] = in.word[w][i];
      } else {
        const uint32_t a = in.word[2 * w][i / 2], b = in.word[2 * w + 1][i / 2];
        patch.word[i][w] = i % 2 == 0 ? pair_of_lows(a, b) : pair_of_highs(a, b);
      }
    }
  }
}

/// The lines of a patch as they lie in memory; those from `valid` on read as zero.
template <typename T, int kSide = kVectorSize<T>>
__device__ __forceinline__ SquarePatch<T, kSide> load_lines(const char* first, uint32_t line_bytes,
                                                            int valid) {
  SquarePatch<T, kSide> patch;
  SP24_UNROLL
  for (int i = 0; i < kSide; ++i) {
    if constexpr (SquarePatch<T, kSide>::kWords == 4) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (i < valid) v = load16_cached(advance(first, line_bytes, i));
      patch.word[i][0] = v.x, patch.word[i][1] = v.y, patch.word[i][2] = v.z,
      patch.word[i][3] = v.w;
    } else {
      uint2 v = make_uint2(0, 0);
      if (i < valid) v = load8_cached(advance(first, line_bytes, i));
      patch.word[i][0] = v.x, patch.word[i][1] = v.y;
    }
  }
  return patch;
}

template <typename T, int kSide>
__device__ __forceinline__ void store_lines(char* first, uint32_t line_bytes, int valid,
                                            const SquarePatch<T, kSide>& patch) {
  SP24_UNROLL
  for (int i = 0; i < kSide; ++i) {
    if (i < valid) {
      char* to = advance(first, line_bytes, i);
      if constexpr (SquarePatch<T, kSide>::kWords == 4) {
        store16(to,
                make_uint4(patch.word[i][0], patch.word[i][1], patch.word[i][2], patch.word[i][3]));
      } else {
        store8(to, make_uint2(patch.word[i][0], patch.word[i][1]));
      }
    }
  }
}

/// Element j of line i.
template <typename T, int kSide>
__device__ __forceinline__ float patch_value(const SquarePatch<T, kSide>& patch, int i, int j) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(patch.word[i][j]);
  } else {
    const uint32_t pair = patch.word[i][j / 2];
    return j % 2 == 0 ? low_value<T>(pair) : high_value<T>(pair);
  }
}

/// A word of a patch from its element(s): one of fp32, two of 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t patch_word(const float* x) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(x[0]);
  } else {
    return make_pair16<T>(x[0], x[1]);
  }
}

}  // namespace sparse24
