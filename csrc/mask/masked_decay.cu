// masked_decay.cu: grad += decay * (1 - mask) * w for a list of tensors, in place.
//
//   grad, w  [rows, cols] fp32, bf16 or fp16 each, row- or column-major each
//   mask     uint16 [rows/4, cols/4]
//
// Work     Up to 32 tensors a launch. A thread takes a square patch whose lines are 16-byte vectors
//          of grad and w (4x4 of fp32, 8x8 of 16 bits; 4x4 if the dtypes differ in size), and the
//          masks of its blocks.
// Traffic  bf16: 4 B read and 2 B written an element, 1/8 B of mask. 11008 x 4096: 276 MB, 66 us at
//          4.2 TB/s; fp32 547 MB, 130 us.
// Order    fp32 product of decay (times grad_scale) and w, fp32 sum, one rounding; kept elements
//          are not touched.
// Edges    Odd widths, strides or addresses go element by element.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/element.cuh"
#include "common/mask_bits.h"
#include "common/raster.h"
#include "common/square_patch.cuh"
#include "common/tensor_list.h"
#include "common/tile.h"
#include "common/weight_patch.cuh"
#include "mask/mask_cuda.h"

namespace sparse24 {
namespace {

struct DecayTensor {
  PatchOperand grad, w;
  const uint16_t* mask;
  const float* grad_scale;
  float decay;
  int rows, cols;
  uint32_t tile_rows, tile_cols;
};
using DecayList = TensorList<DecayTensor>;
static_assert(sizeof(DecayList) <= kKernelParameterBytes,
              "a launch's tensors must fit its parameters");

/// Grad and w in lines of 16 bytes where they are of one size; else the smaller one takes 8.
template <typename Grad, typename Weight>
constexpr int kDecaySide = sizeof(Grad) == 2 && sizeof(Weight) == 2 ? 8 : 4;

/// Kept bits of a patch's lines, a byte a line: rows of the matrix, or columns.
template <int kSide>
__device__ __forceinline__ void kept_lines(const uint16_t* mask, uint32_t block_cols,
                                           bool by_columns, uint32_t (&kept)[kSide / 4]) {
  if constexpr (kSide == 4) {
    const uint32_t block = by_columns ? transpose_masks(mask[0]) : mask[0];
    kept[0] = interleave_nibbles(block);
  } else {
    uint32_t first = *reinterpret_cast<const uint32_t*>(mask);
    uint32_t second = *reinterpret_cast<const uint32_t*>(mask + block_cols);
    if (by_columns) {
      const uint32_t left = pair_of_lows(first, second), right = pair_of_highs(first, second);
      first = transpose_masks(left), second = transpose_masks(right);
    }
    kept[0] = interleave_nibbles(first), kept[1] = interleave_nibbles(second);
  }
}

template <typename Grad, typename Weight>
__global__ void __launch_bounds__(kTileThreads)
    masked_decay_kernel(const __grid_constant__ DecayList list) {
  constexpr int kSide = kDecaySide<Grad, Weight>;
  const int index = list.find(blockIdx.x);
  const DecayTensor& t = list.tensor[index];
  const bool by_columns = t.grad.column_major;
  const Walk walk = by_columns || t.w.column_major ? Walk::kSquare : Walk::kRows;
  const TileIndex tile = raster_tile(blockIdx.x - list.first_tile[index], t.tile_rows, t.tile_cols,
                                     walk == Walk::kSquare ? kMixedBand : 1);
  const PatchOrigin origin = patch_origin(walk, false, threadIdx.x);
  const int row = (static_cast<int>(tile.row) * kTileRows + origin.row) / kPatch * kSide;
  const int col = (static_cast<int>(tile.col) * kTileCols + origin.col) / kPatch * kSide;
  if (row >= t.rows || col >= t.cols) return;

  // Only row-major patches may end inside the matrix, after 4 of 8 rows.
  const int valid = t.rows - row;
  char* const grad_address = patch_address<Grad>(t.grad, row, col);
  SquarePatch<Grad, kSide> grad = load_lines<Grad, kSide>(grad_address, t.grad.line_bytes, valid);
  SquarePatch<Weight, kSide> w =
      load_lines<Weight, kSide>(patch_address<Weight>(t.w, row, col), t.w.line_bytes, valid);
  const uint32_t block_cols = static_cast<uint32_t>(t.cols) / 4;
  const uint16_t* mask = t.mask + uint64_t{static_cast<uint32_t>(row) / 4} * block_cols + col / 4;
  uint32_t kept[kSide / 4];
  kept_lines<kSide>(mask, valid > 4 ? block_cols : 0, by_columns, kept);
  const float decay = t.grad_scale == nullptr ? t.decay : t.decay * *t.grad_scale;

  if (t.w.column_major != by_columns) turn(w);
  SP24_UNROLL
  for (int i = 0; i < kSide; ++i) {
    const uint32_t line = kept[i / 4] >> (8 * (i % 4));
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Grad));
    SP24_UNROLL
    for (int word = 0; word < SquarePatch<Grad, kSide>::kWords; ++word) {
      float x[kPerWord];
      uint32_t keep = 0;  // the bits of kept elements
      SP24_UNROLL
      for (int e = 0; e < kPerWord; ++e) {
        const int j = word * kPerWord + e;
        const float pull = decay * patch_value(w, i, j);
        x[e] = patch_value(grad, i, j) + pull;
        const uint32_t element_bits = kPerWord == 1 ? 0xFFFFFFFFu : 0xFFFFu << (16 * e);
        keep |= line >> j & 1u ? element_bits : 0u;
      }
      grad.word[i][word] = (grad.word[i][word] & keep) | (patch_word<Grad>(x) & ~keep);
    }
  }
  store_lines(grad_address, t.grad.line_bytes, valid, grad);
}

