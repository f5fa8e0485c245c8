// tile_outputs.cuh: everything that one read of a [tokens, features] matrix can leave as, by a
// block of 256 threads with a tile of 128 x 128 elements, a thread with 8 x 8 of them:
//
//   x16       the matrix itself, where it was made in this pass
//   x8        [tokens, features] e4m3                                  1 B an element
//   x8_t      [features, tokens padded to 32] e4m3                     1 B
//   packed16  MVUE-packed, [padded/2, features], E for (features, padded to 8)       1.125 B
//   packed8   MVUE-packed, [features, padded/2], E for (features, padded to 32)      0.625 B
//   tile_sums of 64 tokens each, with a packed form                    1/16 B
//   amax, counters   of x8's scale: quantize.h
//
// The kernel says where the patch comes from: dense matrices in quantize.cu and mvue_outputs.cu,
// activations in fused/activation_outputs.cuh. What leaves along tokens goes through shared memory
// (stage8.cuh), the rest straight from registers, 8 or 16 B a thread and 128 or 256 B of a row.
//
// Edges    Tokens and features past the end are zeros. Rows that no vector fits are stored element
//          by element. A gated result comes as two halves, gate and up, `features` wide each: with
//          packing, whole blocks of E, so features % 64 == 0.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/element.cuh"
#include "common/format.h"
#include "common/layout.h"
#include "common/raster.h"
#include "common/stage8.cuh"
#include "common/weight_patch.cuh"
#include "pack/mvue8_patch.cuh"
#include "pack/quantize_patch.cuh"
#include "pack/stage.cuh"
#include "pack/tile_sums.cuh"
#include "sparse24/quantize.h"

namespace sparse24 {

/// The packed form of a pass: 16 bits by their storage type, either of the 8-bit formats, or none.
struct NoPacking {};
struct AnyFloat8 {};
template <typename Packed>
constexpr bool packs16 = kIsIn<Packed, Types16>;
template <typename Packed>
constexpr bool packs8 = std::is_same_v<Packed, AnyFloat8>;

struct TileOutputs {
  int tokens, features, halves;  // of the result: `halves` x `features` columns
  uint32_t tile_rows, tile_cols;

  uint16_t* x16;
  uint8_t *x8, *x8_t;
  int64_t x16_ld, x8_ld, x8_t_ld;
  bool x8_vectors, x8_t_vectors, packed_vectors;  // the last of packed8
  const float* scale;
  float* amax;
  int64_t* counters;

  const int64_t* seed;
  void* packed;
  uint8_t* E;
  const float* packed_scale;
  RandomRounding rounding;  // of packed8
  float* tile_sums;
};

/// A patch by tokens, 16-bit elements.
template <typename T>
struct DensePatch {
  Patch16 lines;
  __device__ __forceinline__ float value(int i, int j) const {
    const uint32_t pair = lines.line[i][j / 2];
    return j % 2 == 0 ? low_value<T>(pair) : high_value<T>(pair);
  }
};
template <>
struct DensePatch<float> {
  float lines[kPatch][kPatch];
  __device__ __forceinline__ float value(int i, int j) const { return lines[i][j]; }
};

/// Columns [col, ...) below `end` of a row-major matrix in whole vectors, 16-bit elements.
template <typename T>
__device__ __forceinline__ DensePatch<T> load_vectors(const ConstMatrix& m, int row, int col,
                                                      int end) {
  const uint32_t stride = static_cast<uint32_t>(m.row_stride) * 2;
  const uint16_t* first = advance(static_cast<const uint16_t*>(m.data), stride, row) + col;
  return {load_patch16<1, true>(first, stride, col < end ? static_cast<int>(m.rows) - row : 0)};
}

/// The same of any matrix; `vectors`: of such a one.
template <typename T>
__device__ __forceinline__ DensePatch<T> load_dense(const ConstMatrix& m, bool vectors, int row,
                                                    int col, int end) {
  if (vectors) return load_vectors<T>(m, row, col, end);
  DensePatch<T> patch;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    SP24_UNROLL
    for (int p = 0; p < 4; ++p) {
      uint32_t pair = 0;
      SP24_UNROLL
      for (int n = 0; n < 2; ++n)
        if (col + 2 * p + n < end) pair |= read_bits<T>(m, row + i, col + 2 * p + n) << (16 * n);
      patch.lines.line[i][p] = pair;
    }
  }
  return patch;
}

