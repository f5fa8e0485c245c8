// elements.h: memory of elements of any dtype, and 2:4 operands made of it, for tests of products.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/convert.h"
#include "common/format.h"
#include "sparse24/gemm.h"

namespace testing {

using namespace sparse24;

/// Calls function(T{}) with the storage type of any dtype.
template <typename Function>
void with_any_type(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::kFloat8E4M3: return function(Float8E4M3{});
    case DType::kFloat8E5M2: return function(Float8E5M2{});
    default: return with_type(dtype, function);
  }
}

class Elements {
 public:
  Elements() = default;
  Elements(size_t count, DType dtype, float value = 0.0f)
      : dtype_(dtype), bytes_(count * bytes_of(dtype)) {
    for (size_t i = 0; i < count; ++i) set(i, value);
  }

  float get(size_t i) const {
    float value = 0;
    with_any_type(dtype_, [&](auto x) {
      std::memcpy(&x, bytes_.data() + i * sizeof x, sizeof x);
      value = to_float(x);
    });
    return value;
  }
  void set(size_t i, float value) {
    with_any_type(dtype_, [&](auto x) {
      x = from_float<decltype(x)>(value);
      std::memcpy(bytes_.data() + i * sizeof x, &x, sizeof x);
    });
  }
  /// `value` as this dtype holds it.
  float rounded(float value) const {
    Elements one(1, dtype_, value);
    return one.get(0);
  }

  DType dtype() const { return dtype_; }
  size_t size() const { return bytes_.size() / bytes_of(dtype_); }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  std::vector<uint8_t>& bytes() { return bytes_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

 private:
  DType dtype_ = DType::kFloat32;
  std::vector<uint8_t> bytes_;
};

/// A random 2:4 operand lhs(m, k): packed values, E, and the kept elements of each row.
struct PackedOperand {
  struct Kept {
    int k;
    float value;
  };
  Elements values;
  std::vector<uint8_t> E;
  std::vector<std::vector<Kept>> rows;
};

/// Positions are random, values come from draw(). k is padded to `padded_k` with zeros.
template <typename Random, typename Draw>
PackedOperand make_packed(int m, int k, int padded_k, DType format, Orientation orientation,
                          Random& random, Draw&& draw) {
  PackedOperand o;
  o.values = Elements(static_cast<size_t>(m) * padded_k / 2, format);
  o.E.assign(meta_bytes_for(format, m, padded_k), 0x44);
  o.rows.resize(m);
  for (int row = 0; row < m; ++row) {
    for (int group = 0; group < padded_k / 4; ++group) {
      const int first = random.below(3), second = first + 1 + random.below(3 - first);
      uint8_t& byte = o.E[meta_offset_for(format, row, group / 2 * 8, m)];
      const int shift = group % 2 * 4;
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (first | second << 2) << shift);
      for (int i = 0; i < 2; ++i) {
        const int at_k = group * 4 + (i == 0 ? first : second), packed_k = group * 2 + i;
        if (at_k >= k) continue;  // padding: zero, and rhs has no such row
        const size_t at = orientation == Orientation::kKMajor
                              ? static_cast<size_t>(row) * (padded_k / 2) + packed_k
                              : static_cast<size_t>(packed_k) * m + row;
        o.values.set(at, draw());
        o.rows[row].push_back({at_k, o.values.get(at)});
      }
    }
  }
  return o;
}

}  // namespace testing
