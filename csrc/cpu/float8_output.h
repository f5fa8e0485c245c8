// float8_output.h: e4m3 copies of a matrix, with amax and counts, on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>

#include "common/format.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "sparse24/quantize.h"

namespace sparse24::cpu {

/// What one thread saw of x.
struct Float8Statistics {
  float amax = 0.0f;
  int64_t clipped = 0, flushed = 0;

  template <typename F>
  void add(float x, float inverse_scale, F code) {
    if (!is_finite(x)) return;
    amax = std::max(amax, abs_float(x));
    clipped += abs_float(x * inverse_scale) > Float8Traits<F>::kLargest;
    flushed += x != 0.0f && (code.bits & 0x7Fu) == 0;
  }

  /// Into what all threads share; either may be null. Any order gives the same numbers.
  void add_to(float* shared_amax, int64_t* counters) const {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (shared_amax != nullptr) *shared_amax = std::max(*shared_amax, amax);
    if (counters != nullptr) counters[0] += clipped, counters[1] += flushed;
  }
};

/// Writes what `to` asks for of value(row, col) -> float, over [rows, cols].
template <typename Value>
void write_float8(const Float8Output& to, int64_t rows, int64_t cols, const Value& value) {
  if (to.x8 == nullptr && to.x8_t == nullptr && to.amax == nullptr) return;
  const float inverse = inverse_of(to.scale);
  uint8_t* x8 = static_cast<uint8_t*>(to.x8);
  uint8_t* x8_t = static_cast<uint8_t*>(to.x8_t);
  const int64_t padded = to.x8_t == nullptr ? rows : round_up(rows, Format8::kTokenStep);
  const int64_t tile_cols = tiles_along(cols);
  parallel_for(tiles_along(padded) * tile_cols, kTile * kTile, [&](int64_t begin, int64_t end) {
    Float8Statistics seen;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_at(t / tile_cols, t % tile_cols, padded, cols);
      for (int64_t r = tile.row_begin; r < tile.row_end; ++r)
        for (int64_t c = tile.col_begin; c < tile.col_end; ++c) {
          const float x = r < rows ? value(r, c) : 0.0f;
          const Float8E4M3 code = to_float8<Float8E4M3>(x, inverse);
          seen.add(x, inverse, code);
          if (x8 != nullptr && r < rows) x8[r * to.x8_ld + c] = code.bits;
          if (x8_t != nullptr) x8_t[c * to.x8_t_ld + r] = code.bits;
        }
    }
    seen.add_to(to.amax, to.counters);
  });
}

/// The largest finite magnitude of value(row, col) -> float, over [rows, cols].
template <typename Value>
float amax_of(int64_t rows, int64_t cols, const Value& value) {
  float amax = 0.0f;
  Float8Output to;
  to.amax = &amax;
  write_float8(to, rows, cols, value);
  return amax;
}

}  // namespace sparse24::cpu
