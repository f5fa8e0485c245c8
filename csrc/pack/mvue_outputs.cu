// mvue_outputs.cu: MVUE packing to 8 bits, and MVUE packing of either kind with an e4m3 copy of the
// gradient from the same read. Plain 16-bit packing is mvue_pack.cu.
//
//   dy       [tokens, features] bf16 or fp16; row-major in whole vectors is the fast way
//   packed   16 bits: [padded/2, features], as in mvue_pack.cu, with the same bits
//            8 bits:  [features, padded/2], padded = tokens rounded up to 32, and E in the order of
//            8 bits: the 16-bit values rounded at random (mvue8_patch.cuh)
//   x8, x8_t, amax, counters of dy: quantize.h;  tile_sums: tile_sums.cuh
//
// Work     tile_outputs.cuh: 128 x 128 elements a block, 8 x 8 a thread.
// Traffic  2 B read, 0.625 B packed8 or 1.125 B packed16, 1 B x8. fp8 at 8192 x 4096: 3.625 B an
//          element, 122 MB, 29 us at 4.2 TB/s.
#include <cuda_runtime.h>

#include "common/cuda_check.h"
#include "pack/pack_cuda.h"
#include "pack/tile_outputs.cuh"

namespace sparse24 {
namespace {

struct MvueOutputsParams {
  ConstMatrix dy;
  bool vectors;
  TileOutputs to;
};

template <typename T, typename Packed>
__global__ void __launch_bounds__(kTile8Threads, 2)
    mvue_outputs_kernel(const __grid_constant__ MvueOutputsParams p) {
  __shared__ alignas(16) TileMemory<Packed> memory;
  const PatchPlace at = patch_place(p.to);
  write_outputs<T, Packed>(
      p.to, memory, load_dense<T>(p.dy, p.vectors, at.token(), at.feature(), p.to.features), at);
}

}  // namespace

namespace cuda {

void mvue_outputs(const MvueArgs& args, cudaStream_t stream) {
  const ConstMatrix& dy = args.dy;
  const DType packed_dtype = args.packed_dtype.value_or(dy.dtype);
  MvueOutputsParams p = {dy, vector_layout(dy) == Layout::kRowMajor,
                         tile_outputs(dy.rows, dy.cols, 1, args.float8)};
  add_packing(p.to, args, packed_dtype);
  p.to.tile_sums = args.tile_sums;
  with_packed16(dy.dtype, [&](auto format) {
    using T = typename decltype(format)::Storage;
    with_packing<T>(true, packed_dtype, [&](auto packed) {
      if constexpr (!std::is_same_v<decltype(packed), NoPacking>) {
        mvue_outputs_kernel<T, decltype(packed)>
            <<<p.to.tile_rows * p.to.tile_cols, kTile8Threads, 0, stream>>>(p);
      }
    });
  });
  SP24_CHECK_LAUNCH("mvue_pack of ", name_of(dy.dtype), " to ", name_of(packed_dtype), " [",
                    dy.rows, ", ", dy.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
