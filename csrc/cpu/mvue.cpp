// mvue.cpp: MVUE packing on the CPU, in tiles of 64 x 64 elements. Tokens run along k of E,
// features along m.
#include "cpu/cpu.h"
#include "cpu/float8_output.h"
#include "cpu/packed_format.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "pack/mvue_group.h"

namespace sparse24::cpu {
namespace {

/// A kept value as it is packed: rounded to dy's dtype, and for 8 bits at random from there.
template <typename T, typename Out>
Out packed_value(float kept, float inverse_scale, uint32_t random) {
  const T rounded = from_float<T>(kept);
  if constexpr (is_packed8<Out>) {
    return to_float8_random<Out>(to_float(rounded), inverse_scale, random);
  } else {
    return rounded;
  }
}

template <typename T, typename Out>
void mvue_tile(const MvueArgs& args, const PhiloxKey& key, int64_t tile_token,
               int64_t tile_feature) {
  const Strided<const T> dy = typed<T>(args.dy);
  const int64_t tokens = args.dy.rows, features = args.dy.cols;
  const int64_t padded = round_up(tokens, is_packed8<Out> ? Format8::kTokenStep : 8);
  const Tile tile = tile_at(tile_token, tile_feature, padded, features);
  const KeptAlongColumns<Out> to(args.packed, padded, features);
  const float inverse = inverse_of(args.scale);
  MetaTile<Out> meta(args.E, features, tile_feature, tile_token);

  for (int64_t octet = tile.row_begin; octet < tile.row_end; octet += 8) {
    for (int64_t quad = tile.col_begin; quad < tile.col_end; quad += 4) {
      const Philox4 random =
          mvue_random(key, static_cast<uint32_t>(octet / 8), static_cast<uint32_t>(quad / 4));
      for (int64_t token = octet; token < octet + 8; token += 4) {
        for (int64_t f = quad; f < std::min(quad + 4, tile.col_end); ++f) {
          float group[4];
          for (int i = 0; i < 4; ++i)
            group[i] = token + i < tokens ? to_float(dy(token + i, f)) : 0.0f;
          const int half = token == octet ? 0 : 1, column = static_cast<int>(f - quad);
          const MvuePick pick = mvue_group(group, mvue_uniform(mvue_bits(random, half, column)));
          const uint32_t bits = mvue_rounding_bits(random, half, column);
          Out* kept = to.first(token, f);
          kept[0] = packed_value<T, Out>(pick.first_value, inverse, bits);
          kept[to.step()] = packed_value<T, Out>(pick.second_value, inverse, ~bits & 0xFFFFu);
          meta.set(f - tile.col_begin, token - tile.row_begin, pick.nibble);
        }
      }
    }
  }
  meta.store();
}

/// Octets of tokens first, then their sums: the order of the GPU's kernels.
template <typename T>
void sum_tile(const ConstMatrix& matrix, float* tile_sums, int64_t tile_token,
              int64_t tile_feature) {
  const Strided<const T> dy = typed<T>(matrix);
  const Tile tile = tile_at(tile_token, tile_feature, matrix.rows, matrix.cols);
  float* sums = tile_sums + tile_token * matrix.cols;
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

template <typename T, typename Out>
void pack_gradient(const MvueArgs& args) {
  const PhiloxKey key = philox_key(args.seed[0], args.seed[1]);
  const int64_t tile_features = tiles_along(args.dy.cols);
  fill_padding<Out>(args.E, args.dy.cols, args.dy.rows);
  parallel_for(tiles_along(args.dy.rows) * tile_features, kTile * kTile,
               [&](int64_t begin, int64_t end) {
                 for (int64_t t = begin; t < end; ++t) {
                   mvue_tile<T, Out>(args, key, t / tile_features, t % tile_features);
                   if (args.tile_sums != nullptr)
                     sum_tile<T>(args.dy, args.tile_sums, t / tile_features, t % tile_features);
                 }
               });
}

}  // namespace

void sum_tiles(const ConstMatrix& dy, float* tile_sums) {
  const int64_t tile_features = tiles_along(dy.cols);
  with_type(dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    parallel_for(tiles_along(dy.rows) * tile_features, kTile * kTile,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t)
                     sum_tile<T>(dy, tile_sums, t / tile_features, t % tile_features);
                 });
  });
}

void mvue_pack(const MvueArgs& args) {
  with_type(args.dy.dtype, [&](auto zero) {
    using T = decltype(zero);
    const DType packed = args.packed_dtype.value_or(args.dy.dtype);
    if (!is_float8(packed)) {
      pack_gradient<T, T>(args);  // csrc/api: packed in dy's dtype
    } else {
      with_float8(packed, [&](auto code) { pack_gradient<T, decltype(code)>(args); });
    }
    const Strided<const T> dy = typed<T>(args.dy);
    write_float8(args.float8, args.dy.rows, args.dy.cols,
                 [=](int64_t r, int64_t c) { return to_float(dy(r, c)); });
  });
}

}  // namespace sparse24::cpu
