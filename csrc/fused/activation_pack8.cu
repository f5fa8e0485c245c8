// activation_pack8.cu: activations pruned to 2:4 along features by size, and their gradient at the
// same places, in e4m3: each packed along features and along tokens, by a scale that is found first.
//
//   u, d_h    [tokens, d_ff] bf16 or fp16, row-major; d_ff % 4 == 0, any number of tokens
//   packed    [tokens, d_ff/2], E for (m = tokens, k = d_ff): h / scale, or d_u / scale, to nearest
//   packed_t  [d_ff, padded/2], E_t for (m = d_ff, k = padded), seed: of that pruned 16-bit matrix,
//             with the bits of mvue_pack to e4m3; not wanted where null
//   scale     one float: that of h, and in backward that of the pruned d_u; written before all else
//   tile_sums backward: fp32 [ceil(tokens/64), d_ff], tile_sums.cuh
//
// Work     A tile is 128 x 128 elements, a thread takes 8 x 8 of them. Pruning is that of
//          activation_pack.cu. All that is kept leaves through shared memory (stage8.cuh), which
//          makes lines along k whole and E of whole blocks.
// Traffic  The scale: 2 B read an element, backward 4 B. Then forward 2 B read, 0.5 + 1/8 B written
//          each way: 3.25 B; backward 4 B read, 0.5 + 0.5 + 1/8 B written: 5.125 B. With the scale
//          5.25 and 9.125 B. 16384 x 16384 at 4.2 TB/s: 336 us and 583 us.
// Edges    Tokens and features past the end read as zeros, and their groups get padding nibbles.
//          Operands that no vector fits go element by element, as do lines of packed forms.
// Source   arXiv 2503.16672 (pruning behind a squared ReLU), arXiv 2404.01847 (MVUE).
#include <cuda_runtime.h>

#include "activation/relu_pairs.h"
#include "common/cuda_check.h"
#include "common/float8_scale.cuh"
#include "common/format.h"
#include "fused/fused_cuda.h"
#include "fused/pruned_lines.cuh"
#include "pack/mvue8_rows.cuh"
#include "pack/pack8.cuh"
#include "pack/tile_outputs.cuh"

namespace sparse24 {
namespace {

struct Pack8Params {
  ConstMatrix u, d_h;  // d_h: backward
  bool vectors;        // of both
  uint8_t* packed;     // along features
  uint8_t* E;          // or null: somebody has it
  bool packed_vectors;
  float* scale;
  TileOutputs to;  // along tokens, and the tiles
};

struct Pack8Memory {
  PackedStage rows;    // along features
  PackedStage packed;  // along tokens
  OctetSums sums[2];
};

template <typename T>
__device__ __forceinline__ Patch16 load_patch(const Pack8Params& p, const ConstMatrix& m,
                                              const PatchPlace& at) {
  return load_dense<T>(m, p.vectors, at.token(), at.feature(), p.to.features).lines;
}

/// h or d_u of a thread's patch, pruned: zeros where nothing is kept.
template <Activation kKind, typename T, bool kBackward>
__device__ __forceinline__ KeptLines load_pruned(const Pack8Params& p, const PatchPlace& at,
                                                 Patch16& patch) {
  const Patch16 u = load_patch<T>(p, p.u, at);
  if constexpr (kBackward) patch = load_patch<T>(p, p.d_h, at);
  const auto positive = [&](int line, int w) { return positive_pair<T>(u.line[line][w]); };
  const auto result = [&](int line, int w, uint32_t rank) {
    if constexpr (kBackward) return relu_gradient_pair<kKind, T>(patch.line[line][w], rank);
    return relu_pair<kKind, T>(rank);
  };
  KeptLines kept;
  kept.low = prune_lines<true>(patch, 0, positive, result);
  kept.high = prune_lines<true>(patch, 4, positive, result);
  return kept;
}

/// *scale is raised to the largest finite magnitude of h: that is among what is kept. In backward to
/// that of the pruned d_u.
template <Activation kKind, typename T, bool kBackward>
__global__ void __launch_bounds__(kTile8Threads, 3)
    activation_amax_kernel(const __grid_constant__ Pack8Params p) {
  __shared__ uint32_t of_warp[kTile8Threads / 32];
  const PatchPlace at = patch_place(p.to);
  Patch16 patch;
  if constexpr (kBackward) {
    load_pruned<kKind, T, kBackward>(p, at, patch);
  } else {
    patch = load_patch<T>(p, p.u, at);
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      SP24_UNROLL
      for (int w = 0; w < 4; ++w)
        patch.line[i][w] = relu_pair<kKind, T>(positive_pair<T>(patch.line[i][w]));
    }
  }
  RowQuantizer<T> seen = {1.0f};
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    SP24_UNROLL
    for (int w = 0; w < 4; w += 2) seen(make_uint2(patch.line[i][w], patch.line[i][w + 1]));
  }
  store_amax<kTile8Threads>(float_bits(seen.amax()), p.scale, of_warp);
}