template <typename Grad>
__global__ void __launch_bounds__(kElementThreads)
    masked_decay_element_kernel(MaskedDecayArgs args) {
  ElementIndex at;
  if (!element_index(args.grad.rows, args.grad.cols, args.grad.row_stride < args.grad.col_stride,
                     at))
    return;
  const uint16_t mask = args.mask[at.row / 4 * (args.grad.cols / 4) + at.col / 4];
  if (mask >> (4 * (at.row % 4) + at.col % 4) & 1) return;
  const float decay = args.grad_scale == nullptr ? args.decay : args.decay * *args.grad_scale;
  const float pull = decay * read_value(args.w, static_cast<int>(at.row), static_cast<int>(at.col));
  Grad& grad = element<Grad>(args.grad, at.row, at.col);
  grad = from_float<Grad>(to_float(grad) + pull);
}

using DecayKernel = void (*)(DecayList);

DecayKernel choose_kernel(DType grad, DType w) {
  DecayKernel kernel = nullptr;
  with_type(grad, [&](auto g) {
    using Grad = decltype(g);
    with_type(w, [&](auto v) { kernel = masked_decay_kernel<Grad, decltype(v)>; });
  });
  return kernel;
}

/// Do vectors of both fit, with lines of the same number of elements?
bool patches_fit(const MaskedDecayArgs& args, Layout grad, Layout w) {
  if (grad == Layout::kStrided || w == Layout::kStrided) return false;
  const bool both16 = args.grad.dtype != DType::kFloat32 && args.w.dtype != DType::kFloat32;
  const int64_t side = both16 ? 8 : 4;
  const bool by_columns = grad == Layout::kColumnMajor || w == Layout::kColumnMajor;
  const bool extents_fit =
      args.grad.cols % side == 0 && (!by_columns || args.grad.rows % side == 0);
  return extents_fit && reinterpret_cast<uintptr_t>(args.mask) % 4 == 0;
}

}  // namespace

namespace cuda {

void masked_decay(const MaskedDecayArgs* tensors, int count, cudaStream_t stream) {
  DecayList list;
  DType grad_dtype{}, w_dtype{};
  const auto flush = [&] {
    if (list.tiles() == 0) return;
    choose_kernel(grad_dtype, w_dtype)<<<list.tiles(), kTileThreads, 0, stream>>>(list);
    SP24_CHECK_LAUNCH("masked_decay of ", list.count, " tensors, the first ", name_of(grad_dtype),
                      " [", list.tensor[0].rows, ", ", list.tensor[0].cols, "]");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    const MaskedDecayArgs& args = tensors[i];
    const int64_t rows = args.grad.rows, cols = args.grad.cols;
    if (rows == 0 || cols == 0) continue;
    check_extents32(rows, cols, "grad");
    const Layout grad = vector_layout(args.grad), w = vector_layout(args.w);
    if (!patches_fit(args, grad, w)) {
      with_type(args.grad.dtype, [&](auto zero) {
        masked_decay_element_kernel<decltype(zero)>
            <<<element_blocks(args.grad), kElementThreads, 0, stream>>>(args);
      });
      SP24_CHECK_LAUNCH("masked_decay of ", name_of(args.grad.dtype), " [", rows, ", ", cols, "]");
      continue;
    }
    if (list.full() || args.grad.dtype != grad_dtype || args.w.dtype != w_dtype) flush();
    grad_dtype = args.grad.dtype, w_dtype = args.w.dtype;
    const int64_t side = grad_dtype != DType::kFloat32 && w_dtype != DType::kFloat32 ? 8 : 4;
    const uint32_t tile_rows =
        static_cast<uint32_t>(round_up((rows + side - 1) / side * kPatch, kTileRows) / kTileRows);
    const uint32_t tile_cols =
        static_cast<uint32_t>(round_up(cols / side * kPatch, kTileCols) / kTileCols);
    list.add({patch_operand(args.grad, grad), patch_operand(args.w, w), args.mask, args.grad_scale,
              args.decay, static_cast<int>(rows), static_cast<int>(cols), tile_rows, tile_cols},
             tile_rows * tile_cols);
  }
  flush();
}

}  // namespace cuda
}  // namespace sparse24
