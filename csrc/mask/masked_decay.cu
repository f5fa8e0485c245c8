// masked_decay.cu: grad += decay * (1 - mask) * w, for many tensors in few launches.
//
//   grad, w   [rows, cols] fp32, bf16 or fp16, each row- or column-major; rows % 4 == cols % 4 == 0
//   mask      uint16 [rows/4, cols/4]
//
// Work     A thread takes 8 neighbours of a line (a row, or a column where both are column-major) and the two masks over
//          them, four times; a block 8192 elements. Other lengths, addresses and layouts go element by element.
// Traffic  grad read and written, w read, 1/8 B of mask: 6.1 B an element in bf16, 12.1 B in fp32.
// Rounding fp32 product, fp32 sum, one rounding to grad's dtype; kept elements keep their bits (compiled without fma).
#include <cuda_runtime.h>

#include "common/convert.h"
#include "common/cuda_check.h"
#include "common/metadata.h"
#include "common/tensor_list.h"
#include "common/vector.cuh"
#include "mask/mask_cuda.h"

namespace sparse24 {
namespace {

constexpr int kThreads = 256;
constexpr int kLine = 8;    // neighbours a thread takes at once
constexpr int kRounds = 4;  // and how often: several loads in flight
constexpr int kElementsPerTile = kThreads * kLine * kRounds;

enum class DecayLayout { kByRows, kByColumns, kStrided };

struct DecayTensor {
  Matrix grad;
  ConstMatrix w;
  const uint16_t* mask;
  const float* grad_scale;
  float decay;
  uint32_t chunks_per_line;
};
using DecayList = TensorList<DecayTensor>;
static_assert(sizeof(DecayList) <= kKernelParameterBytes, "a launch's tensors must fit its parameters");

/// Eight neighbours of one line.
template <typename T>
struct Line {
  static constexpr int kVectors = kLine * sizeof(T) / 16;
  union {
    uint4 vector[kVectors];
    T element[kLine];
  };
  __device__ __forceinline__ Line() {}
  __device__ __forceinline__ void load(const T* from) {
    SP24_UNROLL
    for (int i = 0; i < kVectors; ++i) vector[i] = load16(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ __forceinline__ void store(T* to) const {
    SP24_UNROLL
    for (int i = 0; i < kVectors; ++i) store16(reinterpret_cast<uint4*>(to) + i, vector[i]);
  }
};

__device__ __forceinline__ float decay_factor(const DecayTensor& t) {
  return t.grad_scale == nullptr ? t.decay : t.decay * *t.grad_scale;
}

/// Kept bits of the eight neighbours at `along` of line `line`, one bit each.
template <DecayLayout kLayout>
__device__ __forceinline__ uint32_t kept_bits(const DecayTensor& t, int64_t line, int64_t along) {
  const int64_t block_cols = t.w.cols / 4;
  if constexpr (kLayout == DecayLayout::kByRows) {
    const uint16_t* mask = t.mask + line / 4 * block_cols + along / 4;
    const int shift = static_cast<int>(line % 4) * 4;
    return (mask[0] >> shift & 0xFu) | (mask[1] >> shift & 0xFu) << 4;
  } else {
    const uint16_t* mask = t.mask + along / 4 * block_cols + line / 4;
    const uint32_t both = (mask[0] | static_cast<uint32_t>(mask[block_cols]) << 16) >> line % 4;
    uint32_t bits = 0;
    SP24_UNROLL
    for (int i = 0; i < kLine; ++i) bits |= (both >> (4 * i) & 1u) << i;
    return bits;
  }
}

template <typename Grad, typename Weight, DecayLayout kLayout>
__global__ void __launch_bounds__(kThreads) masked_decay_kernel(const __grid_constant__ DecayList list) {
  const int index = list.find(blockIdx.x);
  const DecayTensor& t = list.tensor[index];
  const float decay = decay_factor(t);
  constexpr bool kByRows = kLayout == DecayLayout::kByRows;
  const int64_t lines = kByRows ? t.w.rows : t.w.cols;
  const int64_t grad_stride = kByRows ? t.grad.row_stride : t.grad.col_stride;
  const int64_t w_stride = kByRows ? t.w.row_stride : t.w.col_stride;
  const uint32_t first = (blockIdx.x - list.first_tile[index]) * (kThreads * kRounds) + threadIdx.x;

  Line<Grad> grad[kRounds];
  Line<Weight> w[kRounds];
  uint32_t kept[kRounds];
  Grad* place[kRounds];
  SP24_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t chunk = first + round * kThreads;
    const int64_t line = chunk / t.chunks_per_line, along = int64_t{chunk % t.chunks_per_line} * kLine;
    place[round] = nullptr;
    if (line < lines) {
      place[round] = static_cast<Grad*>(t.grad.data) + line * grad_stride + along;
      grad[round].load(place[round]);
      w[round].load(static_cast<const Weight*>(t.w.data) + line * w_stride + along);
      kept[round] = kept_bits<kLayout>(t, line, along);
    }
  }
  SP24_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    if (place[round] == nullptr) continue;
    SP24_UNROLL
    for (int i = 0; i < kLine; ++i) {
      const float pulled = to_float(grad[round].element[i]) + decay * to_float(w[round].element[i]);
      if (!(kept[round] >> i & 1u)) grad[round].element[i] = from_float<Grad>(pulled);
    }
    grad[round].store(place[round]);
  }
}

/// Any layout: one element a thread and round.
template <typename Grad, typename Weight>
__global__ void __launch_bounds__(kThreads) masked_decay_strided_kernel(const __grid_constant__ DecayList list) {
  const int index = list.find(blockIdx.x);
  const DecayTensor& t = list.tensor[index];
  const float decay = decay_factor(t);
  const int64_t first = int64_t{blockIdx.x - list.first_tile[index]} * kElementsPerTile + threadIdx.x;
  for (int round = 0; round < kLine * kRounds; ++round) {
    const int64_t element = first + round * kThreads, r = element / t.w.cols, c = element % t.w.cols;
    if (r >= t.w.rows) return;
    const uint16_t mask = t.mask[r / 4 * (t.w.cols / 4) + c / 4];
    if (mask >> (r % 4 * 4 + c % 4) & 1) continue;
    Grad& grad = static_cast<Grad*>(t.grad.data)[r * t.grad.row_stride + c * t.grad.col_stride];
    const Weight w = static_cast<const Weight*>(t.w.data)[r * t.w.row_stride + c * t.w.col_stride];
    grad = from_float<Grad>(to_float(grad) + decay * to_float(w));
  }
}

template <typename Pointer>
bool moves_in_vectors(const MatrixView<Pointer>& t, bool by_rows) {
  const int64_t along = by_rows ? t.col_stride : t.row_stride, across = by_rows ? t.row_stride : t.col_stride;
  return along == 1 && across * bytes_of(t.dtype) % 16 == 0 && is_aligned16(t.data);
}

DecayLayout choose_layout(const MaskedDecayArgs& args) {
  if (args.w.rows * args.w.cols >= kLine * (int64_t{1} << 31)) return DecayLayout::kStrided;  // chunks have 32-bit numbers
  if (args.w.cols % kLine == 0 && moves_in_vectors(args.grad, true) && moves_in_vectors(args.w, true)) {
    return DecayLayout::kByRows;
  }
  if (args.w.rows % kLine == 0 && moves_in_vectors(args.grad, false) && moves_in_vectors(args.w, false)) {
    return DecayLayout::kByColumns;
  }
  return DecayLayout::kStrided;
}

using DecayKernel = void (*)(DecayList);

DecayKernel choose_kernel(DType grad_dtype, DType w_dtype, DecayLayout layout) {
  DecayKernel kernel = nullptr;
  with_type(grad_dtype, [&](auto grad) {
    with_type(w_dtype, [&](auto w) {
      using Grad = decltype(grad);
      using Weight = decltype(w);
      kernel = layout == DecayLayout::kByRows      ? masked_decay_kernel<Grad, Weight, DecayLayout::kByRows>
               : layout == DecayLayout::kByColumns ? masked_decay_kernel<Grad, Weight, DecayLayout::kByColumns>
                                                   : masked_decay_strided_kernel<Grad, Weight>;
    });
  });
  return kernel;
}

}  // namespace

namespace cuda {

void masked_decay(const MaskedDecayArgs* tensors, int count, cudaStream_t stream) {
  DecayList list;
  DType grad_dtype{}, w_dtype{};
  DecayLayout layout{};
  const auto flush = [&] {
    if (list.tiles() == 0) return;
    choose_kernel(grad_dtype, w_dtype, layout)<<<list.tiles(), kThreads, 0, stream>>>(list);
    SP24_CHECK_LAUNCH("masked_decay of ", list.count, " tensors, the first ", name_of(grad_dtype), " [",
                      list.tensor[0].w.rows, ", ", list.tensor[0].w.cols, "]");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    const MaskedDecayArgs& args = tensors[i];
    const int64_t elements = args.w.rows * args.w.cols;
    if (elements == 0) continue;
    const DecayLayout args_layout = choose_layout(args);
    if (list.full() || args.grad.dtype != grad_dtype || args.w.dtype != w_dtype || args_layout != layout) flush();
    grad_dtype = args.grad.dtype, w_dtype = args.w.dtype, layout = args_layout;
    const int64_t line = layout == DecayLayout::kByColumns ? args.w.rows : args.w.cols;
    list.add({args.grad, args.w, args.mask, args.grad_scale, args.decay, static_cast<uint32_t>(line / kLine)},
             static_cast<uint32_t>(round_up(elements, kElementsPerTile) / kElementsPerTile));
  }
  flush();
}

}  // namespace cuda
}  // namespace sparse24
