// metadata.h: E, the positions of kept elements, in the byte order that the sm_90 sparse wgmma path
// reads.
//
// A group of four elements along k keeps two, at idx0 < idx1: the nibble idx0 | idx1 << 2. A byte
// holds the nibbles of two neighbouring groups, the lower one (smaller k) in the lower half. The
// bytes of a 64 (m) x 64 (k) block are 512 contiguous ones; blocks run along m first, then along k.
// This is CUTLASS' order for 16-bit types and a K tile of 64 (checked against its compressor in
// tests/cpp/gemm_gpu_test.cu); the library uses it for every operand.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24 {

constexpr int kMetaBlock = 64;  // extents of a metadata block, in elements, along m and along k
constexpr int kMetaBlockBytes = 512;       // 64 * 64 elements / 8 a byte
constexpr uint32_t kPaddingNibble = 0x4u;  // positions 0 and 1: what lies past the operand's end

SP24_HD int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

/// Offset of the byte of elements (m, k..k+7) within its 64 x 64 block; m, k in [0, 64), k % 8 ==
/// 0.
SP24_HD int meta_block_offset(int m, int k) {
  return (m / 16) * 128 + ((k / 16) % 2) * 64 + (m % 8) * 8 + (k / 32) * 4 + ((m / 8) % 2) * 2 +
         (k % 16) / 8;
}

/// Offset of the first byte of metadata block (block_m, block_k) of an operand with `blocks_m` of
/// them along m.
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
