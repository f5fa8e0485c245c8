// quantize.h: matrices in e4m3, by a scale that is known beforehand, or by their own.
#pragma once

#include <cstdint>

#include "sparse24/types.h"

namespace sparse24 {

/// The e4m3 forms of x [rows, cols] that a pass over it writes. Every pointer may be null: that output is not written.
///
///   x8       [rows, cols] row-major, rows `x8_ld` elements apart
///   x8_t     [cols, padded rows], the transpose; rows `x8_t_ld` apart. padded rows: a multiple of 32, zeros past the end
///   scale    one float in the backend's memory, a power of two: x ~= *scale * x8. Null: 1
///   amax     one float, raised to the largest finite |x| (before scaling); what it holds before counts too
///   counters int64[2], added to: [0] finite values clipped at 448, [1] non-zeros that became zero
///
/// Values are rounded to nearest even; Inf and NaN become NaN. Of 16-bit x, what is written is x / *scale rounded once.
struct Float8Output {
  void* x8 = nullptr;
  int64_t x8_ld = 0;
  void* x8_t = nullptr;
  int64_t x8_t_ld = 0;
  const float* scale = nullptr;
  float* amax = nullptr;
  int64_t* counters = nullptr;
};

/// One read of x. Without x8 and x8_t it finds amax alone: the first step of delayed scaling.
///
///   own_scale  one float, written first, by a read more: the smallest power of two by which twice the largest finite |x|
///              fits into e4m3, 1 for zeros; nothing for an empty x. Null: to.scale is known; else that is null
struct QuantizeArgs {
  ConstMatrix x;
  Float8Output to;
  float* own_scale = nullptr;
};
SP24_API void quantize(const QuantizeArgs& args, const Context& context);

}  // namespace sparse24
