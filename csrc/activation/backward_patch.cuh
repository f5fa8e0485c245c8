// backward_patch.cuh: the backward of one patch in registers, for the dense kernel and for the one
// that packs too.
#pragma once

#include "activation/functions.h"
#include "common/square_patch.cuh"

namespace sparse24 {

/// In: d_h, gate, up (gated), all held the same way. Out, in their place: h, d_gate, d_up; plain: h
/// and d_x. `lines` is its side or more, and the compiler must not know it.
template <Activation kKind, bool kGated, typename T>
__device__ __forceinline__ void backward_patch(int lines, SquarePatch<T>& d_h, SquarePatch<T>& gate,
                                               SquarePatch<T>& up) {
  constexpr int kSide = kVectorSize<T>, kPerWord = kSide / 4;
  SP24_UNROLL
  for (int i = 0; i < kSide; ++i) {
    // A branch a line, since a whole patch as one straight piece of code is scheduled with all its
    // intermediate values alive, and spills up to 600 bytes a thread.
    if (i >= lines) continue;
    SP24_UNROLL
    for (int w = 0; w < 4; ++w) {
      float h[kPerWord], d_gate[kPerWord];
      [[maybe_unused]] float d_up[kPerWord];
      SP24_UNROLL
      for (int e = 0; e < kPerWord; ++e) {
        const int j = w * kPerWord + e;
        const float d = patch_value(d_h, i, j), x = patch_value(gate, i, j);
        if constexpr (kGated) {
          const GatedBackward back =
              gated_backward<kKind, sizeof(T) == 2>(d, x, patch_value(up, i, j));
          h[e] = back.h, d_gate[e] = back.d_gate, d_up[e] = back.d_up;
        } else {
          const ValueAndSlope act = activate<kKind, sizeof(T) == 2>(x);
          h[e] = act.value, d_gate[e] = d * act.slope;
        }
      }
      d_h.word[i][w] = patch_word<T>(h);
      gate.word[i][w] = patch_word<T>(d_gate);
      if constexpr (kGated) up.word[i][w] = patch_word<T>(d_up);
    }
  }
}

/// The operands of a backward pass by patches; h.data is null if it is not wanted.
struct PatchBackward {
  PatchOperand d_h, gate_up, d_gate_up, h;
  int tokens, d_ff;
  uint32_t tile_rows, tile_cols;
  int lines = 8;  // at least those of a patch: see backward_patch
};

/// Loads a patch's operands, all held by rows.
template <bool kGated, typename T>
__device__ __forceinline__ void load_backward(const PatchBackward& p, int token, int feature,
                                              int valid, SquarePatch<T>& d_h, SquarePatch<T>& gate,
                                              SquarePatch<T>& up) {
  const char* from = patch_address<T>(p.gate_up, token, feature);
  d_h = load_lines<T>(patch_address<T>(p.d_h, token, feature), p.d_h.line_bytes, valid);
  gate = load_lines<T>(from, p.gate_up.line_bytes, valid);
  if (kGated) up = load_lines<T>(from + p.gate_up.half_bytes, p.gate_up.line_bytes, valid);
  if (p.d_h.column_major) turn(d_h);
  if (p.gate_up.column_major) {
    turn(gate);
    if (kGated) turn(up);
  }
}

/// Stores what backward_patch made of them.
template <bool kGated, typename T>
__device__ __forceinline__ void store_backward(const PatchBackward& p, int token, int feature,
                                               int valid, const SquarePatch<T>& h,
                                               const SquarePatch<T>& d_gate,
                                               const SquarePatch<T>& d_up) {
  char* to = patch_address<T>(p.d_gate_up, token, feature);
  store_patch(p.d_gate_up, to, valid, d_gate);
  if (kGated) store_patch(p.d_gate_up, to + p.d_gate_up.half_bytes, valid, d_up);
  if (p.h.data != nullptr) store_patch(p.h, patch_address<T>(p.h, token, feature), valid, h);
}

/// Layouts of the operands of a backward pass; the one of an absent h equals that of d_h.
struct BackwardLayouts {
  Layout d_h, gate_up, d_gate_up, h;

  explicit BackwardLayouts(const ActivationBackwardArgs& args)
      : d_h(vector_layout(args.d_h)),
        gate_up(vector_layout(args.gate_up, args.gated ? 2 : 1)),
        d_gate_up(vector_layout(args.d_gate_up, args.gated ? 2 : 1)),
        h(args.h.data == nullptr ? d_h : vector_layout(args.h)) {}

  bool any(Layout layout) const {
    return d_h == layout || gate_up == layout || d_gate_up == layout || h == layout;
  }
};

inline PatchBackward patch_backward(const ActivationBackwardArgs& args,
                                    const BackwardLayouts& layouts) {
  const int64_t side = 16 / bytes_of(args.d_h.dtype), d_ff = args.d_h.cols, tokens = args.d_h.rows;
  const int64_t tile_rows = round_up((tokens + side - 1) / side * kPatch, kTileRows) / kTileRows;
  const int64_t tile_cols = round_up(d_ff / side * kPatch, kTileCols) / kTileCols;
  return {patch_operand(args.d_h, layouts.d_h, d_ff),
          patch_operand(args.gate_up, layouts.gate_up, d_ff),
          patch_operand(args.d_gate_up, layouts.d_gate_up, d_ff),
          patch_operand(args.h, layouts.h, d_ff),
          static_cast<int>(tokens),
          static_cast<int>(d_ff),
          static_cast<uint32_t>(tile_rows),
          static_cast<uint32_t>(tile_cols)};
}

}  // namespace sparse24
