// activation_pack.cpp: activations pruned to 2:4 and packed on the CPU, in tiles of 64 x 64
// elements. Along features rows run along m of E; what is pruned again along tokens is a dense
// matrix first, and then goes through mvue_pack.
#include <vector>

#include "activation/functions.h"
#include "common/float8_scale.h"
#include "cpu/cpu.h"
#include "cpu/float8_output.h"
#include "cpu/packed_format.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "pack/two_of_four.h"

namespace sparse24::cpu {
namespace {

/// Where values kept of [tokens, d_ff] go. Null: not wanted.
template <typename T, typename Out>
struct PrunedOutputs {
  Out* packed;  // [tokens, d_ff/2]
  uint8_t* E;   // for (m = tokens, k = d_ff)
  Quantizer<Out> quantized;
  T* dense;  // [tokens, d_ff], all of it written
};

template <typename T, typename Out, typename Value>
void prune_tile(const ConstMatrix& u, const PrunedOutputs<T, Out>& to, const Value& value,
                int64_t tile_token, int64_t tile_feature) {
  const Strided<const T> in = typed<T>(u);
  const Tile tile = tile_at(tile_token, tile_feature, u.rows, u.cols);
  MetaTile<Out> meta(to.E, u.rows, tile_token, tile_feature);
  for (int64_t token = tile.row_begin; token < tile.row_end; ++token) {
    for (int64_t f = tile.col_begin; f < tile.col_end; f += 4) {
      float group[4];
      for (int i = 0; i < 4; ++i) group[i] = to_float(in(token, f + i));
      const uint32_t kept = two_of_four(group);
      int64_t at = (token * u.cols + f) / 2;
      for (int i = 0; i < 4; ++i) {
        const bool is_kept = (kept >> i & 1u) != 0;
        const T x = is_kept ? value(token, f + i, group[i]) : T{};
        if (is_kept && to.packed != nullptr) to.packed[at++] = to.quantized(x);
        if (to.dense != nullptr) to.dense[token * u.cols + f + i] = x;
      }
      meta.set(token - tile.row_begin, f - tile.col_begin, meta_from_bits(kept));
    }
  }
  if (to.E != nullptr) meta.store();
}

/// value(token, feature, u) of what is kept.
template <typename T, typename Out, typename Value>
void prune(const ConstMatrix& u, const PrunedOutputs<T, Out>& to, const Value& value) {
  const int64_t tile_features = tiles_along(u.cols);
  parallel_for(tiles_along(u.rows) * tile_features, kTile * kTile, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      prune_tile<T, Out>(u, to, value, t / tile_features, t % tile_features);
  });
}

/// The form of a pruned matrix along features. Args: of either pass; *scale is known by now.
template <typename T, typename Args, typename Value>
void pack_along_features(const Args& args, uint8_t* E, std::vector<T>& dense, const Value& value) {
  T* const to_dense = dense.empty() ? nullptr : dense.data();
  if (args.scale == nullptr)
    return prune<T, T>(args.u, {static_cast<T*>(args.packed), E, {1.0f}, to_dense}, value);
  fill_padding<Float8E4M3>(E, args.u.rows, args.u.cols);
  auto* const packed = static_cast<Float8E4M3*>(args.packed);
  prune<T, Float8E4M3>(args.u, {packed, E, {inverse_of(args.scale)}, to_dense}, value);
}

/// The form along tokens, of either pass.
template <typename T, typename Args>
void pack_along_tokens(const Args& args, const ConstMatrix& pruned) {
  if (args.packed_t == nullptr) return;
  MvueArgs mvue;
  mvue.dy = pruned;
  mvue.seed = args.seed, mvue.packed = args.packed_t, mvue.E = args.E_t;
  mvue.packed_dtype = args.packed_dtype, mvue.scale = args.scale;
  mvue_pack(mvue);
}

/// Room for the pruned matrix, where something is made of it.
template <typename T>
std::vector<T> dense_room(const ConstMatrix& u, bool wanted) {
  return std::vector<T>(wanted ? static_cast<size_t>(u.rows * u.cols) : 0);
}

template <typename T>
ConstMatrix as_matrix(const std::vector<T>& dense, const ConstMatrix& u) {
  return {dense.data(), u.dtype, u.rows, u.cols, u.cols, 1};
}

template <Activation kKind, typename T>
void pack_forward(const ActivationPackArgs& args) {
  const auto h = [](int64_t, int64_t, float u) { return from_float<T>(activate<kKind>(u).value); };
  if (args.scale != nullptr) {
    const Strided<const T> u = typed<T>(args.u);
    *args.scale = scale_of(amax_of(args.u.rows, args.u.cols, [=](int64_t r, int64_t c) {
      return to_float(h(r, c, to_float(u(r, c))));
    }));
  }
  auto dense = dense_room<T>(args.u, args.packed_t != nullptr);
  pack_along_features(args, args.E, dense, h);
  pack_along_tokens<T>(args, as_matrix(dense, args.u));
}

template <Activation kKind, typename T>
void pack_backward(const ActivationPackBackwardArgs& args) {
  const bool wanted =
      args.packed_t != nullptr || args.scale != nullptr || args.tile_sums != nullptr;
  auto dense = dense_room<T>(args.u, wanted);
  const Strided<const T> d_h = typed<T>(args.d_h);
  const auto d_u = [=](int64_t token, int64_t feature, float u) {
    return from_float<T>(to_float(d_h(token, feature)) * activate<kKind>(u).slope);
  };
  const ConstMatrix pruned = as_matrix(dense, args.u);
  if (args.scale != nullptr) {
    prune<T, T>(args.u, {nullptr, nullptr, {1.0f}, dense.data()}, d_u);
    const Strided<const T> values = typed<T>(pruned);
    *args.scale = scale_of(amax_of(args.u.rows, args.u.cols,
                                   [=](int64_t r, int64_t c) { return to_float(values(r, c)); }));
  }
  pack_along_features(args, nullptr, dense, d_u);
  if (args.tile_sums != nullptr) sum_tiles(pruned, args.tile_sums);
  pack_along_tokens<T>(args, pruned);
}

}  // namespace

void activation_pack(const ActivationPackArgs& args) {
  with_type(args.u.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.kind == Activation::kRelu ? pack_forward<Activation::kRelu, T>(args)
                                   : pack_forward<Activation::kSquaredRelu, T>(args);
  });
}

void activation_pack_backward(const ActivationPackBackwardArgs& args) {
  with_type(args.u.dtype, [&](auto zero) {
    using T = decltype(zero);
    args.kind == Activation::kRelu ? pack_backward<Activation::kRelu, T>(args)
                                   : pack_backward<Activation::kSquaredRelu, T>(args);
  });
}

}  // namespace sparse24::cpu
