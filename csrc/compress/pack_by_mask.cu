// pack_by_mask.cu: packing by given masks; what every optimizer step runs. The kernels are in
// pack_rows.cuh and pack_tile.cuh.
#include "compress/compress_cuda.h"
#include "compress/pack_launch.cuh"

namespace sparse24::cuda {

void pack_by_mask(const PackArgs* weights, int count, cudaStream_t stream) {
  launch_pack<ReadMasks>(weights, count, stream, "pack_by_mask");
}

}  // namespace sparse24::cuda
