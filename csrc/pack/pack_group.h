// pack_group.h: from the bits of a mask to positions of kept elements, and to the kept values
// themselves.
//
// One group at a time (mask_row, mask_column, and meta_from_bits of metadata.h) is what the CPU
// backend does. The GPU looks four groups up at once: the lower three bits of a group's nibble tell
// the six ways to keep two apart, and a byte permutation is a table of eight bytes. One table holds
// positions, two hold the halves of selectors that pick both kept 16-bit values of a group in one
// byte permutation. Both ways agree on every mask (tests/cpp).
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/mask_bits.h"
#include "common/metadata.h"
#include "common/pair16.h"

namespace sparse24 {

/// Byte i belongs to nibbles whose lower three bits are i: per_first * (first kept position) +
/// per_second * (second) + constant. Nibbles that do not have two bits count as 0 and 1.
constexpr uint64_t make_group_table(uint32_t per_first, uint32_t per_second, uint32_t constant) {
  uint64_t table = 0;
  for (uint32_t index = 0; index < 8; ++index) {
    uint32_t first = 0, second = 1;
    for (uint32_t i = 0; i < 4; ++i)
      for (uint32_t j = i + 1; j < 4; ++j)
        if (((1u << i | 1u << j) & 7u) == index) first = i, second = j;
    table |= static_cast<uint64_t>(per_first * first + per_second * second + constant)
             << (8 * index);
  }
  return table;
}

constexpr uint64_t kMetaTable = make_group_table(1, 4, 0);          // the nibble of E
constexpr uint64_t kFirstTable = make_group_table(0x22, 0, 0x10);   // position p: bytes 2p and
constexpr uint64_t kSecondTable = make_group_table(0, 0x22, 0x10);  // 2p + 1 of the group

/// The table's bytes for the four nibbles in the lower half of `kept`.
template <uint64_t kTable>
SP24_HD uint32_t look_up(uint32_t kept) {
  return select_bytes(static_cast<uint32_t>(kTable), static_cast<uint32_t>(kTable >> 32),
                      kept & 0x7777u);
}

/// Bytes of E of four lines: the nibbles of their lower groups are in the lower half of `kept`,
/// those of their upper groups in the upper half.
SP24_HD uint32_t meta_bytes_of(uint32_t kept) {
  return look_up<kMetaTable>(kept) | look_up<kMetaTable << 4>(kept >> 16);
}

/// Selectors for select_bytes, of four groups.
struct PairSelectors {
  uint32_t first, second;  // a byte a group
};

/// Of the four nibbles in the lower half of `kept`.
SP24_HD PairSelectors pair_selectors(uint32_t kept) {
  return {look_up<kFirstTable>(kept), look_up<kSecondTable>(kept)};
}

/// Of the words (elements 0, 1) and (elements 2, 3) of group i < 4: the pair (first kept, second
/// kept).
SP24_HD uint32_t kept_pair(uint32_t low, uint32_t high, const PairSelectors& selectors, int i) {
  const uint32_t own = static_cast<uint32_t>(i) | static_cast<uint32_t>(i + 4) << 4;
  return select_bytes(low, high, select_bytes(selectors.first, selectors.second, own));
}

}  // namespace sparse24
