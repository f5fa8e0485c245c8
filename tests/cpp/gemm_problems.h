// gemm_problems.h: products with known results, their operands on a GPU, and the comparison. Values
// around operands are poison that no kernel may read, values around outputs are canaries that none
// may touch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "common/cuda_check.h"
#include "common/metadata.h"
#include "gemm/config.h"
#include "gpu_testing.h"

namespace gpu_testing {

using namespace sparse24;

inline int64_t cases = 0;

inline uint16_t to_bits(float value, DType dtype) {
  uint16_t bits;
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat16 v = __float2bfloat16_rn(value);
    std::memcpy(&bits, &v, 2);
  } else {
    const __half v = __float2half_rn(value);
    std::memcpy(&bits, &v, 2);
  }
  return bits;
}

inline float to_value(uint16_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) {
    __nv_bfloat16 v;
    std::memcpy(&v, &bits, 2);
    return __bfloat162float(v);
  }
  __half v;
  std::memcpy(&v, &bits, 2);
  return __half2float(v);
}

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
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> host(bytes_ / sizeof(T));
    SP24_CHECK_CUDA(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
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
constexpr int kPad = 8;  // columns between rows of rhs and out, which no kernel may use or touch

struct Problem {
  GemmPass pass;
  int m, n, k;
  bool integers;

  bool is_weight_grad() const { return pass == GemmPass::kGradWeight; }
  int packed_k() const { return is_weight_grad() ? static_cast<int>(round_up(k, 8)) : k; }
  int rhs_rows() const { return is_weight_grad() ? k : n; }
  int rhs_columns() const { return is_weight_grad() ? n : k; }
  int out_rows() const { return is_weight_grad() ? m : n; }
  int out_columns() const { return is_weight_grad() ? n : m; }
  int rhs_ld() const { return static_cast<int>(round_up(rhs_columns(), 8)) + kPad; }
  int out_ld() const { return static_cast<int>(round_up(out_columns(), 8)) + kPad; }
};

/// Operands in host and device memory, and the product: out_exact[row of out][column of out],
/// without bias.
struct Operands {
  std::vector<uint16_t> packed, rhs, bias;
  std::vector<uint8_t> E;
  std::vector<double> exact, magnitude;  // product, and product of absolute values
  std::vector<float> bias_values;
};

inline Operands make_operands(const Problem& p, DType dtype) {
  Random random(p.m * 7919 + p.n * 31 + p.k + static_cast<int>(p.pass));
  auto draw = [&] {
    return p.integers ? static_cast<float>(random.below(5) - 2) : random.normal();
  };
  Operands o;

  const int packed_k = p.packed_k();
  o.packed.assign(static_cast<size_t>(p.m) * packed_k / 2, 0);
  o.E.assign(meta_bytes(p.m, packed_k), 0x44);
  struct Kept {
    int k;
    float value;
  };
  std::vector<std::vector<Kept>> rows(p.m);
  for (int m = 0; m < p.m; ++m) {
    for (int group = 0; group < packed_k / 4; ++group) {
      const int first = random.below(3), second = first + 1 + random.below(3 - first);
      uint8_t& byte = o.E[meta_byte_offset(m, group * 4, p.m)];
      const int shift = group % 2 * 4;
      byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (first | second << 2) << shift);
      for (int i = 0; i < 2; ++i) {
        const int k = group * 4 + (i == 0 ? first : second), k_packed = group * 2 + i;
        const bool is_padding =
            k >= p.k;  // tokens that do not exist: their rows are zero, rhs has none
        const uint16_t bits = is_padding ? 0 : to_bits(draw(), dtype);
        const size_t at = is_forward(p.pass) ? static_cast<size_t>(m) * (packed_k / 2) + k_packed
                                             : static_cast<size_t>(k_packed) * p.m + m;
        o.packed[at] = bits;
        if (!is_padding) rows[m].push_back({k, to_value(bits, dtype)});
      }
    }
  }

  const uint16_t nan = to_bits(NAN, dtype);
  o.rhs.assign(static_cast<size_t>(p.rhs_rows()) * p.rhs_ld(), nan);
  std::vector<float> rhs_by_k(static_cast<size_t>(p.k) * p.n);
  for (int row = 0; row < p.rhs_rows(); ++row) {
    for (int column = 0; column < p.rhs_columns(); ++column) {
      const uint16_t bits = to_bits(draw(), dtype);
      o.rhs[static_cast<size_t>(row) * p.rhs_ld() + column] = bits;
      const int k = p.is_weight_grad() ? row : column, n = p.is_weight_grad() ? column : row;
      rhs_by_k[static_cast<size_t>(k) * p.n + n] = to_value(bits, dtype);
    }
  }
  for (int m = 0; m < p.m; ++m) {
    o.bias.push_back(to_bits(draw(), dtype));
    o.bias_values.push_back(to_value(o.bias.back(), dtype));
  }

  o.exact.assign(static_cast<size_t>(p.m) * p.n, 0.0);
  if (!p.integers) o.magnitude.assign(o.exact.size(), 0.0);
  std::vector<float> sums_float(p.n);
  std::vector<double> sums(p.n), sizes(p.n);
  for (int m = 0; m < p.m; ++m) {
    if (p.integers) {  // exact in fp32, and twice as fast
      std::fill(sums_float.begin(), sums_float.end(), 0.0f);
      for (const Kept& kept : rows[m]) {
        const float* line = &rhs_by_k[static_cast<size_t>(kept.k) * p.n];
        for (int n = 0; n < p.n; ++n) sums_float[n] += kept.value * line[n];
      }
      std::copy(sums_float.begin(), sums_float.end(), sums.begin());
    } else {
      std::fill(sums.begin(), sums.end(), 0.0);
      std::fill(sizes.begin(), sizes.end(), 0.0);
      for (const Kept& kept : rows[m]) {
        const float* line = &rhs_by_k[static_cast<size_t>(kept.k) * p.n];
        for (int n = 0; n < p.n; ++n) {
          const double product = static_cast<double>(kept.value) * line[n];
          sums[n] += product;
          sizes[n] += std::fabs(product);
        }
      }
    }
    for (int n = 0; n < p.n; ++n) {
      const size_t at =
          p.is_weight_grad() ? static_cast<size_t>(m) * p.n + n : static_cast<size_t>(n) * p.m + m;
      o.exact[at] = sums[n];
      if (!p.integers) o.magnitude[at] = sizes[n];
    }
  }
  return o;
}

