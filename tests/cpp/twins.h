// twins.h: memory and matrices that exist on the host and on the device, so that both backends can
// run on the same bytes and be compared, byte by byte, with all that lies around them.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/convert.h"
#include "common/cuda_check.h"
#include "gpu_testing.h"
#include "sparse24/types.h"

namespace gpu_testing {

using namespace sparse24;

inline int64_t checks = 0;

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (!ok) fail(what);
}

inline int guard = 256;     // --tight: 0
inline bool quick = false;  // --quick

/// Of a list of variants, all in turn; --quick takes one of them each time, the next the next time.
class Turns {
 public:
  explicit Turns(int variants) : variants_(variants) {}
  bool takes(int variant) {
    if (!quick) return true;
    if (variant == 0) chosen_ = (chosen_ + 1) % variants_;
    return variant == chosen_;
  }

 private:
  int variants_, chosen_ = -1;
};

inline Random random_source(1);

constexpr uint8_t kPoison = 0xA5;

/// The same bytes on the host and on the device, with poisoned guards around. `shift` misaligns
/// both.
class Twin {
 public:
  explicit Twin(int64_t bytes, int shift = 0)
      : host_(static_cast<size_t>(bytes + shift + 2 * guard), kPoison), offset_(guard + shift) {
    SP24_CHECK_CUDA(cudaMalloc(&device_, host_.size()));
    if (guard > 0 || shift > 0) upload();
  }
  ~Twin() { cudaFree(device_); }
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;

  void upload() {
    SP24_CHECK_CUDA(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice));
  }
  template <typename T = uint8_t>
  T* host() {
    return reinterpret_cast<T*>(host_.data() + offset_);
  }
  template <typename T = uint8_t>
  T* device() {
    return reinterpret_cast<T*>(device_ + offset_);
  }

  /// After both backends ran: all bytes equal, guards included?
  void compare(const std::string& what) {
    std::vector<uint8_t> got(host_.size());
    SP24_CHECK_CUDA(cudaMemcpy(got.data(), device_, got.size(), cudaMemcpyDeviceToHost));
    compare_bytes(got, host_, what);
  }
  /// The device's bytes against those that another twin has on the host.
  void compare_with(const Twin& expected, const std::string& what) {
    std::vector<uint8_t> got(host_.size());
    SP24_CHECK_CUDA(cudaMemcpy(got.data(), device_, got.size(), cudaMemcpyDeviceToHost));
    compare_bytes(got, expected.host_, what);
  }
  /// Takes over what the device has.
  void download() {
    SP24_CHECK_CUDA(cudaMemcpy(host_.data(), device_, host_.size(), cudaMemcpyDeviceToHost));
  }

 private:
  void compare_bytes(const std::vector<uint8_t>& got, const std::vector<uint8_t>& expected,
                     const std::string& what) {
    ++checks;
    if (got == expected) return;
    size_t at = 0, count = 0;
    for (size_t i = got.size(); i-- > 0;)
      if (got[i] != expected[i]) at = i, ++count;
    char bytes[80];
    std::snprintf(bytes, sizeof bytes, "first at byte %lld: %02x, expected %02x",
                  static_cast<long long>(at) - offset_, got[at], expected[at]);
    fail(what, ": ", count, " bytes differ of ", got.size() - 2 * guard, ", ", bytes);
  }

  std::vector<uint8_t> host_;
  uint8_t* device_ = nullptr;
  int offset_;
};

enum class Order { kRows, kColumns };
enum class Fill { kNormal, kIntegers, kSpecial, kBits, kSparse };

inline const char* name_of(Order order) { return order == Order::kRows ? "rows" : "columns"; }
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr DType k16[] = {DType::kBFloat16, DType::kFloat16};
constexpr Order kOrders[] = {Order::kRows, Order::kColumns};

inline float random_value(Fill fill) {
  static const float special[] = {0.0f,   -0.0f,   1e-45f,   -3e-39f,   1.0f, -1.0f, 65504.0f,
                                  -3e38f, 3.4e38f, INFINITY, -INFINITY, NAN,  1e-8f, -6e-5f};
  switch (fill) {
    case Fill::kNormal: return random_source.normal(4);
    case Fill::kIntegers: return static_cast<float>(random_source.below(5) - 2);
    case Fill::kSpecial: return special[random_source.below(14)];
    case Fill::kSparse:
      return random_source.below(2) != 0   ? random_source.normal(4)
             : random_source.below(2) != 0 ? -0.0f
                                           : 0.0f;
    case Fill::kBits: {
      const uint32_t bits = random_source.bits();
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
  }
  return 0.0f;
}

/// A matrix on both sides; `gap` widens the distance of lines.
class TwinMatrix {
 public:
  TwinMatrix(int64_t rows, int64_t cols, DType dtype, Order order, int64_t gap = 0, int shift = 0)
      : rows_(rows),
        cols_(cols),
        dtype_(dtype),
        ld_((order == Order::kRows ? cols : rows) + gap),
        order_(order),
        twin_(((order == Order::kRows ? rows : cols) * ld_) * bytes_of(dtype),
              shift * bytes_of(dtype)) {
    if (gap > 0) twin_.upload();  // between lines nothing is written
  }

  void fill(Fill fill) {
    with_type(dtype_, [&](auto zero) {
      using T = decltype(zero);
      T* data = twin_.host<T>();
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t c = 0; c < cols_; ++c) {
          T& at = order_ == Order::kRows ? data[r * ld_ + c] : data[c * ld_ + r];
          if (fill == Fill::kBits && sizeof(T) == 2) {
            const uint16_t bits = static_cast<uint16_t>(random_source.bits());
            std::memcpy(&at, &bits, 2);
          } else {
            at = from_float<T>(random_value(fill));
          }
        }
      }
    });
    twin_.upload();
  }
  Matrix host() { return view(twin_.host()); }
  Matrix device() { return view(twin_.device()); }
  ConstMatrix const_host() { return constant(host()); }
  ConstMatrix const_device() { return constant(device()); }
  Twin& twin() { return twin_; }

 private:
  Matrix view(void* data) {
    return {data,
            dtype_,
            rows_,
            cols_,
            order_ == Order::kRows ? ld_ : 1,
            order_ == Order::kRows ? 1 : ld_};
  }
  static ConstMatrix constant(const Matrix& m) {
    return {m.data, m.dtype, m.rows, m.cols, m.row_stride, m.col_stride};
  }

  int64_t rows_, cols_;
  DType dtype_;
  int64_t ld_;
  Order order_;
  Twin twin_;
};

inline void synchronize(const std::string& what) {
  const cudaError_t status = cudaDeviceSynchronize();
  if (status == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what.c_str(), cudaGetErrorString(status));
  std::exit(1);  // nothing on this device works any more
}

struct Shape {
  int64_t rows, cols;
};

constexpr Shape kWeightShapes[] = {{4, 4},    {4, 8},    {8, 4},      {12, 20},
                                   {64, 64},  {68, 132}, {128, 128},  {132, 260},
                                   {200, 72}, {72, 200}, {256, 4096}, {4096, 64}};

/// Of sums of 64 tokens each (pack/tile_sums.cuh).
inline int64_t tile_sums_bytes(int64_t tokens, int64_t features) {
  return (tokens + 63) / 64 * features * 4;
}

}  // namespace gpu_testing
