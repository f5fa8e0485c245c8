// unpack.cu: the dense form of a packed operand, and a check of metadata from outside.
//
//   packed   [rows, cols/2], E for (m = rows, k = cols): groups of four run along rows;
//            `transposed`: [rows/2, cols], E for (m = cols, k = rows): along columns
//   out      [rows, cols] row-major, zeros where nothing was kept; 16 or 32 bits an element, copied
//
// Work     Along rows a thread takes one byte of E: four packed values to eight elements of a row,
//          in vectors where they fit. Along columns it takes one column of eight rows. Neighbouring
//          threads share rows.
// Traffic  16 bits: 1.125 B read and 2 B written an element. 11008 x 4096: 141 MB, 34 us at 4.2
//          TB/s.
#include <cuda_runtime.h>

#include "common/block_sum.cuh"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/format.h"
#include "common/layout.h"
#include "common/metadata.h"
#include "common/vector.cuh"
#include "pack/pack_cuda.h"
#include "pack/unpack8.cuh"

namespace sparse24 {
namespace {

/// The four elements of a group, from its two kept ones. Equal positions, which no valid E has,
/// keep the second.
template <typename Bits>
__device__ __forceinline__ void place(uint32_t nibble, Bits first, Bits second, Bits (&group)[4]) {
  const int at_first = meta_first(nibble), at_second = meta_second(nibble);
  SP24_UNROLL
  for (int i = 0; i < 4; ++i) group[i] = i == at_second ? second : i == at_first ? first : Bits{0};
}

template <typename Bits>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_rows_kernel(const Bits* packed, const uint8_t* E, Bits* out, int64_t out_stride,
                       int64_t rows, int64_t cols, bool vectors) {
  const int64_t bytes_a_row = (cols + 7) / 8,
                index = int64_t{blockIdx.x} * kUnpackThreads + threadIdx.x;
  if (index >= rows * bytes_a_row) return;
  const int64_t row = index / bytes_a_row, col = index % bytes_a_row * 8;
  const uint32_t byte = E[meta_byte_offset(row, col, rows)];
  const Bits* from = packed + row * (cols / 2) + col / 2;
  Bits* to = out + row * out_stride + col;
  Bits kept[4] = {}, groups[2][4];
  if (sizeof(Bits) == 2 && vectors) {
    const uint2 words = load8(from);
    kept[0] = static_cast<Bits>(words.x), kept[1] = static_cast<Bits>(words.x >> 16);
    kept[2] = static_cast<Bits>(words.y), kept[3] = static_cast<Bits>(words.y >> 16);
  } else {
    SP24_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (col + 2 * i < cols) kept[i] = from[i];
    }
  }
  place(byte & 0xFu, kept[0], kept[1], groups[0]);
  place(byte >> 4, kept[2], kept[3], groups[1]);
  if (sizeof(Bits) == 2 && vectors) {
    uint32_t words[4];
    SP24_UNROLL
    for (int p = 0; p < 4; ++p) {
      words[p] = groups[p / 2][p % 2 * 2] | static_cast<uint32_t>(groups[p / 2][p % 2 * 2 + 1])
                                                << 16;
    }
    store16(to, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
    SP24_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (col + i < cols) to[i] = groups[i / 4][i % 4];
    }
  }
}

template <typename Bits>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_columns_kernel(const Bits* packed_t, const uint8_t* E, Bits* out, int64_t out_stride,
                          int64_t rows, int64_t cols) {
  const int64_t bytes_a_column = (rows + 7) / 8,
                index = int64_t{blockIdx.x} * kUnpackThreads + threadIdx.x;
  if (index >= cols * bytes_a_column) return;
  const int64_t row = index / cols * 8, col = index % cols;
  const uint32_t byte = E[meta_byte_offset(col, row, cols)];
  SP24_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (row + 4 * half < rows) {
      const Bits* kept = packed_t + (row / 2 + 2 * half) * cols + col;
      Bits group[4];
      place(byte >> (4 * half), kept[0], kept[cols], group);
      SP24_UNROLL
      for (int i = 0; i < 4; ++i) out[(row + 4 * half + i) * out_stride + col] = group[i];
    }
  }
}

