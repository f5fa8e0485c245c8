// compress.cpp: masks, packing and unpacking on the CPU, in tiles of 64 x 64 elements.
#include <atomic>
#include <cstring>

#include "common/metadata.h"
#include "compress/mvue_group.h"
#include "compress/pack_group.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "mask/block_search.h"

namespace sparse24::cpu {
namespace {

/// One 64 x 64 block of E while it is written; what no element claims stays padding.
struct MetaTile {
  uint8_t bytes[kMetaBlockBytes];

  MetaTile() { std::memset(bytes, kPaddingNibble * 0x11, sizeof bytes); }

  void set(int64_t m, int64_t k, uint32_t nibble) {
    uint8_t& byte = bytes[meta_block_offset(static_cast<int>(m), static_cast<int>(k & ~7))];
    const int shift = k & 4 ? 4 : 0;
    byte = static_cast<uint8_t>((byte & ~(0xFu << shift)) | (nibble << shift));
  }

  void store(uint8_t* E, int64_t block_m, int64_t block_k, int64_t rows_m) const {
    std::memcpy(E + meta_block_start(block_m, block_k, tiles_along(rows_m)), bytes, sizeof bytes);
  }
};

enum class MaskFrom { kSearch, kMemory };

template <typename In>
uint16_t search(const In (&block)[4][4]) {
  float w[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) w[i][j] = to_float(block[i][j]);
  return search_block(w);
}

template <typename In, typename Out, MaskFrom kFrom>
void pack_tile(const PackArgs& args, int64_t tile_row, int64_t tile_col) {
  const Strided<const In> w = typed<In>(args.w);
  const int64_t rows = args.w.rows, cols = args.w.cols;
  const Tile tile = tile_at(tile_row, tile_col, rows, cols);
  Out* packed = static_cast<Out*>(args.packed);
  Out* packed_t = static_cast<Out*>(args.packed_t);
  MetaTile meta, meta_t;

  for (int64_t r = tile.row_begin; r < tile.row_end; r += 4) {
    for (int64_t c = tile.col_begin; c < tile.col_end; c += 4) {
      In block[4][4];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) block[i][j] = w(r + i, c + j);
      uint16_t& mask = args.mask[(r / 4) * (cols / 4) + c / 4];
      if constexpr (kFrom == MaskFrom::kSearch) mask = search(block);

      if (packed != nullptr) {
        for (int i = 0; i < 4; ++i) {
          const uint32_t nibble = meta_from_bits(mask_row(mask, i));
          Out* kept = packed + (r + i) * (cols / 2) + c / 2;
          kept[0] = convert<Out>(block[i][meta_first(nibble)]);
          kept[1] = convert<Out>(block[i][meta_second(nibble)]);
          meta.set(r + i - tile.row_begin, c - tile.col_begin, nibble);
        }
      }
      if (packed_t != nullptr) {
        for (int j = 0; j < 4; ++j) {
          const uint32_t nibble = meta_from_bits(mask_column(mask, j));
          Out* kept = packed_t + (r / 2) * cols + c + j;
          kept[0] = convert<Out>(block[meta_first(nibble)][j]);
          kept[cols] = convert<Out>(block[meta_second(nibble)][j]);
          meta_t.set(c + j - tile.col_begin, r - tile.row_begin, nibble);
        }
      }
    }
  }
  if (packed != nullptr) meta.store(args.E, tile_row, tile_col, rows);
  if (packed_t != nullptr) meta_t.store(args.E_t, tile_col, tile_row, cols);
}

template <MaskFrom kFrom>
void pack(const PackArgs* weights, int count) {
  for (int index = 0; index < count; ++index) {
    const PackArgs& args = weights[index];
    with_type(args.w.dtype, [&](auto in) {
      with_type(args.out_dtype, [&](auto out) {
        const int64_t tile_cols = tiles_along(args.w.cols);
        parallel_for(
            tiles_along(args.w.rows) * tile_cols, kTile * kTile, [&](int64_t begin, int64_t end) {
              for (int64_t t = begin; t < end; ++t)
                pack_tile<decltype(in), decltype(out), kFrom>(args, t / tile_cols, t % tile_cols);
            });
      });
    });
  }
}

/// Tokens run along k of E, features along m.
template <typename T>
void mvue_tile(const MvueArgs& args, const PhiloxKey& key, int64_t tile_token,
               int64_t tile_feature) {
  const Strided<const T> dy = typed<T>(args.dy);
  const int64_t tokens = args.dy.rows, features = args.dy.cols;
  const Tile tile = tile_at(tile_token, tile_feature, round_up(tokens, 8), features);
  T* packed = static_cast<T*>(args.packed);
  MetaTile meta;

  for (int64_t octet = tile.row_begin; octet < tile.row_end; octet += 8) {
    for (int64_t quad = tile.col_begin; quad < tile.col_end; quad += 4) {
      const Philox4 random =
          mvue_random(key, static_cast<uint32_t>(octet / 8), static_cast<uint32_t>(quad / 4));
      for (int64_t token = octet; token < octet + 8; token += 4) {
        for (int64_t f = quad; f < std::min(quad + 4, tile.col_end); ++f) {
          float group[4];
          for (int i = 0; i < 4; ++i)
            group[i] = token + i < tokens ? to_float(dy(token + i, f)) : 0.0f;
          const uint32_t bits =
              mvue_bits(random, token == octet ? 0 : 1, static_cast<int>(f - quad));
          const MvuePick pick = mvue_group(group, mvue_uniform(bits));
          T* kept = packed + (token / 2) * features + f;
          kept[0] = from_float<T>(pick.first_value);
          kept[features] = from_float<T>(pick.second_value);
          meta.set(f - tile.col_begin, token - tile.row_begin, pick.nibble);
        }
      }
    }
  }
  meta.store(args.E, tile_feature, tile_token, features);
}

/// Octets of tokens first, then their sums: the order of the GPU's kernels.
template <typename T>
void sum_tile(const MvueArgs& args, int64_t tile_token, int64_t tile_feature) {
  const Strided<const T> dy = typed<T>(args.dy);
  const Tile tile = tile_at(tile_token, tile_feature, args.dy.rows, args.dy.cols);
  float* sums = args.tile_sums + tile_token * args.dy.cols;
  for (int64_t f = tile.col_begin; f < tile.col_end; ++f) {
    sums[f] = 0.0f;
    for (int64_t octet = tile.row_begin; octet < tile.row_end; octet += 8) {
      float of_octet = 0.0f;
      for (int64_t token = octet; token < std::min(octet + 8, tile.row_end); ++token)
        of_octet += to_float(dy(token, f));
      sums[f] += of_octet;
    }
  }
}

/// The nibble of group (m, k..k+3) of an operand of rows_m rows.
uint32_t nibble_at(const uint8_t* E, int64_t m, int64_t k, int64_t rows_m) {
  return E[meta_byte_offset(m, k & ~int64_t{7}, rows_m)] >> (k & 4 ? 4 : 0) & 0xFu;
}

/// Rows of out from groups that run along them: packed [rows, cols/2].
template <typename T>
void decompress_along_rows(const DecompressArgs& args, int64_t row_begin, int64_t row_end) {
  const Strided<T> out = typed<T>(args.out);
  const int64_t cols = args.out.cols;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* packed = static_cast<const T*>(args.packed) + r * (cols / 2);
    for (int64_t c = 0; c < cols; c += 4) {
      const uint32_t nibble = nibble_at(args.E, r, c, args.out.rows);
      for (int j = 0; j < 4; ++j) out(r, c + j) = T{};
      out(r, c + meta_first(nibble)) = packed[c / 2];
      out(r, c + meta_second(nibble)) = packed[c / 2 + 1];
    }
  }
}

