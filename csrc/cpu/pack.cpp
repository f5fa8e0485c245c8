// pack.cpp: masks, packing by mask and unpacking on the CPU, in tiles of 64 x 64 elements.
#include <atomic>

#include "common/metadata.h"
#include "cpu/cpu.h"
#include "cpu/float8_output.h"
#include "cpu/packed_format.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "mask/block_search.h"
#include "pack/pack_group.h"

namespace sparse24::cpu {
namespace {

enum class MaskFrom { kSearch, kMemory };

template <typename In>
uint16_t search(const In (&block)[4][4]) {
  float w[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) w[i][j] = to_float(block[i][j]);
  return search_block(w);
}

template <typename In, typename Out>
void pack_block_rows(const In (&block)[4][4], uint32_t mask, const Quantizer<Out>& quantized,
                     Out* packed, int64_t ld, int64_t m, int64_t k, MetaTile<Out>& meta) {
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = meta_from_bits(mask_row(mask, i));
    packed[i * ld] = quantized(block[i][meta_first(nibble)]);
    packed[i * ld + 1] = quantized(block[i][meta_second(nibble)]);
    meta.set(m + i, k, nibble);
  }
}

template <typename In, typename Out>
void pack_block_columns(const In (&block)[4][4], uint32_t mask, const Quantizer<Out>& quantized,
                        const KeptAlongColumns<Out>& to, int64_t r, int64_t c, int64_t m, int64_t k,
                        MetaTile<Out>& meta) {
  for (int j = 0; j < 4; ++j) {
    const uint32_t nibble = meta_from_bits(mask_column(mask, j));
    Out* kept = to.first(r, c + j);
    kept[0] = quantized(block[meta_first(nibble)][j]);
    kept[to.step()] = quantized(block[meta_second(nibble)][j]);
    meta.set(m + j, k, nibble);
  }
}

template <typename In, typename Out, MaskFrom kFrom>
void pack_tile(const PackArgs& args, int64_t tile_row, int64_t tile_col, Float8Statistics& seen) {
  const Strided<const In> w = typed<In>(args.w);
  const int64_t rows = args.w.rows, cols = args.w.cols;
  const Tile tile = tile_at(tile_row, tile_col, rows, cols);
  const Quantizer<Out> quantized{inverse_of(args.scale)};
  Out* packed = static_cast<Out*>(args.packed);
  const KeptAlongColumns<Out> packed_t(args.packed_t, rows, cols);
  MetaTile<Out> meta(args.E, rows, tile_row, tile_col);
  MetaTile<Out> meta_t(args.E_t, cols, tile_col, tile_row);

  for (int64_t r = tile.row_begin; r < tile.row_end; r += 4) {
    for (int64_t c = tile.col_begin; c < tile.col_end; c += 4) {
      In block[4][4];
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
          block[i][j] = w(r + i, c + j);
          if constexpr (is_packed8<Out>)
            seen.add(to_float(block[i][j]), quantized.inverse_scale, quantized(block[i][j]));
        }
      uint16_t& mask = args.mask[(r / 4) * (cols / 4) + c / 4];
      if constexpr (kFrom == MaskFrom::kSearch) mask = search(block);
      const int64_t in_row = r - tile.row_begin, in_col = c - tile.col_begin;
      if (packed != nullptr)
        pack_block_rows(block, mask, quantized, packed + r * (cols / 2) + c / 2, cols / 2, in_row,
                        in_col, meta);
      if (args.packed_t != nullptr)
        pack_block_columns(block, mask, quantized, packed_t, r, c, in_col, in_row, meta_t);
    }
  }
  if (packed != nullptr) meta.store();
  if (args.packed_t != nullptr) meta_t.store();
}

/// Calls function(Out{}): what weights are packed in, fp32 too on the CPU.
template <typename Function>
void with_packed_type(DType dtype, const Function& function) {
  is_float8(dtype) ? with_float8(dtype, function) : with_type(dtype, function);
}

template <typename In, typename Out, MaskFrom kFrom>
void pack_weight(const PackArgs& args) {
  fill_padding<Out>(args.E, args.w.rows, args.w.cols);
  fill_padding<Out>(args.E_t, args.w.cols, args.w.rows);
  const int64_t tile_cols = tiles_along(args.w.cols);
  parallel_for(tiles_along(args.w.rows) * tile_cols, kTile * kTile,
               [&](int64_t begin, int64_t end) {
                 Float8Statistics seen;
                 for (int64_t t = begin; t < end; ++t)
                   pack_tile<In, Out, kFrom>(args, t / tile_cols, t % tile_cols, seen);
                 seen.add_to(args.amax, args.counters);
               });
}