__global__ void __launch_bounds__(kCountThreads)
    count_bad_metadata_kernel(bool bits8, const uint8_t* E, int64_t m, int64_t k, int64_t* bad) {
  const int64_t bytes_a_row = (k + 7) / 8, bytes = m * bytes_a_row;
  int64_t count = 0;
  for (int64_t index = int64_t{blockIdx.x} * kCountThreads + threadIdx.x; index < bytes;
       index += int64_t{gridDim.x} * kCountThreads) {
    const int64_t col = index / m * 8;
    const uint32_t byte =
        E[bits8 ? meta8_byte_offset(index % m, col, m) : meta_byte_offset(index % m, col, m)];
    count += meta_is_valid(byte & 0xFu) ? 0 : 1;
    if (col + 4 < k) count += meta_is_valid(byte >> 4) ? 0 : 1;
  }
  add_block_sum(count, bad);
}

template <typename Bits>
void launch_unpack(const UnpackArgs& args, cudaStream_t stream) {
  const int64_t rows = args.out.rows, cols = args.out.cols;
  const int64_t bytes = args.transposed ? cols * ((rows + 7) / 8) : rows * ((cols + 7) / 8);
  const uint32_t blocks = static_cast<uint32_t>((bytes + kUnpackThreads - 1) / kUnpackThreads);
  const Bits* packed = static_cast<const Bits*>(args.packed);
  Bits* out = static_cast<Bits*>(args.out.data);
  if (args.transposed) {
    unpack_columns_kernel<<<blocks, kUnpackThreads, 0, stream>>>(packed, args.E, out,
                                                                 args.out.row_stride, rows, cols);
  } else {
    const bool vectors = vector_layout(args.out) == Layout::kRowMajor &&
                         reinterpret_cast<uintptr_t>(packed) % 8 == 0;
    unpack_rows_kernel<<<blocks, kUnpackThreads, 0, stream>>>(
        packed, args.E, out, args.out.row_stride, rows, cols, vectors);
  }
}

void launch_unpack8(const UnpackArgs& args, cudaStream_t stream) {
  const int64_t m = args.transposed ? args.out.cols : args.out.rows;
  const int64_t k = args.transposed ? args.out.rows : args.out.cols;
  const uint32_t blocks =
      static_cast<uint32_t>((m * ((k + 7) / 8) + kUnpackThreads - 1) / kUnpackThreads);
  with_packed_format(*args.packed_dtype, [&](auto format) {
    if constexpr (decltype(format)::kScaled) {
      using F = typename decltype(format)::Storage;
      with_type(args.out.dtype, [&](auto zero) {
        unpack8_kernel<<<blocks, kUnpackThreads, 0, stream>>>(
            static_cast<const F*>(args.packed), args.E, args.scale,
            static_cast<decltype(zero)*>(args.out.data), args.out.row_stride, m, k,
            args.transposed);
      });
    }
  });
}

}  // namespace

namespace cuda {

void unpack(const UnpackArgs& args, cudaStream_t stream) {
  if (args.out.rows == 0 || args.out.cols == 0) return;
  check_extents32(args.out.rows, args.out.cols, "out");
  if (is_float8(args.packed_dtype.value_or(args.out.dtype))) {
    launch_unpack8(args, stream);
  } else if (args.out.dtype == DType::kFloat32) {
    launch_unpack<uint32_t>(args, stream);
  } else {
    launch_unpack<uint16_t>(args, stream);
  }
  SP24_CHECK_LAUNCH("unpack to [", args.out.rows, ", ", args.out.cols, "]");
}

void count_bad_metadata(DType dtype, const uint8_t* E, int64_t m, int64_t k, int64_t* bad,
                        cudaStream_t stream) {
  SP24_CHECK_CUDA(cudaMemsetAsync(bad, 0, sizeof *bad, stream));
  if (m == 0 || k == 0) return;
  count_bad_metadata_kernel<<<count_blocks(m * ((k + 7) / 8)), kCountThreads, 0, stream>>>(
      is_float8(dtype), E, m, k, bad);
  SP24_CHECK_LAUNCH("count_bad_metadata for m = ", m, ", k = ", k);
}

}  // namespace cuda
}  // namespace sparse24
