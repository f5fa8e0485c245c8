// launch.h: names of the launchers that instantiations/ defines, one for each row of kernels.def.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm/config.h"

#define SP24_GEMM_LAUNCHER(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m, cluster_n) \
  launch_##pass##_##dtype##_##out_dtype##_##tile_m##x##tile_n##x##tile_k##_c##cluster_m##x##cluster_n

namespace sparse24::gemm {

using Launcher = void(const SparseGemmArgs& args, const GemmConfig& config, int device,
                      int multiprocessors, cudaStream_t stream);

#define SP24_GEMM_KERNEL(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m, cluster_n) \
  Launcher SP24_GEMM_LAUNCHER(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m, cluster_n);
#include "gemm/kernels.def"
#undef SP24_GEMM_KERNEL

}  // namespace sparse24::gemm