struct Variant {
  bool bias, accumulate, float_out;
};

inline std::string describe_case(const Problem& p, DType dtype, const Kernel& kernel,
                                 const Variant& v) {
  return concat(gemm::name_of(p.pass), " m=", p.m, " n=", p.n, " k=", p.k,
                dtype == DType::kBFloat16 ? " bf16" : " fp16", v.bias ? " bias" : "",
                v.accumulate ? " accumulate" : "", v.float_out ? " fp32-out" : "",
                p.integers ? "" : " normal", " | ", kernel.name);
}

/// Device side of a problem, shared by all configs.
struct Device {
  Buffer packed, E, rhs, bias;
  explicit Device(const Operands& o) : packed(o.packed), E(o.E), rhs(o.rhs), bias(o.bias) {}
};

inline SparseGemmArgs make_args(const Problem& p, DType dtype, const Device& d, const Variant& v) {
  SparseGemmArgs a;
  a.pass = p.pass;
  a.m = p.m, a.n = p.n, a.k = p.k;
  a.dtype = dtype;
  a.out_dtype = v.float_out ? DType::kFloat32 : dtype;
  a.packed = d.packed.get();
  a.E = static_cast<const uint8_t*>(d.E.get());
  a.rhs = d.rhs.get();
  a.rhs_ld = p.rhs_ld();
  a.out_ld = p.out_ld();
  a.bias = v.bias ? d.bias.get() : nullptr;
  a.accumulate = v.accumulate;
  return a;
}

inline void check_case(const Problem& p, DType dtype, const Operands& o, const Device& d,
                       const Kernel& kernel, const Variant& v) {
  ++cases;
  SparseGemmArgs a = make_args(p, dtype, d, v);
  const size_t out_size = static_cast<size_t>(p.out_rows()) * p.out_ld();
  const float canary = 77.0f;
  std::vector<float> before(out_size, canary);
  for (int row = 0; row < p.out_rows(); ++row) {
    std::fill_n(before.begin() + static_cast<size_t>(row) * p.out_ld(), p.out_columns(), kExisting);
  }
  std::vector<uint16_t> before16;
  if (!v.float_out) {
    for (const float value : before) before16.push_back(to_bits(value, dtype));
  }
  const Buffer out = v.float_out ? Buffer(before) : Buffer(before16);
  const Buffer workspace(kernel.workspace_bytes(a));
  a.out = out.get();
  a.workspace = workspace.get();
  kernel.run(a);
  const cudaError_t status = cudaDeviceSynchronize();
  if (status != cudaSuccess) {
    std::printf("FAIL %s: %s\n", describe_case(p, dtype, kernel, v).c_str(),
                cudaGetErrorString(status));
    std::exit(1);  // the context is lost
  }

  std::vector<float> got;
  if (v.float_out) {
    got = out.read<float>();
  } else {
    for (const uint16_t bits : out.read<uint16_t>()) got.push_back(to_value(bits, dtype));
  }
  const double out_epsilon = v.float_out ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  // Rows are stored in whole 16-byte units.
  const int unit = v.float_out ? 4 : 8, stored = (p.out_columns() + unit - 1) / unit * unit;
  int64_t wrong = 0;
  std::string first;
  for (int row = 0; row < p.out_rows(); ++row) {
    for (int column = 0; column < p.out_ld(); ++column) {
      const float value = got[static_cast<size_t>(row) * p.out_ld() + column];
      double expected = canary;
      bool ok;
      if (column >= p.out_columns()) {
        ok = value == canary || column < stored;
      } else {
        const size_t at = static_cast<size_t>(row) * p.out_columns() + column;
        const int m = p.is_weight_grad() ? row : column;
        expected =
            o.exact[at] + (v.bias ? o.bias_values[m] : 0.0f) + (v.accumulate ? kExisting : 0.0f);
        if (p.integers) {
          const float rounded = v.float_out
                                    ? static_cast<float>(expected)
                                    : to_value(to_bits(static_cast<float>(expected), dtype), dtype);
          ok = value == rounded;
        } else {
          ok = std::fabs(value - expected) <=
               out_epsilon * std::fabs(expected) + 0x1p-19 * o.magnitude[at] + 1e-6;
        }
      }
      if (!ok && wrong++ == 0)
        first = concat(" first at [", row, ", ", column, "]: ", value, " for ", expected);
    }
  }
  if (wrong > 0)
    fail(describe_case(p, dtype, kernel, v), ": ", wrong, " of ", got.size(), " wrong,", first);
}

}  // namespace gpu_testing
