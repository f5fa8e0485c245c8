// gemm_problems.h: products with known results, their operands on a GPU, and the comparison. Values
// around operands are poison that no kernel may read, values around outputs are canaries that none
// may touch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "common/cuda_check.h"
#include "elements.h"
#include "gemm/config.h"
#include "gpu_testing.h"

namespace gpu_testing {

using namespace sparse24;
using testing::Elements;
using testing::PackedOperand;

inline int64_t cases = 0;

/// Device memory that frees itself.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    SP24_CHECK_CUDA(cudaMalloc(&data_, std::max<size_t>(bytes_, 1)));  // no more: memcheck looks
  }
  template <typename T>
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size() * sizeof(T)) {
    SP24_CHECK_CUDA(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  explicit Buffer(const Elements& host) : Buffer(host.bytes()) {}
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> host(bytes_ / sizeof(T));
    SP24_CHECK_CUDA(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  /// The same as elements, of as many as `host` has.
  Elements read_as(const Elements& host) const {
    Elements got = host;
    got.bytes() = read<uint8_t>();
    return got;
  }
  void* get() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

/// One way to compute a product.
struct Kernel {
  std::string name;
  std::function<int64_t(const SparseGemmArgs&)> workspace_bytes;
  std::function<void(const SparseGemmArgs&)> run;
};

constexpr float kExisting = 3.0f;  // what out holds before an accumulating product
constexpr int kPad = 16;  // columns between rows of rhs and out, which no kernel may use or touch
// Of 8-bit operands; a power of two together, so integers stay exact.
constexpr float kLhsScale = 0.125f, kRhsScale = 16.0f;

struct Problem {
  GemmPass pass;
  int m, n, k;
  bool integers;
  DType format = DType::kBFloat16;
  GemmEpilogue epilogue = GemmEpilogue::kPlain;
  bool positive = false;  // where not integers: values of one sign

  bool is_gradient() const { return is_grad_weight(pass); }
  bool m_rows() const { return is_m_by_n(pass); }  // of out
  bool rhs_k_major() const { return rhs_orientation(pass, format) == Orientation::kKMajor; }
  DType rhs_dtype() const { return is_float8(format) ? DType::kFloat8E4M3 : format; }
  DType bias_dtype() const { return is_float8(format) ? DType::kBFloat16 : format; }
  float scale() const { return is_float8(format) ? kLhsScale * kRhsScale : 1.0f; }
  int packed_k() const {
    return is_gradient() ? static_cast<int>(padded_tokens_for(format, k)) : k;
  }
  int rhs_rows() const { return rhs_k_major() ? n : k; }
  int rhs_columns() const { return rhs_k_major() ? k : n; }
  int out_rows() const { return m_rows() ? m : n; }
  int out_columns() const { return m_rows() ? n : m; }
  int rhs_ld() const { return static_cast<int>(round_up(rhs_columns(), 16)) + kPad; }
  int out_ld() const { return static_cast<int>(round_up(out_columns(), 8)) + kPad; }
  size_t out_index(int mm, int nn) const {  // of a contiguous out
    return m_rows() ? static_cast<size_t>(mm) * n + nn : static_cast<size_t>(nn) * m + mm;
  }
};

/// Operands in host memory, and the product, scaled: exact[out_index], without bias.
struct Operands {
  PackedOperand lhs;
  Elements rhs, bias;
  std::vector<double> exact, magnitude;  // product, and product of absolute values
};

/// Fills in exact and magnitude. Sums of integers are exact in fp32, and twice as fast.
inline void multiply_on_host(const Problem& p, const std::vector<float>& rhs_by_k, Operands& o) {
  o.exact.assign(static_cast<size_t>(p.m) * p.n, 0.0);
  o.magnitude.assign(p.integers ? 0 : o.exact.size(), 0.0);
  std::vector<float> sums_float(p.n);
  std::vector<double> sums(p.n), sizes(p.n);
  for (int m = 0; m < p.m; ++m) {
    std::fill(sums_float.begin(), sums_float.end(), 0.0f);
    std::fill(sums.begin(), sums.end(), 0.0);
    std::fill(sizes.begin(), sizes.end(), 0.0);
    for (const auto& kept : o.lhs.rows[m]) {
      const float* line = &rhs_by_k[static_cast<size_t>(kept.k) * p.n];
      if (p.integers) {
        for (int n = 0; n < p.n; ++n) sums_float[n] += kept.value * line[n];
        continue;
      }
      for (int n = 0; n < p.n; ++n) {
        const double product = static_cast<double>(kept.value) * line[n];
        sums[n] += product;
        sizes[n] += std::fabs(product);
      }
    }
    if (p.integers) std::copy(sums_float.begin(), sums_float.end(), sums.begin());
    for (int n = 0; n < p.n; ++n) {
      o.exact[p.out_index(m, n)] = p.scale() * sums[n];
      if (!p.integers) o.magnitude[p.out_index(m, n)] = p.scale() * sizes[n];
    }
  }
}

inline Operands make_operands(const Problem& p) {
  Random random(p.m * 7919 + p.n * 31 + p.k + static_cast<int>(p.pass));
  auto draw = [&] {
    if (p.integers) return static_cast<float>(random.below(5) - 2);
    const float value = random.normal();
    return p.positive ? std::fabs(value) : value;
  };
  Operands o;
  o.lhs = testing::make_packed(p.m, p.k, p.packed_k(), p.format, lhs_orientation(p.pass, p.format),
                               random, draw);
  o.rhs = Elements(static_cast<size_t>(p.rhs_rows()) * p.rhs_ld(), p.rhs_dtype(), NAN);
  std::vector<float> rhs_by_k(static_cast<size_t>(p.k) * p.n);
  for (int row = 0; row < p.rhs_rows(); ++row) {
    for (int column = 0; column < p.rhs_columns(); ++column) {
      const size_t at = static_cast<size_t>(row) * p.rhs_ld() + column;
      o.rhs.set(at, draw());
      const int k = p.rhs_k_major() ? column : row, n = p.rhs_k_major() ? row : column;
      rhs_by_k[static_cast<size_t>(k) * p.n + n] = o.rhs.get(at);
    }
  }
  o.bias = Elements(p.m, p.bias_dtype());
  for (int m = 0; m < p.m; ++m) o.bias.set(m, draw());
  multiply_on_host(p, rhs_by_k, o);
  return o;
}

struct Variant {
  bool bias, accumulate, float_out;
  Accumulation accumulation = Accumulation::kAuto;
};

inline DType out_dtype(const Problem& p, const Variant& v) {
  return v.float_out ? DType::kFloat32 : p.bias_dtype();
}

inline std::string describe_case(const Problem& p, const Kernel& kernel, const Variant& v) {
  return concat(gemm::name_of(p.pass), " ", gemm::name_of(p.epilogue), " m=", p.m, " n=", p.n,
                " k=", p.k, " ", name_of(p.format), v.bias ? " bias" : "",
                v.accumulate ? " accumulate" : "", v.float_out ? " fp32-out" : "",
                p.integers ? "" : " normal", " | ", kernel.name);
}

/// Device side of a problem, shared by all configs.
struct Device {
  Buffer packed, E, rhs, bias, lhs_scale, rhs_scale;
  explicit Device(const Operands& o)
      : packed(o.lhs.values),
        E(o.lhs.E),
        rhs(o.rhs),
        bias(o.bias),
        lhs_scale(std::vector<float>{kLhsScale}),
        rhs_scale(std::vector<float>{kRhsScale}) {}
};

inline SparseGemmArgs make_args(const Problem& p, const Device& d, const Variant& v) {
  const bool scaled = is_float8(p.format);
  const auto scale = [&](const Buffer& buffer) {
    return scaled ? static_cast<const float*>(buffer.get()) : nullptr;
  };
  SparseGemmArgs a;
  a.pass = p.pass;
  a.epilogue = p.epilogue;
  a.m = p.m, a.n = p.n, a.k = p.k;
  a.lhs = {d.packed.get(), static_cast<const uint8_t*>(d.E.get()), p.format,
           lhs_orientation(p.pass, p.format), scale(d.lhs_scale)};
  a.rhs = {d.rhs.get(), p.rhs_ld(), rhs_orientation(p.pass, p.format), scale(d.rhs_scale)};
  a.out_dtype = out_dtype(p, v);
  a.out_ld = p.out_ld();
  a.bias = v.bias ? d.bias.get() : nullptr;
  a.accumulate = v.accumulate;
  a.accumulation = v.accumulation;
  return a;
}

/// out before a product: what an accumulating one adds to, and canaries beside it.
inline Elements make_out(const Problem& p, const Variant& v) {
  Elements out(static_cast<size_t>(p.out_rows()) * p.out_ld(), out_dtype(p, v), 77.0f);
  for (int row = 0; row < p.out_rows(); ++row)
    for (int column = 0; column < p.out_columns(); ++column)
      out.set(static_cast<size_t>(row) * p.out_ld() + column, kExisting);
  return out;
}

inline void synchronize_or_exit(const std::string& what) {
  const cudaError_t status = cudaDeviceSynchronize();
  if (status == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what.c_str(), cudaGetErrorString(status));
  std::exit(1);  // the context is lost
}

/// How far sums may be from exact ones, in units of the sum of absolute products: fp32, or some 14
/// bits of the largest partial sum.
inline double sum_epsilon(const Problem& p) { return is_float8(p.format) ? 0x1p-10 : 0x1p-19; }

inline void check_case(const Problem& p, const Operands& o, const Device& d, const Kernel& kernel,
                       const Variant& v) {
  ++cases;
  SparseGemmArgs a = make_args(p, d, v);
  const Elements before = make_out(p, v);
  const Buffer out(before);
  const Buffer workspace(kernel.workspace_bytes(a));
  a.out = out.get();
  a.workspace = workspace.get();
  kernel.run(a);
  synchronize_or_exit(describe_case(p, kernel, v));

  const Elements got = out.read_as(before);
  const double out_epsilon = v.float_out                          ? 0x1p-24
                             : p.bias_dtype() == DType::kBFloat16 ? 0x1p-8
                                                                  : 0x1p-11;
  // Rows are stored in whole 16-byte units.
  const int unit = v.float_out ? 4 : 8, stored = (p.out_columns() + unit - 1) / unit * unit;
  int64_t wrong = 0;
  std::string first;
  for (int row = 0; row < p.out_rows(); ++row) {
    for (int column = 0; column < p.out_ld(); ++column) {
      const size_t at_padded = static_cast<size_t>(row) * p.out_ld() + column;
      const float value = got.get(at_padded);
      double expected = before.get(at_padded);
      bool ok;
      if (column >= p.out_columns()) {
        ok = value == before.get(at_padded) || column < stored;
      } else {
        const size_t at = static_cast<size_t>(row) * p.out_columns() + column;
        const int m = p.m_rows() ? row : column;
        expected =
            o.exact[at] + (v.bias ? o.bias.get(m) : 0.0f) + (v.accumulate ? kExisting : 0.0f);
        if (p.integers) {
          ok = value == got.rounded(static_cast<float>(expected));
        } else {
          ok = std::fabs(value - expected) <=
               out_epsilon * std::fabs(expected) + sum_epsilon(p) * o.magnitude[at] + 1e-6;
        }
      }
      if (!ok && wrong++ == 0)
        first = concat(" first at [", row, ", ", column, "]: ", value, " for ", expected);
    }
  }
  if (wrong > 0)
    fail(describe_case(p, kernel, v), ": ", wrong, " of ", got.size(), " wrong,", first);
}

}  // namespace gpu_testing
