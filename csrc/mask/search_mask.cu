// search_mask.cu: the transposable 2:4 mask that keeps the most magnitude; masks only.
//
//   w     [rows, cols] bf16, fp16 or fp32, rows % 4 == cols % 4 == 0; row- or column-major, or any
//         strides (slow)
//   mask  uint16 [rows/4, cols/4], bit 4*i + j
//
// Work     Up to 32 weights a launch, tiles of 64 x 128 elements, a thread searches the four blocks
//          of an 8x8 patch (common/tile.h); the search itself is in block_search.h, about 130
//          instructions a block.
// Traffic  bf16 2 B, fp32 4 B read and 1/8 B written an element. 11008 x 4096 in bf16: 96 MB, 23 us
//          at 4.2 TB/s; fp32 186 MB, 44 us.
// Ties     go by the order in block_search.h, in every layout: a patch is searched by rows.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "common/tensor_list.h"
#include "common/weight_patch.cuh"
#include "mask/mask_cuda.h"
#include "mask/search_patch.cuh"

namespace sparse24 {
namespace {

struct SearchTensor {
  ConstMatrix w;
  uint16_t* mask;
  uint32_t tile_rows, tile_cols;
};
template <int kCapacity>
using SearchList = TensorList<SearchTensor, kCapacity>;
static_assert(sizeof(SearchList<kTensorsPerLaunch>) <= kKernelParameterBytes,
              "a launch's tensors must fit its parameters");

template <typename In, Layout kLayout, int kCapacity>
__global__ void __launch_bounds__(kTileThreads)
    search_mask_kernel(const __grid_constant__ SearchList<kCapacity> list) {
  const int index = list.find(blockIdx.x);
  const SearchTensor& t = list.tensor[index];
  const TileIndex tile =
      raster_tile(list.within(blockIdx.x, index), t.tile_rows, t.tile_cols, band_of(kLayout));
  using Patch = WeightPatch<In, kLayout>;
  const PatchOrigin origin = patch_origin(walk_of(kLayout), Patch::kPaired, threadIdx.x);
  const int row = static_cast<int>(tile.row) * kTileRows + origin.row;
  const int col = static_cast<int>(tile.col) * kTileCols + origin.col;

  Patch patch;
  patch.load(t.w, row, col);
  uint32_t top, bottom;
  search_patch(patch, top, bottom);
  store_masks<kLayout>(t.mask, top, bottom, row, col, static_cast<int>(t.w.rows),
                       static_cast<int>(t.w.cols));
}

template <int kCapacity>
using SearchKernel = void (*)(SearchList<kCapacity>);

template <int kCapacity>
SearchKernel<kCapacity> choose_row_major(DType dtype) {
  SearchKernel<kCapacity> kernel = nullptr;
  with_type(dtype, [&](auto zero) {
    kernel = search_mask_kernel<decltype(zero), Layout::kRowMajor, kCapacity>;
  });
  return kernel;
}

SearchKernel<kTensorsPerLaunch> choose_kernel(DType dtype, Layout layout) {
  constexpr int kMany = kTensorsPerLaunch;
  if (layout == Layout::kStrided) return search_mask_kernel<AnyValue, Layout::kStrided, kMany>;
  if (layout == Layout::kRowMajor) return choose_row_major<kMany>(dtype);
  SearchKernel<kMany> kernel = nullptr;
  with_type(dtype, [&](auto zero) {
    kernel = search_mask_kernel<decltype(zero), Layout::kColumnMajor, kMany>;
  });
  return kernel;
}

}  // namespace

namespace cuda {

void search_mask(const PackArgs* weights, int count, cudaStream_t stream) {
  SearchList<kTensorsPerLaunch> list;
  DType dtype{};
  Layout layout{};
  const auto flush = [&] {
    const uint32_t tiles = list.tiles();
    if (tiles == 0) return;
    if (list.count == 1 && layout == Layout::kRowMajor) {
      const auto kernel = choose_row_major<1>(dtype);
      kernel<<<tiles, kTileThreads, 0, stream>>>(list.single());
    } else {
      const auto kernel = choose_kernel(dtype, layout);
      kernel<<<tiles, kTileThreads, 0, stream>>>(list);
    }
    const ConstMatrix& first = list.tensor[0].w;
    SP24_CHECK_LAUNCH("search_mask of ", list.count, " weights, the first ", name_of(first.dtype),
                      " [", first.rows, ", ", first.cols, "]");
    list.count = 0;
  };
  for (int i = 0; i < count; ++i) {
    const PackArgs& args = weights[i];
    if (args.w.rows == 0 || args.w.cols == 0) continue;
    check_extents32(args.w.rows, args.w.cols, "w");
    Layout args_layout = patch_layout(args.w);
    if (reinterpret_cast<uintptr_t>(args.mask) % 4 != 0) args_layout = Layout::kStrided;
    if (list.full() || args.w.dtype != dtype || args_layout != layout) flush();
    dtype = args.w.dtype, layout = args_layout;
    const uint32_t tile_rows = static_cast<uint32_t>(round_up(args.w.rows, kTileRows) / kTileRows);
    const uint32_t tile_cols = static_cast<uint32_t>(round_up(args.w.cols, kTileCols) / kTileCols);
    list.add({args.w, args.mask, tile_rows, tile_cols}, tile_rows * tile_cols);
  }
  flush();
}

}  // namespace cuda
}  // namespace sparse24
