// search_and_pack.cu: mask search and packing in one read of each weight. The kernels are in
// pack/pack_rows.cuh and pack_tile.cuh, the search of a block in mask/block_search.h; here they
// meet.
//
// A thread searches its two or four blocks from registers, about 130 instructions each, and writes
// their masks.
#include "fused/fused_cuda.h"
#include "mask/search_patch.cuh"
#include "pack/pack8.cuh"
#include "pack/pack_launch.cuh"

namespace sparse24 {
namespace {

struct SearchMasks {
  template <Layout kLayout, typename Patch>
  static __device__ __forceinline__ PatchMasks of(const Patch& patch, const PackTensor& t, int row,
                                                  int col) {
    uint32_t top, bottom;
    search_patch(patch, top, bottom);
    store_masks<kLayout>(t.mask, top, bottom, row, col, static_cast<int>(t.w.rows),
                         static_cast<int>(t.w.cols));
    return {top, bottom};
  }

  template <typename Patch>
  static __device__ __forceinline__ uint32_t of_row_patch(const Patch& patch, const PackTensor& t,
                                                          int row, int col, bool inside) {
    const uint32_t masks = search_pair(patch, 0);
    if (inside) *row_patch_masks(t, row, col) = masks;
    return masks;
  }
};

}  // namespace

namespace cuda {

void search_and_pack(const PackArgs* weights, int count, cudaStream_t stream) {
  if (count > 0 && is_float8(weights[0].out_dtype))
    return launch_pack8<SearchMasks>(weights, count, stream, "search_and_pack");
  launch_pack<SearchMasks>(weights, count, stream, "search_and_pack");
}

}  // namespace cuda
}  // namespace sparse24