/// Groups of four rows from groups that run down the columns: packed_t [rows/2, cols], any number
/// of columns.
template <typename T>
void decompress_along_columns(const DecompressArgs& args, int64_t group_begin, int64_t group_end) {
  const Strided<T> out = typed<T>(args.out);
  const int64_t cols = args.out.cols;
  for (int64_t group = group_begin; group < group_end; ++group) {
    const T* first = static_cast<const T*>(args.packed) + 2 * group * cols;
    const int64_t r = 4 * group;
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t nibble = nibble_at(args.E, c, r, cols);
      for (int i = 0; i < 4; ++i) out(r + i, c) = T{};
      out(r + meta_first(nibble), c) = first[c];
      out(r + meta_second(nibble), c) = first[cols + c];
    }
  }
}

}  // namespace

void search_mask(const PackArgs* weights, int count) {
  for (int index = 0; index < count; ++index) {
    PackArgs mask_only = weights[index];
    mask_only.out_dtype = mask_only.w.dtype;
    mask_only.packed = mask_only.packed_t = nullptr;
    pack<MaskFrom::kSearch>(&mask_only, 1);
  }
}

void pack_by_mask(const PackArgs* weights, int count) { pack<MaskFrom::kMemory>(weights, count); }

void search_and_pack(const PackArgs* weights, int count) {
  pack<MaskFrom::kSearch>(weights, count);
}

void mvue_compress(const MvueArgs& args) {
  const PhiloxKey key = philox_key(args.seed[0], args.seed[1]);
  const int64_t tile_features = tiles_along(args.dy.cols);
  with_type(args.dy.dtype, [&](auto zero) {
    parallel_for(tiles_along(args.dy.rows) * tile_features, kTile * kTile,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) {
                     mvue_tile<decltype(zero)>(args, key, t / tile_features, t % tile_features);
                     if (args.tile_sums != nullptr)
                       sum_tile<decltype(zero)>(args, t / tile_features, t % tile_features);
                   }
                 });
  });
}

void decompress(const DecompressArgs& args) {
  with_type(args.out.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.transposed) {
      parallel_for(args.out.rows / 4, args.out.cols * 4, [&](int64_t begin, int64_t end) {
        decompress_along_columns<T>(args, begin, end);
      });
    } else {
      parallel_for(args.out.rows, args.out.cols,
                   [&](int64_t begin, int64_t end) { decompress_along_rows<T>(args, begin, end); });
    }
  });
}

void unpack_mask(const uint16_t* mask, uint8_t* out, int64_t rows, int64_t cols) {
  parallel_for(rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < cols; ++c)
        out[r * cols + c] = mask[(r / 4) * (cols / 4) + c / 4] >> (4 * (r % 4) + c % 4) & 1;
  });
}

void count_bad_blocks(const uint16_t* mask, int64_t blocks, int64_t* bad) {
  std::atomic<int64_t> total{0};
  parallel_for(blocks, 16, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t b = begin; b < end; ++b) count += is_transposable(mask[b]) ? 0 : 1;
    total += count;
  });
  *bad = total;
}

void count_bad_metadata(const uint8_t* E, int64_t m, int64_t k, int64_t* bad) {
  std::atomic<int64_t> total{0};
  parallel_for(m, k, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < k; col += 4) {
        const uint8_t byte = E[meta_byte_offset(row, col & ~int64_t{7}, m)];
        count += meta_is_valid(byte >> (col & 4 ? 4 : 0) & 0xFu) ? 0 : 1;
      }
    total += count;
  });
  *bad = total;
}

}  // namespace sparse24::cpu
