// backward_rows8.cuh: activation backward of an 8-bit layer where all operands are row-major.
//
//   d_h [tokens, d_ff], gate_up [tokens, 2*d_ff] (plain: d_ff)   bf16 or fp16
//   d_gate_up as x8 and MVUE-packed in 8 bits                    mvue8_rows.cuh
//
// Work     As in backward_rows.cuh. Results are rounded to 16 bits first and both forms are made of
//          that: the bits are those of activation_outputs.cuh, which has every other mix of forms.
// Traffic  6 B read, 2 B x8, 1.25 B packed an element of h, gated. 16384 x 14336: 2.17 GB, 517 us at
//          4.2 TB/s.
#pragma once

#include "fused/backward_rows.cuh"
#include "pack/mvue8_rows.cuh"

namespace sparse24 {

struct RowsBackward8 {
  PatchOperand d_h, gate_up;
  TileOutputs to;
};

/// Four tokens of a group, and the half of the result that is pruned.
__device__ __forceinline__ uint2 of_half(const TokenPart& token, int half) {
  return half == 0 ? token.gate : token.up;
}

// kSums: sums for the gradient of a bias, of plain layers.
template <Activation kKind, bool kGated, typename T, bool kSums>
__global__ void __launch_bounds__(kRowThreads, kGated || kSums ? 2 : 3)
    backward_rows8_kernel(const __grid_constant__ RowsBackward8 p) {
  static_assert(!(kSums && kGated));
  constexpr int kHalves = kGated ? 2 : 1;
  __shared__ alignas(16) RowStage stage[kHalves];
  __shared__ uint32_t of_warp[kRowThreads / 32];
  [[maybe_unused]] __shared__ alignas(16) OctetSums octet_sums;

  const RowPlace at = RowPlace::here(p.to.tile_cols);
  const int d_ff = p.to.features, token = at.token(), feature = at.feature();
  // Tokens past the end are zeros: with d_h = 0 all gradients are, and their groups keep nothing.
  const int valid = feature < d_ff ? p.to.tokens - token : 0;

  TokenPart now[4], next[4];
  {
    uint2 d_h[8], gate[8], up[8] = {};
    const char* gates = row_address<T>(p.gate_up, token, feature);
    load_rows(row_address<T>(p.d_h, token, feature), p.d_h.line_bytes, valid, d_h);
    load_rows(gates, p.gate_up.line_bytes, valid, gate);
    if constexpr (kGated) load_rows(gates + p.gate_up.half_bytes, p.gate_up.line_bytes, valid, up);
    SP24_UNROLL
    for (int i = 0; i < 8; ++i) (i < 4 ? now[i] : next[i - 4]) = {d_h[i], gate[i], up[i]};
  }

  const PhiloxKey key = philox_key(p.to.seed[0], p.to.seed[1]);
  Philox4 random[kHalves];
  SP24_UNROLL
  for (int half = 0; half < kHalves; ++half) {
    random[half] = mvue_random(key, static_cast<uint32_t>(token) / 8,
                               static_cast<uint32_t>(feature + half * d_ff) / 4);
  }
  RowQuantizer<T> quantize = {inverse_of(p.to.scale)};
  const RowRounding rounding = RowRounding::of(p.to.rounding, inverse_of(p.to.packed_scale));

  const uint32_t x8_bytes = static_cast<uint32_t>(p.to.x8_ld);
  uint8_t* x8[kHalves];
  SP24_UNROLL
  for (int half = 0; half < kHalves; ++half)
    x8[half] = advance(p.to.x8 + feature + half * d_ff, x8_bytes, token);
  uint32_t meta[kHalves] = {};
  [[maybe_unused]] float sums[4] = {};
#pragma unroll 1
  for (int group = 0; group < 2; ++group) {
    const int left = valid - 4 * group;
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      backward_word<kKind, kGated, T>(now[i].d_h.x, now[i].gate.x, now[i].up.x);
      backward_word<kKind, kGated, T>(now[i].d_h.y, now[i].gate.y, now[i].up.y);
      SP24_UNROLL
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t codes = quantize(of_half(now[i], half));
        if (i < left) store4(advance(x8[half], x8_bytes, i), codes);
      }
    }
    if constexpr (kSums) add_tokens<T>(now, sums);
    const uint32_t meta_mask = group == 0 ? 0x0F0F0F0Fu : 0xF0F0F0F0u;
    SP24_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      const uint2 tokens[4] = {of_half(now[0], half), of_half(now[1], half), of_half(now[2], half),
                               of_half(now[3], half)};
      const uint32_t bits[2] = {random[half].word[0], random[half].word[1]};
      meta[half] |=
          stage_group<T>(stage[half], tokens, bits, at.col, at.octet, group, rounding) & meta_mask;
      random[half].word[0] = random[half].word[2], random[half].word[1] = random[half].word[3];
      x8[half] = advance(x8[half], x8_bytes, 4);
    }
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) now[i] = next[i];
  }
  SP24_UNROLL
  for (int half = 0; half < kHalves; ++half)
    stage_row_meta(stage[half], meta[half], at.col, at.octet);
  if constexpr (kSums) octet_sums.put(at.octet * 8, at.col, sums);
  stage_amax(float_bits(quantize.amax()), of_warp);
  __syncthreads();  // all that waits in shared memory is there
  SP24_UNROLL
  for (int half = 0; half < kHalves; ++half) store_row_stage(p.to, stage[half], at, half);
  if constexpr (kSums) store_row_sums(p.to, octet_sums, at);
  if (p.to.amax != nullptr) store_staged_amax<kRowThreads>(of_warp, p.to.amax);
}

}  // namespace sparse24