/// Three blocks an SM hide what loads and the exchange wait for; that spills a word or three.
template <Activation kKind, typename T, bool kBackward>
__global__ void __launch_bounds__(kTile8Threads, 3)
    activation_pack8_kernel(const __grid_constant__ Pack8Params p) {
  __shared__ alignas(16) Pack8Memory memory;
  const PatchPlace at = patch_place(p.to);
  Patch16 patch;
  const KeptLines kept = load_pruned<kKind, T, kBackward>(p, at, patch);
  const float inverse = inverse_of(p.scale);
  RowQuantizer<T> quantize = {inverse};
  Patch8 codes;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    SP24_UNROLL
    for (int w = 0; w < 2; ++w)
      codes.line[i][w] = quantize(make_uint2(patch.line[i][2 * w], patch.line[i][2 * w + 1]));
  }
  const MetaBytes meta = {meta_bytes_of(kept.low), meta_bytes_of(kept.high)};
  memory.rows.put(packed_lines(codes, kept, meta), at.origin.row, at.origin.col);
  if (p.to.tile_sums != nullptr) put_tile_sums<T>(memory, patch, at.origin);
  if (p.to.packed != nullptr) {
    const PhiloxKey key = philox_key(p.to.seed[0], p.to.seed[1]);
    memory.packed.put(
        prune_patch8<T>(patch, key, static_cast<uint32_t>(at.token()) / 8,
                        static_cast<uint32_t>(at.feature()) / 4, {p.to.rounding, inverse}),
        at.origin.col, at.origin.row);
  }

  __syncthreads();  // all lines of the tile are staged
  const LineTarget rows = {p.packed, p.to.features / 2, p.to.tokens, p.to.features / 2};
  if (p.E != nullptr) {
    memory.rows.store(rows, p.packed_vectors, p.E, meta_blocks(p.to.tokens), at.tile_token,
                      at.tile_feature);
  } else {
    store_staged_lines<kTile8 / 2>(rows, p.packed_vectors, memory.rows.values, at.tile_token,
                                   at.tile_feature / 2);
  }
  if (p.to.packed != nullptr) store_packed8<AnyFloat8>(p.to, memory, at);
  if (p.to.tile_sums != nullptr) store_tile_sums(p.to, memory, at);
}

template <typename Args>
Pack8Params pack8_params(const Args& args, const ConstMatrix& d_h, uint8_t* E, float* tile_sums) {
  const int64_t tokens = args.u.rows, d_ff = args.u.cols;
  Pack8Params p = {args.u, d_h};
  const auto by_rows = [](const ConstMatrix& m) { return vector_layout(m) == Layout::kRowMajor; };
  p.vectors = by_rows(args.u) && (d_h.data == nullptr || by_rows(d_h));
  p.packed = static_cast<uint8_t*>(args.packed), p.E = E;
  p.packed_vectors = vectors_fit(args.packed, d_ff / 2, d_ff / 2);
  p.scale = args.scale;
  p.to = tile_outputs(tokens, d_ff, 1, {});
  const int64_t length = round_up(tokens, Format8::kTokenStep) / 2;
  p.to.seed = args.seed, p.to.packed = args.packed_t, p.to.E = args.E_t;
  p.to.packed_vectors = vectors_fit(args.packed_t, length, length);
  p.to.rounding = RandomRounding::of<Float8E4M3>();
  p.to.tile_sums = tile_sums;
  return p;
}

template <Activation kKind, typename T, bool kBackward>
void find_scale_and_pack(const Pack8Params& p, cudaStream_t stream) {
  const uint32_t tiles = p.to.tile_rows * p.to.tile_cols;
  find_scale(p.scale, stream, [&](float*) {
    activation_amax_kernel<kKind, T, kBackward><<<tiles, kTile8Threads, 0, stream>>>(p);
  });
  activation_pack8_kernel<kKind, T, kBackward><<<tiles, kTile8Threads, 0, stream>>>(p);
}

template <bool kBackward>
void launch_any(Activation kind, const Pack8Params& p, cudaStream_t stream) {
  with_packed16(p.u.dtype, [&](auto format) {
    using T = typename decltype(format)::Storage;
    kind == Activation::kRelu
        ? find_scale_and_pack<Activation::kRelu, T, kBackward>(p, stream)
        : find_scale_and_pack<Activation::kSquaredRelu, T, kBackward>(p, stream);
  });
  SP24_CHECK_LAUNCH("activation_pack", kBackward ? "_backward" : "", " to float8 of ",
                    name_of(p.u.dtype), " u [", p.u.rows, ", ", p.u.cols, "]");
}

}  // namespace

namespace cuda {

void activation_pack8(const ActivationPackArgs& args, cudaStream_t stream) {
  launch_any<false>(args.kind, pack8_params(args, {}, args.E, nullptr), stream);
}

void activation_pack8_backward(const ActivationPackBackwardArgs& args, cudaStream_t stream) {
  launch_any<true>(args.kind, pack8_params(args, args.d_h, nullptr, args.tile_sums), stream);
}

}  // namespace cuda
}  // namespace sparse24