struct Nothing {};

/// What waits in shared memory.
template <typename Packed>
struct TileMemory {
  LineStage lines;
  std::conditional_t<packs8<Packed>, PackedStage, Nothing> packed;
  alignas(16) uint8_t meta[packs16<Packed> ? 4 * kStageStride : 16];
  std::conditional_t<std::is_same_v<Packed, NoPacking>, Nothing, OctetSums> sums[2];
  uint32_t of_warp[kTile8Threads / 32];
};

/// Where a thread's patch lies: in the tile, and in the half of the result that is written.
struct PatchPlace {
  PatchOrigin origin;
  int tile_token, tile_feature, half;

  __device__ __forceinline__ int token() const { return tile_token + origin.row; }
  __device__ __forceinline__ int feature() const { return tile_feature + origin.col; }
};

__device__ __forceinline__ PatchPlace patch_place(const TileOutputs& p) {
  const TileIndex tile = raster_tile(blockIdx.x, p.tile_rows, p.tile_cols, kBand8);
  return {tile8_origin<true>(false), static_cast<int>(tile.row) * kTile8,
          static_cast<int>(tile.col) * kTile8, 0};
}

/// A patch of 16-bit values to a row-major matrix in whole vectors, at (row, col) of `cols`
/// columns.
__device__ __forceinline__ void store_vectors(uint16_t* x, int64_t ld, const Patch16& patch,
                                              int row, int col, int rows, int cols) {
  if (col < cols)
    store_patch16<1>(x + row * ld + col, static_cast<uint32_t>(ld * 2), rows - row, patch);
}

__device__ __forceinline__ void store_x8(const TileOutputs& p, const Patch8& patch,
                                         const PatchPlace& at) {
  uint8_t* first = p.x8 + at.token() * p.x8_ld + int64_t{at.half} * p.features + at.feature();
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    if (at.token() + i >= p.tokens) continue;
    uint8_t* line = first + i * p.x8_ld;
    if (p.x8_vectors) {
      if (at.feature() < p.features) store8(line, make_uint2(patch.line[i][0], patch.line[i][1]));
    } else {
      SP24_UNROLL
      for (int j = 0; j < kPatch; ++j)
        if (at.feature() + j < p.features)
          line[j] = static_cast<uint8_t>(patch.line[i][j / 4] >> (8 * (j % 4)));
    }
  }
}

/// The e4m3 copies, amax and counts. What waits in memory.lines leaves in store_staged_outputs.
template <typename Patch, typename Memory>
__device__ __forceinline__ void write_float8(const TileOutputs& p, Memory& memory,
                                             const Patch& patch, const PatchPlace& at) {
  PatchStatistics seen;
  if (p.x8 != nullptr || p.x8_t != nullptr) {
    const Patch8 bytes = quantize_patch<Float8E4M3>(patch, inverse_of(p.scale), p.amax != nullptr,
                                                    p.counters != nullptr, seen);
    if (p.counters != nullptr) add_counts(seen.clipped, seen.flushed, p.counters);
    if (p.x8 != nullptr) store_x8(p, bytes, at);
    if (p.x8_t != nullptr) memory.lines.put(transpose(bytes), at.origin.col, at.origin.row);
  } else if (p.amax != nullptr) {
    raise_patch(patch, seen);
  }
  if (p.amax != nullptr) store_amax<kTile8Threads>(float_bits(seen.amax), p.amax, memory.of_warp);
}

/// Sums of the patch's columns, over its eight tokens in turn.
template <typename T, typename Memory>
__device__ __forceinline__ void put_tile_sums(Memory& memory, const Patch16& patch,
                                              const PatchOrigin& origin) {
  SP24_UNROLL
  for (int p = 0; p < 4; p += 2) {
    float sums[4] = {};
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      add_pair<T>(patch.line[i][p], sums[0], sums[1]);
      add_pair<T>(patch.line[i][p + 1], sums[2], sums[3]);
    }
    memory.sums[origin.row / kTileRows].put(origin.row % kTileRows, origin.col + 2 * p, sums);
  }
}

