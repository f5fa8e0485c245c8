// mvue8_rows.cuh: a row-major 16-bit gradient in e4m3 and MVUE-packed in 8 bits, by threads that
// hold eight tokens of four features: the two forms that backward of an 8-bit layer reads.
//
//   x8       [tokens, halves x features]          1 B an element
//   packed   [halves x features, padded/2], E     0.625 B
//   amax, tile_sums                               as in tile_outputs.cuh, which has every other mix
//
// A warp takes eight tokens of 128 features, a block of 256 threads 64 tokens. Threads go through
// their two groups of four tokens in a loop: the instructions of one are all that there are, and
// stay in the cache (docs/kernels/mvue.md has what that is worth). What bounds these kernels is not
// memory but instructions, so
//
//   - values stay two in a word where they can: what is not finite becomes NaN, and the largest
//     magnitude is found, two at a time;
//   - 1/scale and the shift of the exponent that rounding at random begins with are one factor;
//   - random bits come to their place by one byte permutation, and a code to its byte by a
//     multiplication that adds them, too.
//
// Kept bytes wait in shared memory for the rest of their line: 32 bytes a feature and tile, a whole
// sector. Of E a tile has half a block's rows, 8 bytes a feature.
#pragma once

#include "common/amax.cuh"
#include "common/square_patch.cuh"
#include "pack/mvue8_patch.cuh"
#include "pack/tile_outputs.cuh"
#include "pack/tile_sums.cuh"

namespace sparse24 {

constexpr int kRowOctets = kTileRows / 8;

/// Where a thread is: its eight tokens of four features, in tiles that are walked along features.
struct RowPlace {
  uint32_t tile_token, tile_feature;
  int octet, col;  // in the tile: token / 8, feature

  static __device__ __forceinline__ RowPlace here(uint32_t tile_cols) {
    const uint32_t row = blockIdx.x / tile_cols, col = blockIdx.x - row * tile_cols;
    return {row * kTileRows, col * kTileCols, static_cast<int>(threadIdx.x / 32),
            static_cast<int>(threadIdx.x % 32) * 4};
  }
  __device__ __forceinline__ int token() const { return static_cast<int>(tile_token) + octet * 8; }
  __device__ __forceinline__ int feature() const { return static_cast<int>(tile_feature) + col; }
};

/// patch_address of an operand that is known to lie by rows: no choice is left to the kernel.
template <typename T>
__device__ __forceinline__ const char* row_address(const PatchOperand& operand, int row, int col) {
  return advance(static_cast<const char*>(operand.data), operand.line_bytes, row) +
         uint64_t{static_cast<uint32_t>(col)} * sizeof(T);
}

/// Eight rows of two words of a row-major operand.
__device__ __forceinline__ void load_rows(const char* first, uint32_t stride, int valid,
                                          uint2 (&rows)[8]) {
  if (valid >= 8) {  // nearly always: no zeros to prepare, no conditions to keep
    SP24_UNROLL
    for (int i = 0; i < 8; ++i) rows[i] = load8_cached(advance(first, stride, i));
  } else {
    SP24_UNROLL
    for (int i = 0; i < 8; ++i)
      rows[i] = i < valid ? load8_cached(advance(first, stride, i)) : make_uint2(0, 0);
  }
}

/// Both values of a pair: NaN for what is not finite.
template <typename T>
__device__ __forceinline__ uint32_t finite_or_nan(uint32_t pair) {
  uint32_t result;  // x * 0 + x
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %1;" : "=r"(result) : "r"(pair), "r"(0u));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %1;" : "=r"(result) : "r"(pair), "r"(0u));
  }
  return result;
}

/// To e4m3 and its amax, four features of a token at a time.
template <typename T>
struct RowQuantizer {
  float inverse_scale;
  uint32_t largest = 0;  // of each half of a pair: a magnitude, and a sign that means nothing

