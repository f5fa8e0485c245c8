// stage8.cuh: 8-bit results of a tile on their way through shared memory, so that they leave in
// whole 16-byte vectors along k, whichever way the tile was read.
//
// A tile is 128 x 128 elements, of 256 threads with patches of 8x8 each. What waits:
//
//   PackedStage   128 rows of m, the 64 bytes each keeps of its 128 elements along k, and two
//                 blocks of E (64 x 128 elements, 1024 bytes): the byte of (m, k .. k + 7) is
//                 number k / 8 of row m's 16
//   LineStage     128 lines of 128 bytes: a dense matrix, turned
//
// 16-byte vectors of a line are exchanged by its patch (line / 8): lanes that put a word of
// neighbouring patches then meet four banks instead of one.
#pragma once

#include <cstdint>

#include "common/bytes.h"
#include "common/metadata.h"
#include "common/patch.cuh"
#include "common/vector.cuh"

namespace sparse24 {

constexpr int kTile8 = 128, kTile8Threads = kTile8 / kPatch * (kTile8 / kPatch);
static_assert(kTile8 == kMeta8BlockK && kTile8 == 2 * kMetaBlock, "a tile has whole blocks of E");

/// Blocks of E along m.
SP24_HD int64_t meta_blocks(int64_t m) { return round_up(m, kMetaBlock) / kMetaBlock; }

/// Memory that a tile's lines go to: `length` of each of `lines` are there, `pitch` bytes apart.
struct LineTarget {
  uint8_t* data;
  int64_t pitch;
  int lines, length;
};

/// Can lines move in whole vectors?
inline bool vectors_fit(const void* data, int64_t pitch, int64_t length) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 16 == 0 && length % 16 == 0;
}

/// Stores lines [line, ...) x [along, ...) of a tile whose lines have kBytes, staged at `from`.
template <int kBytes>
__device__ __forceinline__ void store_staged_lines(const LineTarget& to, bool vectors,
                                                   const uint8_t* from, int line, int along) {
  constexpr int kVectors = kBytes / 16;
  for (int v = threadIdx.x; v < kTile8 * kVectors; v += kTile8Threads) {
    const int row = v / kVectors, vector = v % kVectors, start = along + 16 * vector;
    if (line + row >= to.lines || start >= to.length) continue;
    const uint4 value = *reinterpret_cast<const uint4*>(from + row * kBytes +
                                                        16 * (vector ^ (row / kPatch % kVectors)));
    uint8_t* at = to.data + int64_t{line + row} * to.pitch + start;
    if (vectors) {
      store16(at, value);
    } else {
      const uint32_t words[4] = {value.x, value.y, value.z, value.w};
      SP24_UNROLL
      for (int i = 0; i < 16; ++i)
        if (start + i < to.length) at[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
    }
  }
}

/// Where word `along` / 4 of a line waits.
template <int kBytes>
__device__ __forceinline__ int staged_offset(int line, int along) {
  const int vector = along / 16 ^ (line / kPatch % (kBytes / 16));
  return line * kBytes + 16 * vector + along % 16;
}

struct LineStage {
  uint8_t bytes[kTile8 * kTile8];

  /// Lines of a patch, as they go to memory: line `line` of the tile on, from `along` on.
  __device__ __forceinline__ void put(const Patch8& patch, int line, int along) {
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      *reinterpret_cast<uint2*>(bytes + staged_offset<kTile8>(line + i, along)) =
          make_uint2(patch.line[i][0], patch.line[i][1]);
    }
  }
  /// All threads, after a barrier.
  __device__ __forceinline__ void store(const LineTarget& to, bool vectors, int line,
                                        int along) const {
    store_staged_lines<kTile8>(to, vectors, bytes, line, along);
  }
};

/// What a patch gives to a packed operand: of each of eight rows of m four kept values and a byte
/// of E (rows 0-3 in `low`).
struct PackedLines {
  uint32_t kept[kPatch];
  uint32_t meta_low, meta_high;
};

struct PackedStage {
  uint8_t values[kTile8 * kTile8 / 2];
  uint8_t meta[2 * kMeta8BlockBytes];

  /// `m`, `k`: of the patch, within the tile.
  __device__ __forceinline__ void put(const PackedLines& lines, int m, int k) {
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      *reinterpret_cast<uint32_t*>(values + staged_offset<kTile8 / 2>(m + i, k / 2)) =
          lines.kept[i];
    }
    uint8_t* byte = meta + m * kMeta8RowBytes + k / 8;
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      byte[i * kMeta8RowBytes] = static_cast<uint8_t>(lines.meta_low >> (8 * i));
      byte[(i + 4) * kMeta8RowBytes] = static_cast<uint8_t>(lines.meta_high >> (8 * i));
    }
  }

  /// All threads, after a barrier. `to` is packed, [m, k/2]; the tile begins at (m, k) of it. `E`
  /// begins at its rows, of `blocks_m` blocks along m in all.
  __device__ __forceinline__ void store(const LineTarget& to, bool vectors, uint8_t* E,
                                        int64_t blocks_m, int m, int k) const {
    store_staged_lines<kTile8 / 2>(to, vectors, values, m, k / 2);
    const int block = threadIdx.x / 64, vector = threadIdx.x % 64;
    if (block >= 2 || m + block * kMetaBlock >= to.lines || k / 2 >= to.length) return;
    uint8_t* at =
        E + meta8_block_start(m / kMetaBlock + block, k / kMeta8BlockK, blocks_m) + vector * 16;
    const uint8_t* from = meta + block * kMeta8BlockBytes + vector * 16;
    if (reinterpret_cast<uintptr_t>(E) % 16 == 0) {
      store16(at, *reinterpret_cast<const uint4*>(from));
    } else {
      for (int i = 0; i < 16; ++i) at[i] = from[i];
    }
  }
};

/// Place of this thread's patch in a tile, both in elements. kByRows: a warp takes two lines of 16
/// patches; else four by eight, for operands of which one lies by columns.
template <bool kByRows>
__device__ __forceinline__ PatchOrigin tile8_origin(bool paired) {
  const PatchOrigin half =
      patch_origin(kByRows ? Walk::kRows : Walk::kSquare, paired, threadIdx.x % kTileThreads);
  return {half.row + static_cast<int>(threadIdx.x / kTileThreads) * kTileRows, half.col};
}
static_assert(kTile8Threads == 2 * kTileThreads && kTile8 == kTileCols && kTile8 == 2 * kTileRows,
              "a tile is two of tile.h, one below the other");

}  // namespace sparse24
