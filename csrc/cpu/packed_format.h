// packed_format.h: where values and positions go in a packed operand of each format, on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/format.h"
#include "cpu/strided.h"

namespace sparse24::cpu {

template <typename T>
constexpr bool is_packed8 = std::is_same_v<T, Float8E4M3> || std::is_same_v<T, Float8E5M2>;

/// A value as it is packed to nearest.
template <typename Out>
struct Quantizer {
  float inverse_scale;

  template <typename In>
  Out operator()(In x) const {
    if constexpr (is_packed8<Out>) {
      return to_float8<Out>(to_float(x), inverse_scale);
    } else {
      return convert<Out>(x);
    }
  }
};

/// Calls function(F{}) with the storage type of a float8 dtype.
template <typename Function>
void with_float8(DType dtype, Function&& function) {
  with_packed_format(dtype, [&](auto format) {
    using Storage = typename decltype(format)::Storage;
    if constexpr (is_packed8<Storage>) function(Storage{});
  });
}

/// The two kept values of a group that runs down the column `col` of [rows, cols] from `row` on:
/// [rows/2, cols] in 16 and 32 bits, along the groups in 8: [cols, rows/2].
template <typename T>
class KeptAlongColumns {
 public:
  using Void = std::conditional_t<std::is_const_v<T>, const void, void>;
  static constexpr bool kAlongGroups = is_packed8<std::remove_const_t<T>>;

  KeptAlongColumns(Void* packed, int64_t rows, int64_t cols)
      : packed_(static_cast<T*>(packed)), rows_(rows), cols_(cols) {}
  T* first(int64_t row, int64_t col) const {
    return kAlongGroups ? packed_ + col * (rows_ / 2) + row / 2 : packed_ + row / 2 * cols_ + col;
  }
  int64_t step() const { return kAlongGroups ? 1 : cols_; }

 private:
  T* packed_;
  int64_t rows_, cols_;
};

/// In 8 bits a block of E is two tiles along k, of which an operand may have one: its padding is
/// written beforehand.
template <typename T>
void fill_padding(uint8_t* E, int64_t m, int64_t k) {
  if (is_packed8<T> && E != nullptr)
    std::memset(E, kPaddingNibble * 0x11, static_cast<size_t>(meta8_bytes(m, k)));
}

/// The positions of a tile of 64 x 64 elements while they are found; what no element claims stays
/// padding.
template <typename T>
class MetaTile {
 public:
  MetaTile(uint8_t* E, int64_t rows_m, int64_t tile_m, int64_t tile_k)
      : E_(E), rows_m_(rows_m), tile_m_(tile_m), tile_k_(tile_k) {
    std::memset(bytes_, kPaddingNibble * 0x11, sizeof bytes_);
  }

  void set(int64_t m, int64_t k, uint32_t nibble) {
    uint8_t& byte = bytes_[offset(static_cast<int>(m), static_cast<int>(k & ~7))];
    const int shift = k & 4 ? 4 : 0;
    byte = static_cast<uint8_t>((byte & ~(0xFu << shift)) | (nibble << shift));
  }

  void store() const {
    if constexpr (is_packed8<T>) {
      for (int64_t m = 0; m < kTile; ++m)
        std::memcpy(E_ + meta8_byte_offset(tile_m_ * kTile + m, tile_k_ * kTile, rows_m_),
                    bytes_ + 8 * m, 8);
    } else {
      std::memcpy(E_ + meta_block_start(tile_m_, tile_k_, tiles_along(rows_m_)), bytes_,
                  sizeof bytes_);
    }
  }

 private:
  static int offset(int m, int k) {
    return is_packed8<T> ? 8 * m + k / 8 : meta_block_offset(m, k);
  }

  uint8_t bytes_[kMetaBlockBytes];
  uint8_t* E_;
  int64_t rows_m_, tile_m_, tile_k_;
};

}  // namespace sparse24::cpu
