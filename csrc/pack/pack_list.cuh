// pack_list.cuh: weights to be packed by one launch, and masks that are given.
#pragma once

#include <cstdint>

#include "common/tensor_list.h"
#include "common/weight_patch.cuh"
#include "pack/pack_group.h"
#include "sparse24/pack.h"

namespace sparse24 {

struct PackTensor {
  ConstMatrix w;
  uint16_t* mask;
  void* packed;
  uint8_t* E;
  void* packed_t;
  uint8_t* E_t;
  uint32_t tile_rows, tile_cols;
};
template <int kCapacity>
using PackList = TensorList<PackTensor, kCapacity>;
static_assert(sizeof(PackList<kTensorsPerLaunch>) <= kKernelParameterBytes,
              "a launch's tensors must fit its parameters");

/// The masks of a patch: blocks (0, 0) and (0, 1) in the halves of `top`, (1, 0) and (1, 1) in
/// those of `bottom`.
struct PatchMasks {
  uint32_t top, bottom;
};

/// The masks of a patch of 4x8: two of one row of blocks.
__device__ __forceinline__ uint32_t* row_patch_masks(const PackTensor& t, int row, int col) {
  const uint32_t block_cols = static_cast<uint32_t>(t.w.cols) / 4;
  return reinterpret_cast<uint32_t*>(t.mask +
                                     uint64_t{static_cast<uint32_t>(row) / 4} * block_cols +
                                     static_cast<uint32_t>(col) / 4);
}

/// A mask source that reads: `of` a square patch, `of_row_patch` one of 4x8. The other source is in
/// fused/search_and_pack.cu. What lies outside gets some valid mask: its metadata are replaced, its
/// values not stored.
struct ReadMasks {
  template <Layout kLayout, typename Patch>
  static __device__ __forceinline__ PatchMasks of(const Patch&, const PackTensor& t, int row,
                                                  int col) {
    constexpr uint32_t kFirst = 0xC3C3u;
    PatchMasks masks = {kFirst | kFirst << 16, kFirst | kFirst << 16};
    const int rows = static_cast<int>(t.w.rows), cols = static_cast<int>(t.w.cols);
    const uint32_t block_cols = static_cast<uint32_t>(cols) / 4;
    const uint16_t* first =
        t.mask + uint64_t{static_cast<uint32_t>(row) / 4} * block_cols + col / 4;
    SP24_UNROLL
    for (int bi = 0; bi < 2; ++bi) {
      if (row + 4 * bi < rows && col < cols) {
        const uint16_t* from = first + bi * block_cols;
        uint32_t& pair = bi == 0 ? masks.top : masks.bottom;
        if constexpr (kLayout != Layout::kStrided) {
          pair = *reinterpret_cast<const uint32_t*>(from);
        } else {
          pair = from[0] | (col + 4 < cols ? from[1] : kFirst) << 16;
        }
      }
    }
    return masks;
  }

  template <typename Patch>
  static __device__ __forceinline__ uint32_t of_row_patch(const Patch&, const PackTensor& t,
                                                          int row, int col, bool inside) {
    return inside ? *row_patch_masks(t, row, col) : 0xC3C3C3C3u;
  }
};

}  // namespace sparse24