  __device__ __forceinline__ uint32_t operator()(uint2 values) {
    const uint32_t a = finite_or_nan<T>(values.x), b = finite_or_nan<T>(values.y);
    largest = larger_magnitudes<T>(larger_magnitudes<T>(largest, a), b);
    return convert_quad8<Float8E4M3>(
        low_value<T>(a) * inverse_scale, high_value<T>(a) * inverse_scale,
        low_value<T>(b) * inverse_scale, high_value<T>(b) * inverse_scale);
  }
  __device__ __forceinline__ float amax() const {
    return fmaxf(fabsf(low_value<T>(largest)), fabsf(high_value<T>(largest)));
  }
};

/// Rounding at random of finite values, with the bits of RandomRounding: as long as the factor is a
/// power of two that fp32 has, which a scale up to 2^29 leaves it.
struct RowRounding {
  PackedRounding exactly;
  float factor;
  uint32_t to_top_byte;  // a factor, too
  bool needs_care;

  static __device__ __forceinline__ RowRounding of(const RandomRounding& rounding,
                                                   float inverse_scale) {
    return {{rounding, inverse_scale},
            inverse_scale * rounding.move,
            1u << (24 - rounding.dropped),
            !(inverse_scale >= 0x1p-29f)};
  }

  /// The codes of the two kept values of a group in the lower bytes. `random`: the word that its
  /// pair drew with (mvue_group.h).
  template <typename T>
  __device__ __forceinline__ uint32_t codes(const PrunedPair& kept, bool upper,
                                            uint32_t random) const {
    // 16 bits of the neighbour and half a step below the byte of the code.
    const uint32_t place = upper ? 0x5104u : 0x5324u;
    const float first = upper ? high_value<T>(kept.first) : low_value<T>(kept.first);
    const float second = upper ? high_value<T>(kept.second) : low_value<T>(kept.second);
    const uint32_t a = code(first) * to_top_byte + select_bytes(random, 0x80u, place);
    const uint32_t b = code(second) * to_top_byte + select_bytes(~random, 0x80u, place);
    const uint32_t signs = select_bytes(kept.first, kept.second, upper ? 0x73u : 0x51u);
    return select_bytes(a, b, 0x73u) | (signs & 0x8080u);
  }

 private:
  __device__ __forceinline__ uint32_t code(float x) const {
    return float_bits(fminf(fabsf(x) * factor, exactly.rounding.largest));
  }
};

/// A tile's kept bytes and positions, until whole lines of them can leave.
struct RowStage {
  uint16_t kept[kTileCols * kRowOctets][2];  // of an octet's two groups
  uint8_t meta[kTileCols * kRowOctets];

  /// Lanes that write have features four apart, those that read have words of neighbouring lines:
  /// quads are turned and octets exchanged, so that neither meet in a bank.
  static __device__ __forceinline__ int place(int feature, int octet) {
    const int quad = feature / 4, line = 4 * quad + (feature + quad / 8) % 4;
    return line * kRowOctets + (octet ^ quad % 8);
  }
  __device__ __forceinline__ uint32_t word(int feature, int octet) const {
    return *reinterpret_cast<const uint32_t*>(kept[place(feature, octet)]);
  }
};

/// Two pairs of a group of four tokens: their kept bytes into the stage, their positions returned,
/// right in the half of each byte that is the group's.
template <typename T>
__device__ __forceinline__ uint32_t stage_group(RowStage& stage, const uint2 (&tokens)[4],
                                                const uint32_t (&random)[2], int col, int octet,
                                                int group, const RowRounding& to) {
  const PairWords words[2] = {{{tokens[0].x, tokens[1].x, tokens[2].x, tokens[3].x}},
                              {{tokens[0].y, tokens[1].y, tokens[2].y, tokens[3].y}}};
  PrunedPair pruned[2];
  bool with_care = prune_pairs<T>(words, random, pruned) || to.needs_care;
  if constexpr (std::is_same_v<T, Float16>) {
    SP24_UNROLL
    for (const PrunedPair& pair : pruned)
      with_care |= overflows_fp16(pair.first) || overflows_fp16(pair.second);
  }
  uint32_t codes[4];
  if (with_care) {
    SP24_UNROLL
    for (int f = 0; f < 4; ++f) {
      const PrunedPair& pair = pruned[f / 2];
      codes[f] = kept_codes_with_care<T>({{pair.first, pair.second, 0, 0}, {random[f / 2], 0}},
                                         f % 2 == 1, to.exactly);
    }
  } else {
    SP24_UNROLL
    for (int f = 0; f < 4; ++f) codes[f] = to.codes<T>(pruned[f / 2], f % 2 == 1, random[f / 2]);
  }
  SP24_UNROLL
  for (int f = 0; f < 4; ++f)
    stage.kept[RowStage::place(col + f, octet)][group] = static_cast<uint16_t>(codes[f]);
  return meta_of(pruned[0], pruned[1]);
}

