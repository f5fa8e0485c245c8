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

}  // namespace sparse24
