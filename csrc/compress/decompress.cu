// decompress.cu: packed operands back to dense matrices, and the check of their metadata. For checks, export and the
// dense products of sizes that no sparse kernel takes; each element is written once, zeros included.
//
//   packed    [rows, cols/2], E for (m = rows, k = cols)              a thread writes 8 neighbours of a row
//   packed_t  [rows/2, cols], E for (m = cols, k = rows), any cols    a thread writes 8 rows of a column
#include <cuda_runtime.h>

#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "compress/compress_cuda.h"

namespace sparse24 {
namespace {

constexpr int kThreads = 256;

/// Eight dense elements from one byte of E and up to four kept values; `valid` is 4 or 8.
template <typename T>
struct Groups {
  T dense[8];

  template <typename Read>
  __device__ __forceinline__ Groups(uint32_t byte, int valid, Read read) {
    SP24_UNROLL
    for (int group = 0; group < 2; ++group) {
      const uint32_t nibble = byte >> (4 * group) & 0xFu;
      const bool inside = 4 * group < valid;
      const T first = inside ? read(2 * group) : T{}, second = inside ? read(2 * group + 1) : T{};
      SP24_UNROLL
      for (int i = 0; i < 4; ++i) {
        dense[4 * group + i] = i == meta_first(nibble) ? first : i == meta_second(nibble) ? second : T{};
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) decompress_rows_kernel(const T* packed, const uint8_t* E, Matrix out) {
  const int64_t units = (out.cols + 7) / 8, unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = unit / units, col = unit % units * 8;
  if (row >= out.rows) return;
  const int valid = out.cols - col < 8 ? 4 : 8;
  const T* kept = packed + row * (out.cols / 2) + col / 2;
  const Groups<T> groups(E[meta_byte_offset(row, col, out.rows)], valid, [&](int i) { return kept[i]; });
  T* to = static_cast<T*>(out.data) + row * out.row_stride + col;
  SP24_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < valid) to[i] = groups.dense[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) decompress_columns_kernel(const T* packed, const uint8_t* E, Matrix out) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = unit / out.cols * 8, col = unit % out.cols;
  if (row >= out.rows) return;
  const int valid = out.rows - row < 8 ? 4 : 8;
  const T* kept = packed + row / 2 * out.cols + col;
  const Groups<T> groups(E[meta_byte_offset(col, row, out.cols)], valid, [&](int i) { return kept[i * out.cols]; });
  T* to = static_cast<T*>(out.data) + row * out.row_stride + col;
  SP24_UNROLL
  for (int i = 0; i < 8; ++i) {
    if (i < valid) to[i * out.row_stride] = groups.dense[i];
  }
}

/// A thread checks one byte: elements (m, k..k+7).
__global__ void __launch_bounds__(kThreads)
    count_bad_metadata_kernel(const uint8_t* E, int64_t m, int64_t k, unsigned long long* bad) {
  const int64_t units = (k + 7) / 8, unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = unit / units, col = unit % units * 8;
  int wrong = 0;
  if (row < m) {
    const uint32_t byte = E[meta_byte_offset(row, col, m)];
    wrong = !meta_is_valid(byte & 0xFu) + (col + 4 < k && !meta_is_valid(byte >> 4));
  }
  wrong = __reduce_add_sync(0xFFFFFFFFu, wrong);
  if (threadIdx.x % 32 == 0 && wrong != 0) atomicAdd(bad, static_cast<unsigned long long>(wrong));
}

uint32_t grid_of(int64_t units) { return static_cast<uint32_t>(round_up(units, kThreads) / kThreads); }

}  // namespace

namespace cuda {

void decompress(const DecompressArgs& args, cudaStream_t stream) {
  const Matrix& out = args.out;
  if (out.rows == 0 || out.cols == 0) return;
  with_type(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* packed = static_cast<const T*>(args.packed);
    if (args.transposed) {
      decompress_columns_kernel<T>
          <<<grid_of((out.rows + 7) / 8 * out.cols), kThreads, 0, stream>>>(packed, args.E, out);
    } else {
      decompress_rows_kernel<T><<<grid_of(out.rows * ((out.cols + 7) / 8)), kThreads, 0, stream>>>(packed, args.E, out);
    }
  });
  SP24_CHECK_LAUNCH("decompress of ", name_of(out.dtype), " [", out.rows, ", ", out.cols, "]");
}

void count_bad_metadata(const uint8_t* E, int64_t m, int64_t k, int64_t* bad, cudaStream_t stream) {
  SP24_CHECK_CUDA(cudaMemsetAsync(bad, 0, sizeof *bad, stream));
  if (m == 0 || k == 0) return;
  count_bad_metadata_kernel<<<grid_of(m * ((k + 7) / 8)), kThreads, 0, stream>>>(
      E, m, k, reinterpret_cast<unsigned long long*>(bad));
  SP24_CHECK_LAUNCH("count_bad_metadata of m = ", m, ", k = ", k);
}

}  // namespace cuda
}  // namespace sparse24