/// A byte of E each of four features.
__device__ __forceinline__ void stage_row_meta(RowStage& stage, uint32_t meta, int col, int octet) {
  SP24_UNROLL
  for (int f = 0; f < 4; ++f)
    stage.meta[(col + f) * kRowOctets + octet] = static_cast<uint8_t>(meta >> (8 * f));
}

/// After a barrier: the lines of `packed` and of E that the tile has part of, for one half.
__device__ __forceinline__ void store_row_stage(const TileOutputs& p, const RowStage& stage,
                                                const RowPlace& at, int half) {
  const uint32_t features = static_cast<uint32_t>(p.features),
                 first = half * features + at.tile_feature;
  const uint32_t length = static_cast<uint32_t>(round_up(p.tokens, Format8::kTokenStep)) / 2;

  const uint32_t line = threadIdx.x / 2, part = threadIdx.x % 2;
  const uint32_t start = at.tile_token / 2 + 16 * part;
  if (at.tile_feature + line < features && start < length) {
    const uint4 bytes = make_uint4(stage.word(line, 4 * part), stage.word(line, 4 * part + 1),
                                   stage.word(line, 4 * part + 2), stage.word(line, 4 * part + 3));
    store16(advance(static_cast<uint8_t*>(p.packed) + start, length, first + line), bytes);
  }

  const uint32_t row = threadIdx.x;  // a row's eight bytes of E: half of its sixteen
  if (row >= kTileCols || at.tile_feature + row >= round_up(features, kMetaBlock)) return;
  const uint32_t blocks_m = (p.halves * features + kMetaBlock - 1) / kMetaBlock;
  uint8_t* block =
      p.E + meta8_block_start((first + row) / kMetaBlock, at.tile_token / kMeta8BlockK, blocks_m);
  store8(block + row % kMetaBlock * kMeta8RowBytes + at.tile_token % kMeta8BlockK / 8,
         *reinterpret_cast<const uint2*>(stage.meta + row * kRowOctets));
}

/// The sums of the tile's features, if it has tokens.
__device__ __forceinline__ void store_row_sums(const TileOutputs& p, const OctetSums& sums,
                                               const RowPlace& at) {
  if (at.tile_token < static_cast<uint32_t>(p.tokens))
    sums.store(p.tile_sums, at.tile_token / kTileRows, at.tile_feature / kTileCols, p.features);
}

// ---- host -------------------------------------------------------------------------------------

/// One block a tile of 64 tokens: an even number along tokens, as blocks of E have 128.
inline int64_t row_blocks(const TileOutputs& p) { return int64_t{2} * p.tile_rows * p.tile_cols; }

/// Are these the outputs that kernels by rows make, and do vectors fit them?
inline bool rows8_fit(const TileOutputs& p, DType packed_dtype) {
  const bool vectors = reinterpret_cast<uintptr_t>(p.x8) % 4 == 0 && p.x8_ld % 4 == 0 &&
                       p.features % 4 == 0 && reinterpret_cast<uintptr_t>(p.E) % 8 == 0 &&
                       p.x8_ld < int64_t{1} << 32 && row_blocks(p) < int64_t{1} << 31;
  return is_float8(packed_dtype) && p.packed != nullptr && p.x8 != nullptr && p.x8_t == nullptr &&
         p.x16 == nullptr && p.counters == nullptr && p.packed_vectors && vectors;
}

}  // namespace sparse24
