// activation_pack.cpp: activations pruned to 2:4 and packed on the CPU, in tiles of 64 x 64
// elements. Along features rows run along m of E; what is pruned again along tokens is a dense
// matrix first, and then goes through mvue_pack.
#include <vector>

#include "activation/functions.h"
#include "cpu/cpu.h"
#include "cpu/packed_format.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "pack/two_of_four.h"

namespace sparse24::cpu {
namespace {

/// Where values kept of [tokens, d_ff] go. Null: not wanted.
template <typename T>
struct PrunedOutputs {
  T* packed;   // [tokens, d_ff/2]
  T* dense;    // [tokens, d_ff], all of it written
  uint8_t* E;  // for (m = tokens, k = d_ff)
};

template <typename T, typename Value>
void prune_tile(const ConstMatrix& u, const PrunedOutputs<T>& to, const Value& value,
                int64_t tile_token, int64_t tile_feature) {
  const Strided<const T> in = typed<T>(u);
  const Tile tile = tile_at(tile_token, tile_feature, u.rows, u.cols);
  MetaTile<T> meta(to.E, u.rows, tile_token, tile_feature);
  for (int64_t token = tile.row_begin; token < tile.row_end; ++token) {
    for (int64_t f = tile.col_begin; f < tile.col_end; f += 4) {
      float group[4];
      for (int i = 0; i < 4; ++i) group[i] = to_float(in(token, f + i));
      const uint32_t kept = two_of_four(group);
      T* packed = to.packed + (token * u.cols + f) / 2;
      for (int i = 0; i < 4; ++i) {
        const bool is_kept = (kept >> i & 1u) != 0;
        const T x = is_kept ? value(token, f + i, group[i]) : T{};
        if (is_kept) *packed++ = x;
        if (to.dense != nullptr) to.dense[token * u.cols + f + i] = x;
      }
      meta.set(token - tile.row_begin, f - tile.col_begin, meta_from_bits(kept));
    }
  }
  if (to.E != nullptr) meta.store();
}

/// value(token, feature, u) of what is kept.
template <typename T, typename Value>
void prune(const ConstMatrix& u, const PrunedOutputs<T>& to, const Value& value) {
  const int64_t tile_features = tiles_along(u.cols);
  parallel_for(tiles_along(u.rows) * tile_features, kTile * kTile, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      prune_tile<T>(u, to, value, t / tile_features, t % tile_features);
  });
}

/// Room for the dense matrix, where something is made of it.
template <typename T>
std::vector<T> dense_room(const ConstMatrix& u, bool wanted) {
  return std::vector<T>(wanted ? static_cast<size_t>(u.rows * u.cols) : 0);
}

/// The other forms of a pruned matrix.
template <typename T>
void pack_along_tokens(const std::vector<T>& dense, const ConstMatrix& u, const int64_t* seed,
                       void* packed_t, uint8_t* E_t, float* tile_sums) {
  const ConstMatrix pruned = {dense.data(), u.dtype, u.rows, u.cols, u.cols, 1};
  if (tile_sums != nullptr) sum_tiles(pruned, tile_sums);
  if (packed_t == nullptr) return;
  MvueArgs mvue;
  mvue.dy = pruned;
  mvue.seed = seed, mvue.packed = packed_t, mvue.E = E_t;
  mvue_pack(mvue);
}

template <Activation kKind, typename T>
void pack_forward(const ActivationPackArgs& args) {
  std::vector<T> dense = dense_room<T>(args.u, args.packed_t != nullptr);
  const PrunedOutputs<T> to = {static_cast<T*>(args.packed), dense.empty() ? nullptr : dense.data(),
                               args.E};
  prune<T>(args.u, to,
           [](int64_t, int64_t, float u) { return from_float<T>(activate<kKind>(u).value); });
  if (to.dense != nullptr)
    pack_along_tokens(dense, args.u, args.seed, args.packed_t, args.E_t, nullptr);
}

template <Activation kKind, typename T>
void pack_backward(const ActivationPackBackwardArgs& args) {
  std::vector<T> dense =
      dense_room<T>(args.u, args.packed_t != nullptr || args.tile_sums != nullptr);
  const PrunedOutputs<T> to = {static_cast<T*>(args.packed), dense.empty() ? nullptr : dense.data(),
                               nullptr};
  const Strided<const T> d_h = typed<T>(args.d_h);
  prune<T>(args.u, to, [=](int64_t token, int64_t feature, float u) {
    return from_float<T>(to_float(d_h(token, feature)) * activate<kKind>(u).slope);
  });
  if (to.dense != nullptr)
    pack_along_tokens(dense, args.u, args.seed, args.packed_t, args.E_t, args.tile_sums);
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
