// random.h: random numbers for tests: fast, the same everywhere.
#pragma once

#include <cmath>
#include <cstdint>

namespace testing {

/// xorshift.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint32_t bits() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int below(int n) { return static_cast<int>(static_cast<uint64_t>(bits()) * n >> 32); }
  /// Of variance 1; a sum of so many uniform numbers is near enough.
  float normal(int uniforms = 12) {
    float sum = -0.5f * static_cast<float>(uniforms);
    for (int i = 0; i < uniforms; ++i) sum += static_cast<float>(bits()) * 0x1p-32f;
    return sum * std::sqrt(12.0f / static_cast<float>(uniforms));
  }

 private:
  uint64_t state_;
};

}  // namespace testing
