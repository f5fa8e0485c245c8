// pack_by_mask.cu: packing by given masks; what every optimizer step runs. The kernels are in
// pack_rows.cuh, pack_tile.cuh and, for 8 bits, pack8.cuh.
#include "pack/pack8.cuh"
#include "pack/pack_cuda.h"
#include "pack/pack_launch.cuh"

namespace sparse24::cuda {

void pack_by_mask(const PackArgs* weights, int count, cudaStream_t stream) {
  if (count > 0 && is_float8(weights[0].out_dtype))
    return launch_pack8<ReadMasks>(weights, count, stream, "pack_by_mask");
  launch_pack<ReadMasks>(weights, count, stream, "pack_by_mask");
}

}  // namespace sparse24::cuda
