// tile_pass.cuh: passes over operands of mixed layouts, a tile at a time through shared memory.
//
// A block takes one tile. Every operand comes and goes in lines of its own direction, by TMA where
// the GPU has it (tile_copies.cuh): 128 to 256 contiguous bytes each, which DRAM wants; patches
// loaded straight into registers had 64 B on one side, and 10 to 25 % less bandwidth. In between a
// thread owns a square patch of 16-byte lines (common/square_patch.cuh), and turns it in registers
// where two operands differ.
//
// Blocks are short: one tile, no pipeline inside. Six or so an SM overlap loading, work and
// storing.
#pragma once

#include <cstdint>

#include "activation/tile_copies.cuh"
#include "activation/tile_place.h"
#include "common/cuda_check.h"
#include "common/current_arch.h"
#include "common/layout.h"
#include "common/raster.h"
#include "common/square_patch.cuh"
#include "sparse24/types.h"

namespace sparse24 {

/// Tiles deep of a band of the walk (raster.h). Bands go along the lines of the result, which are
/// written out in turn; 4 was the best of 4, 16 and 64 (docs/kernels/activation.md).
constexpr uint32_t kTileBand = 4;

/// A tile of token_patches x feature_patches patches; both are multiples of 8.
template <typename T, int kTokenPatches, int kFeaturePatches>
struct PatchTile {
  static constexpr int kSide = kVectorSize<T>;
  static constexpr int kTokens = kTokenPatches * kSide, kFeatures = kFeaturePatches * kSide;
  static constexpr int kThreads = kTokenPatches * kFeaturePatches;
  static constexpr int kBytes = kTokens * kFeatures * static_cast<int>(sizeof(T));

  /// This thread's patch in a staged tile: its first line, and the distance of lines.
  struct Place {
    TilePlace patch = tile_place<kTokenPatches, kFeaturePatches>(threadIdx.x);

    __device__ __forceinline__ int pitch(bool column_major) const {
      return 16 * (column_major ? kTokenPatches : kFeaturePatches);
    }
    __device__ __forceinline__ int offset(bool column_major) const {
      return column_major ? patch.feature * kSide * pitch(true) + 16 * patch.token
                          : patch.token * kSide * pitch(false) + 16 * patch.feature;
    }
  };

  /// Line i of a patch as it lies in the staged tile.
  static __device__ __forceinline__ uint4 read_line(const char* tile, Place place,
                                                    bool column_major, int i) {
    return *reinterpret_cast<const uint4*>(tile + place.offset(column_major) +
                                           i * place.pitch(column_major));
  }
  static __device__ __forceinline__ SquarePatch<T> read(const char* tile, Place place,
                                                        bool column_major) {
    SquarePatch<T> patch;
    SP24_UNROLL
    for (int i = 0; i < kSide; ++i) {
      const uint4 v = read_line(tile, place, column_major, i);
      patch.word[i][0] = v.x, patch.word[i][1] = v.y;
      patch.word[i][2] = v.z, patch.word[i][3] = v.w;
    }
    return patch;
  }
  static __device__ __forceinline__ void write(char* tile, Place place, bool column_major,
                                               const SquarePatch<T>& patch) {
    char* to = tile + place.offset(column_major);
    const int pitch = place.pitch(column_major);
    SP24_UNROLL
    for (int i = 0; i < kSide; ++i) {
      *reinterpret_cast<uint4*>(to + i * pitch) =
          make_uint4(patch.word[i][0], patch.word[i][1], patch.word[i][2], patch.word[i][3]);
    }
  }
};

/// How the tiles of [tokens, features] are walked: in bands along rows, or along columns.
struct TileWalk {
  uint32_t tile_rows, tile_cols;
  bool along_columns;

  uint32_t tiles() const { return tile_rows * tile_cols; }
  __device__ __forceinline__ TileIndex tile() const {
    if (!along_columns) return raster_tile(blockIdx.x, tile_rows, tile_cols, kTileBand);
    const TileIndex turned = raster_tile(blockIdx.x, tile_cols, tile_rows, kTileBand);
    return {turned.col, turned.row};
  }
};

template <typename Tile>
TileWalk tile_walk(int64_t tokens, int64_t features, Layout result) {
  const int64_t rows = (tokens + Tile::kTokens - 1) / Tile::kTokens;
  const int64_t cols = (features + Tile::kFeatures - 1) / Tile::kFeatures;
  SP24_CHECK(rows * cols < int64_t{1} << 31, "h must have fewer than 2^31 tiles, got [", tokens,
             ", ", features, "]");
  return {static_cast<uint32_t>(rows), static_cast<uint32_t>(cols), result == Layout::kColumnMajor};
}

/// One operand, or one half of a gated one: `cols` columns from `first_col` of a matrix that
/// `tiles_fit`.
template <typename Tile, typename Operand, typename Pointer>
Operand tile_operand(const MatrixView<Pointer>& m, Layout layout, int64_t first_col, int64_t cols) {
  return Operand::template of<Tile>(matrix_lines(m, layout, first_col, cols));
}

template <typename Operand>
struct OperandKind {
  using Type = Operand;
};

/// Calls function(OperandKind<Operand>{}) with what moves tiles on the current device.
template <typename Function>
void with_tile_operand(const Function& function) {
  if constexpr (kBuiltSm90)
    if (current_arch() == KernelArch::kSm90) return function(OperandKind<EngineOperand>{});
  if constexpr (kBuiltSm80) return function(OperandKind<ThreadOperand>{});
}

/// Launches kernel(pass) with `smem_bytes` of shared memory.
template <typename Tile, typename Pass>
void launch_tile_pass(void (*kernel)(Pass), const Pass& pass, int smem_bytes, cudaStream_t stream) {
  SP24_CHECK_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  kernel<<<pass.walk.tiles(), Tile::kThreads, smem_bytes, stream>>>(pass);
}

}  // namespace sparse24
