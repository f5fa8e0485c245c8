// metadata.h: E, the positions of kept elements, in the byte orders that the sm_90 sparse wgmma
// path reads.
//
// A group of four elements along k keeps two, at idx0 < idx1: the nibble idx0 | idx1 << 2. A byte
// holds the nibbles of two neighbouring groups, the lower one (smaller k) in the lower half. There
// are two orders, CUTLASS' own (tests/cpp/gemm_gpu_test.cu compares with its compressor): one for
// 16-bit values with K tiles of 64, one for 8-bit values with K tiles of 128. In both, the bytes of
// a block of E are contiguous, and blocks run along m first, then along k.
//
// 16-bit values: blocks of 64 (m) x 64 (k), 512 bytes. Half a block, k = 0..31 of rows 0..15 (the
// other three sixteens of rows follow, 128 bytes each; k = 16..31 and 48..63 lie 64 bytes on):
//
//               k  0..7  8..15 | 32..39 40..47
//      row 0    byte 0     1   |   4      5        rows 0..7 lie 8 bytes apart,
//      row 8         2     3   |   6      7        rows 8..15 between them, 2 bytes on
//      row 1         8     9   |  12     13
//      row 9        10    11   |  14     15
//
// 8-bit values: blocks of 64 (m) x 128 (k), 1024 bytes, 16 bytes a row. mma.sp of sm_89 takes the
// same words (gemm/sm80/staged.h), and so does that of sm_80 for 16-bit values:
//
//               k  0..7  8..15  16..23  ...  120..127
//      row 0    byte 0     1      2     ...     15
//      row 1        16    17     18     ...     31
//      ...
//      row 63     1008  1009   1010     ...   1023
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24 {

constexpr int kMetaBlock = 64;  // extents of a metadata block, in elements, along m and along k
constexpr int kMetaBlockBytes = 512;       // 64 * 64 elements / 8 a byte
constexpr uint32_t kPaddingNibble = 0x4u;  // positions 0 and 1: what lies past the operand's end

SP24_HD int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/// Offset of the byte of elements (m, k..k+7) within its 64 x 64 block; k is a multiple of 8.
SP24_HD int meta_block_offset(int m, int k) {
  return (m / 16) * 128 + ((k / 16) % 2) * 64 + (m % 8) * 8 + (k / 32) * 4 + ((m / 8) % 2) * 2 +
         (k % 16) / 8;
}

/// Offset of the first byte of block (block_m, block_k) of an operand with `blocks_m` along m.
SP24_HD int64_t meta_block_start(int64_t block_m, int64_t block_k, int64_t blocks_m) {
  return (block_k * blocks_m + block_m) * kMetaBlockBytes;
}

/// Offset of the byte that holds element (m, k) of an operand of `rows_m` rows.
SP24_HD int64_t meta_byte_offset(int64_t m, int64_t k, int64_t rows_m) {
  const int64_t blocks_m = round_up(rows_m, kMetaBlock) / kMetaBlock;
  return meta_block_start(m / kMetaBlock, k / kMetaBlock, blocks_m) +
         meta_block_offset(static_cast<int>(m % kMetaBlock), static_cast<int>(k % kMetaBlock));
}

SP24_HD int64_t meta_bytes(int64_t m, int64_t k) {
  return round_up(m, kMetaBlock) * round_up(k, kMetaBlock) / 8;
}

// ---- 8-bit values -----------------------------------------------------------------------------

constexpr int kMeta8BlockK = 128;       // along k; along m it is kMetaBlock, too
constexpr int kMeta8BlockBytes = 1024;  // 64 * 128 elements / 8 a byte
constexpr int kMeta8RowBytes = 16;

/// Offset of the first byte of block (block_m, block_k) of an operand with `blocks_m` along m.
SP24_HD int64_t meta8_block_start(int64_t block_m, int64_t block_k, int64_t blocks_m) {
  return (block_k * blocks_m + block_m) * kMeta8BlockBytes;
}

/// Offset of the byte that holds element (m, k) of an 8-bit operand of `rows_m` rows.
SP24_HD int64_t meta8_byte_offset(int64_t m, int64_t k, int64_t rows_m) {
  const int64_t blocks_m = round_up(rows_m, kMetaBlock) / kMetaBlock;
  return meta8_block_start(m / kMetaBlock, k / kMeta8BlockK, blocks_m) +
         m % kMetaBlock * kMeta8RowBytes + k % kMeta8BlockK / 8;
}

SP24_HD int64_t meta8_bytes(int64_t m, int64_t k) {
  return round_up(m, kMetaBlock) * round_up(k, kMeta8BlockK) / 8;
}

// ---- nibbles ----------------------------------------------------------------------------------

SP24_HD int meta_first(uint32_t nibble) { return static_cast<int>(nibble & 3u); }
SP24_HD int meta_second(uint32_t nibble) { return static_cast<int>((nibble >> 2) & 3u); }
SP24_HD bool meta_is_valid(uint32_t nibble) { return meta_first(nibble) < meta_second(nibble); }

/// The nibble of a group whose four kept bits (two of them set) are `kept`.
SP24_HD uint32_t meta_from_bits(uint32_t kept) {
  const uint32_t first = (kept & 1u) ? 0u : (kept & 2u) ? 1u : 2u;
  const uint32_t second = (kept & 8u) ? 3u : (kept & 4u) ? 2u : 1u;
  return first | (second << 2);
}

}  // namespace sparse24
