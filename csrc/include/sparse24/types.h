// types.h: the plain types of the public C++ API. No torch, no CUDA header, no CUTLASS.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#define SP24_API __attribute__((visibility("default")))

namespace sparse24 {

/// A bad argument or a failed launch. The message names the argument, the rule, the value and the remedy.
class SP24_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// kFloat8E4M3 is OCP e4m3 without Inf (torch.float8_e4m3fn): finite values up to 448, NaN 0x7F and 0xFF. kFloat8E5M2
/// has Inf and reaches 57344 (torch.float8_e5m2). common/format.h says what each packed format can do.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8E4M3 = 3, kFloat8E5M2 = 4 };
constexpr DType kLastDType = DType::kFloat8E5M2;
constexpr bool is_float8(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2; }

enum class Backend : int { kCpu = 0, kCuda = 1 };

/// Where the work runs. `stream` is a cudaStream_t (nullptr: the legacy default stream); unused on the CPU.
struct Context {
  Backend backend = Backend::kCpu;
  int device = 0;
  void* stream = nullptr;
};

/// A 2-D view of memory that somebody else owns; strides count elements. Row-major has col_stride == 1, column-major
/// has row_stride == 1; every op says which it takes.
template <typename Pointer>
struct MatrixView {
  Pointer data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
};
using Matrix = MatrixView<void*>;
using ConstMatrix = MatrixView<const void*>;

/// The same view, for reading only.
inline ConstMatrix as_const(const Matrix& m) { return {m.data, m.dtype, m.rows, m.cols, m.row_stride, m.col_stride}; }

}  // namespace sparse24
