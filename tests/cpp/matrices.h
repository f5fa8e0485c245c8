// matrices.h: matrices that tests fill and read, in any dtype and layout of the public API.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "common/convert.h"
#include "pack/mvue_group.h"
#include "sparse24/sparse24.h"

namespace testing {

using namespace sparse24;

const Context kCpu{};

enum class Order { kRowMajor, kColumnMajor };

/// A matrix that owns its memory. `extra` widens the leading dimension; the gap holds a sentinel.
class TestMatrix {
 public:
  TestMatrix(int64_t rows, int64_t cols, DType dtype, Order layout = Order::kRowMajor,
             int64_t extra = 0)
      : rows_(rows), cols_(cols), dtype_(dtype) {
    const int64_t ld = (layout == Order::kRowMajor ? cols : rows) + extra;
    row_stride_ = layout == Order::kRowMajor ? ld : 1;
    col_stride_ = layout == Order::kRowMajor ? 1 : ld;
    memory_.assign(
        static_cast<size_t>((layout == Order::kRowMajor ? rows : cols) * ld * bytes_of(dtype)),
        kSentinel);
  }

  static constexpr uint8_t kSentinel = 0x5A;

  float get(int64_t r, int64_t c) const {
    float value = 0;
    with_type(dtype_, [&](auto zero) {
      value = to_float(reinterpret_cast<const decltype(zero)*>(memory_.data())[index(r, c)]);
    });
    return value;
  }
  void set(int64_t r, int64_t c, float value) {
    with_type(dtype_, [&](auto zero) {
      using T = decltype(zero);
      reinterpret_cast<T*>(memory_.data())[index(r, c)] = from_float<T>(value);
    });
  }
  template <typename Random>
  void fill_normal(Random& random, float scale = 1.0f) {
    std::normal_distribution<float> normal;
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < cols_; ++c) set(r, c, scale * normal(random));
  }
  /// Integers in [-limit, limit]: sums of products stay exact.
  template <typename Random>
  void fill_integers(Random& random, int limit) {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t c = 0; c < cols_; ++c)
        set(r, c, static_cast<float>(static_cast<int>(random() % (2 * limit + 1)) - limit));
  }

  Matrix view() { return {memory_.data(), dtype_, rows_, cols_, row_stride_, col_stride_}; }
  ConstMatrix view() const {
    return {memory_.data(), dtype_, rows_, cols_, row_stride_, col_stride_};
  }
  ConstMatrix const_view() const { return view(); }
  void* data() { return memory_.data(); }
  const std::vector<uint8_t>& memory() const { return memory_; }  // gaps between lines too
  const std::vector<uint8_t>& bytes() const { return memory_; }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }
  int64_t ld() const { return row_stride_ == 1 && col_stride_ != 1 ? col_stride_ : row_stride_; }

 private:
  int64_t index(int64_t r, int64_t c) const { return r * row_stride_ + c * col_stride_; }

  int64_t rows_, cols_, row_stride_ = 0, col_stride_ = 0;
  DType dtype_;
  std::vector<uint8_t> memory_;
};

/// The outputs of packing a [rows, cols] weight both ways.
struct Packed {
  Packed(int64_t rows, int64_t cols, DType dtype)
      : mask(static_cast<size_t>(rows / 4 * (cols / 4))),
        values(static_cast<size_t>(rows * cols / 2 * bytes_of(dtype)), TestMatrix::kSentinel),
        values_t(values),
        E(static_cast<size_t>(metadata_bytes(rows, cols)), 0xFF),
        E_t(static_cast<size_t>(metadata_bytes(cols, rows)), 0xFF) {}

  PackArgs args(const TestMatrix& w, DType dtype) {
    PackArgs args;
    args.w = w.const_view();
    args.mask = mask.data();
    args.out_dtype = dtype;
    args.packed = values.data();
    args.E = E.data();
    args.packed_t = values_t.data();
    args.E_t = E_t.data();
    return args;
  }

  std::vector<uint16_t> mask;
  std::vector<uint8_t> values, values_t, E, E_t;
};

/// A gradient [tokens, features] pruned by MVUE.
struct PrunedGradient {
  PrunedGradient(const TestMatrix& dy, const int64_t (&seed)[2])
      : padded(padded_tokens(dy.rows())),
        packed(padded / 2, dy.cols(), dy.dtype()),
        E(static_cast<size_t>(metadata_bytes(dy.cols(), padded)), 0xFF) {
    MvueArgs args;
    args.dy = dy.const_view();
    args.seed = seed;
    args.packed = packed.data();
    args.E = E.data();
    mvue_pack(args, kCpu);
  }

  /// [padded, features]
  TestMatrix unpacked() {
    TestMatrix dense(padded, packed.cols(), packed.dtype());
    UnpackArgs args;
    args.packed = packed.data();
    args.E = E.data();
    args.transposed = true;
    args.out = dense.view();
    unpack(args, kCpu);
    return dense;
  }

  int64_t padded;
  TestMatrix packed;
  std::vector<uint8_t> E;
};

/// What MVUE draws for feature f of tokens 4 * group on, from the group's random words.
inline MvuePick expected_pick(const TestMatrix& dy, const Philox4& words, int64_t group,
                              int64_t f) {
  float a[4];
  for (int i = 0; i < 4; ++i) a[i] = 4 * group + i < dy.rows() ? dy.get(4 * group + i, f) : 0;
  const int half = static_cast<int>(group % 2), column = static_cast<int>(f % 4);
  return mvue_group(a, mvue_uniform(mvue_bits(words, half, column)));
}
inline Philox4 expected_words(const PhiloxKey& key, int64_t group, int64_t f) {
  return mvue_random(key, static_cast<uint32_t>(group / 2), static_cast<uint32_t>(f / 4));
}

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Order kOrders[] = {Order::kRowMajor, Order::kColumnMajor};

}  // namespace testing