template <typename Memory>
__device__ __forceinline__ void store_tile_sums(const TileOutputs& p, const Memory& memory,
                                                const PatchPlace& at) {
  const int part = threadIdx.x / kTileCols, col = threadIdx.x % kTileCols;
  const int tile_row = at.tile_token / kTileRows + part, feature = at.tile_feature + col;
  if (tile_row * kTileRows >= p.tokens || feature >= p.features) return;
  float sum = 0.0f;
  SP24_UNROLL
  for (int octet = 0; octet < OctetSums::kOctets; ++octet) sum += memory.sums[part].of[octet][col];
  p.tile_sums[int64_t{tile_row} * p.halves * p.features + at.half * p.features + feature] = sum;
}

/// Rows of packed16 straight from registers; positions wait in memory.meta.
template <typename T, typename Memory>
__device__ __forceinline__ void write_packed16(const TileOutputs& p, Memory& memory,
                                               const Patch16& patch, const PhiloxKey& key,
                                               const PatchPlace& at) {
  const int column = at.half * p.features + at.feature(), token = at.token();
  const MvuePatch pruned = prune_patch<T, true>(patch, key, static_cast<uint32_t>(token) / 8,
                                                static_cast<uint32_t>(column) / 4);
  const int padded = static_cast<int>(round_up(p.tokens, 8));
  const uint32_t stride = 2u * static_cast<uint32_t>(p.halves * p.features);
  uint16_t* first =
      advance(static_cast<uint16_t*>(p.packed), stride, static_cast<uint32_t>(token) / 2) + column;
  if (token < padded && at.feature() < p.features) store_mvue(first, stride, pruned);
  const uint32_t m = at.origin.col, k = at.origin.row;
  stage_bytes(memory.meta, m / kMetaBlock * 2 + k / kMetaBlock, m % kMetaBlock, k % kMetaBlock,
              pruned.quad[0].meta, pruned.quad[1].meta);
}

/// One warp a block of 64 x 64 positions.
template <typename Memory>
__device__ __forceinline__ void store_meta16(const TileOutputs& p, const Memory& memory,
                                             const PatchPlace& at) {
  const uint32_t warp = threadIdx.x / 32;
  const int m = at.tile_feature + static_cast<int>(warp / 2) * kMetaBlock;
  if (warp >= 4 || m >= p.features) return;
  store_staged(p.E, memory.meta, warp, static_cast<uint32_t>(at.half * p.features + m) / kMetaBlock,
               static_cast<uint32_t>(at.tile_token) / kMetaBlock + warp % 2,
               static_cast<uint32_t>(p.halves * p.features),
               static_cast<uint32_t>(round_up(p.tokens, 8)));
}

template <typename Packed, typename Memory>
__device__ __forceinline__ void store_packed8(const TileOutputs& p, const Memory& memory,
                                              const PatchPlace& at) {
  const int64_t length = round_up(p.tokens, Format8::kTokenStep) / 2;
  const LineTarget to = {static_cast<uint8_t*>(p.packed) + int64_t{at.half} * p.features * length,
                         length, p.features, static_cast<int>(length)};
  memory.packed.store(to, p.packed_vectors,
                      p.E + int64_t{at.half} * (p.features / kMetaBlock) * kMeta8BlockBytes,
                      meta_blocks(int64_t{p.halves} * p.features), at.tile_feature, at.tile_token);
}