template <MaskFrom kFrom>
void pack(const PackArgs* weights, int count) {
  for (int index = 0; index < count; ++index) {
    const PackArgs& args = weights[index];
    with_type(args.w.dtype, [&](auto in) {
      using In = decltype(in);
      with_packed_type(args.out_dtype,
                       [&](auto out) { pack_weight<In, decltype(out), kFrom>(args); });
    });
  }
}

/// The nibble of group (m, k..k+3) of an operand of rows_m rows.
template <typename Packed>
uint32_t nibble_at(const uint8_t* E, int64_t m, int64_t k, int64_t rows_m) {
  const int64_t octet = k & ~int64_t{7};
  const int64_t at =
      is_packed8<Packed> ? meta8_byte_offset(m, octet, rows_m) : meta_byte_offset(m, octet, rows_m);
  return E[at] >> (k & 4 ? 4 : 0) & 0xFu;
}

/// A packed value in the dense form.
template <typename T, typename Packed>
T dense_value(Packed x, float scale) {
  if constexpr (is_packed8<Packed>) {
    return from_float<T>(to_float(x) * scale);
  } else {
    return x;
  }
}

/// Rows of out from groups that run along them: packed [rows, cols/2].
template <typename T, typename Packed>
void unpack_along_rows(const UnpackArgs& args, int64_t row_begin, int64_t row_end) {
  const Strided<T> out = typed<T>(args.out);
  const int64_t cols = args.out.cols;
  const float scale = args.scale == nullptr ? 1.0f : *args.scale;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Packed* packed = static_cast<const Packed*>(args.packed) + r * (cols / 2);
    for (int64_t c = 0; c < cols; c += 4) {
      const uint32_t nibble = nibble_at<Packed>(args.E, r, c, args.out.rows);
      for (int j = 0; j < 4; ++j) out(r, c + j) = T{};
      out(r, c + meta_first(nibble)) = dense_value<T>(packed[c / 2], scale);
      out(r, c + meta_second(nibble)) = dense_value<T>(packed[c / 2 + 1], scale);
    }
  }
}

/// Groups of four rows from groups that run down the columns, any number of columns.
template <typename T, typename Packed>
void unpack_along_columns(const UnpackArgs& args, int64_t group_begin, int64_t group_end) {
  const Strided<T> out = typed<T>(args.out);
  const int64_t cols = args.out.cols;
  const float scale = args.scale == nullptr ? 1.0f : *args.scale;
  const KeptAlongColumns<const Packed> packed(args.packed, args.out.rows, cols);
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t r = 4 * group;
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t nibble = nibble_at<Packed>(args.E, c, r, cols);
      const Packed* kept = packed.first(r, c);
      for (int i = 0; i < 4; ++i) out(r + i, c) = T{};
      out(r + meta_first(nibble), c) = dense_value<T>(kept[0], scale);
      out(r + meta_second(nibble), c) = dense_value<T>(kept[packed.step()], scale);
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

namespace {

template <typename T, typename Packed>
void unpack_as(const UnpackArgs& args) {
  if (args.transposed) {
    parallel_for(args.out.rows / 4, args.out.cols * 4, [&](int64_t begin, int64_t end) {
      unpack_along_columns<T, Packed>(args, begin, end);
    });
  } else {
    parallel_for(args.out.rows, args.out.cols, [&](int64_t begin, int64_t end) {
      unpack_along_rows<T, Packed>(args, begin, end);
    });
  }
}

}  // namespace

void unpack(const UnpackArgs& args) {
  with_type(args.out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const DType packed = args.packed_dtype.value_or(args.out.dtype);
    if (!is_float8(packed)) return unpack_as<T, T>(args);
    with_float8(packed, [&](auto code) { unpack_as<T, decltype(code)>(args); });
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

void count_bad_metadata(DType dtype, const uint8_t* E, int64_t m, int64_t k, int64_t* bad) {
  std::atomic<int64_t> total{0};
  parallel_for(m, k, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < k; col += 4) {
        const uint8_t byte = E[meta_offset_for(dtype, row, col & ~int64_t{7}, m)];
        count += meta_is_valid(byte >> (col & 4 ? 4 : 0) & 0xFu) ? 0 : 1;
      }
    total += count;
  });
  *bad = total;
}

}  // namespace sparse24::cpu