/// All of a patch's outputs but x16. All threads of the block call it, for one half after the
/// other.
template <typename T, typename Packed>
__device__ __forceinline__ void write_outputs(const TileOutputs& p, TileMemory<Packed>& memory,
                                              const DensePatch<T>& patch, const PatchPlace& at) {
  write_float8(p, memory, patch, at);
  if constexpr (!std::is_same_v<Packed, NoPacking>) {
    const PhiloxKey key = philox_key(p.seed[0], p.seed[1]);
    if (p.tile_sums != nullptr) put_tile_sums<T>(memory, patch.lines, at.origin);
    if constexpr (packs16<Packed>) {
      write_packed16<T>(p, memory, patch.lines, key, at);
    } else {
      const int column = at.half * p.features + at.feature();
      const PackedRounding to = {p.rounding, inverse_of(p.packed_scale)};
      memory.packed.put(prune_patch8<T>(patch.lines, key, static_cast<uint32_t>(at.token()) / 8,
                                        static_cast<uint32_t>(column) / 4, to),
                        at.origin.col, at.origin.row);
    }
  }
  __syncthreads();  // all that waits in memory is there
  if (p.x8_t != nullptr) {
    const LineTarget to = {p.x8_t + int64_t{at.half} * p.features * p.x8_t_ld, p.x8_t_ld,
                           p.features, static_cast<int>(round_up(p.tokens, Format8::kTokenStep))};
    memory.lines.store(to, p.x8_t_vectors, at.tile_feature, at.tile_token);
  }
  if constexpr (packs16<Packed>) store_meta16(p, memory, at);
  if constexpr (packs8<Packed>) store_packed8<Packed>(p, memory, at);
  if constexpr (!std::is_same_v<Packed, NoPacking>) {
    if (p.tile_sums != nullptr) store_tile_sums(p, memory, at);
  }
}

// ---- host -------------------------------------------------------------------------------------

/// Outputs of a result of `halves` x `features` columns: the tiles, and what `to` asks for.
inline TileOutputs tile_outputs(int64_t tokens, int64_t features, int halves,
                                const Float8Output& to) {
  TileOutputs p = {};
  p.tokens = static_cast<int>(tokens), p.features = static_cast<int>(features), p.halves = halves;
  p.tile_rows = static_cast<uint32_t>(round_up(tokens, kTile8) / kTile8);
  p.tile_cols = static_cast<uint32_t>(round_up(features, kTile8) / kTile8);
  SP24_CHECK(int64_t{p.tile_rows} * p.tile_cols < int64_t{1} << 31,
             "a matrix must have fewer than 2^31 tiles of 128 x 128, got [", tokens, ", ", features,
             "]");
  p.x8 = static_cast<uint8_t*>(to.x8), p.x8_ld = to.x8_ld;
  p.x8_vectors =
      reinterpret_cast<uintptr_t>(to.x8) % 8 == 0 && to.x8_ld % 8 == 0 && features % 8 == 0;
  p.x8_t = static_cast<uint8_t*>(to.x8_t), p.x8_t_ld = to.x8_t_ld;
  p.x8_t_vectors = vectors_fit(to.x8_t, to.x8_t_ld, 16);
  p.scale = to.scale, p.amax = to.amax, p.counters = to.counters;
  return p;
}

/// Do rows of packed16 move in whole vectors?
inline bool packing16_fits(const void* packed, int64_t features) {
  return is_aligned16(packed) && features % kPatch == 0;
}

/// Adds a packed form to the outputs. Args: of mvue_pack or an activation pass.
template <typename Args>
void add_packing(TileOutputs& p, const Args& args, DType packed_dtype) {
  p.seed = args.seed, p.packed = args.packed, p.E = args.E, p.packed_scale = args.scale;
  p.rounding = packed_dtype == DType::kFloat8E5M2 ? RandomRounding::of<Float8E5M2>()
                                                  : RandomRounding::of<Float8E4M3>();
  const int64_t length = round_up(p.tokens, Format8::kTokenStep) / 2;
  p.packed_vectors = vectors_fit(args.packed, length, length);
}

/// Calls function(Packed{}) for the packed form of a pass over T.
template <typename T, typename Function>
void with_packing(bool packs, DType packed_dtype, const Function& function) {
  if (!packs) return function(NoPacking{});
  with_packed_format(packed_dtype, [&](auto format) {
    using Storage = typename decltype(format)::Storage;
    if constexpr (decltype(format)::kScaled) {
      function(AnyFloat8{});
    } else if constexpr (std::is_same_v<Storage, T>) {
      function(Storage{});
    }
  });
}

}  // namespace sparse24
