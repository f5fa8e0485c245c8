// launch.h: names of the kernels and of the launchers that the generated files define, one for
// each row of kernels.def.
#pragma once

#include "gemm/arch.h"

// As in cmake/allowed_spills.txt.
#define SP24_GEMM_NAME(pass, epilogue, format, out_dtype, accumulation, tile_m, tile_n, tile_k, \
                       cluster_m, cluster_n)                                                    \
  pass##_##epilogue##_##format##_##out_dtype##_##accumulation##_##tile_m##_##tile_n##_##tile_k##_##cluster_m##_##cluster_n

#define SP24_GEMM_LAUNCHER(pass, epilogue, format, out_dtype, accumulation, tile_m, tile_n, \
                           tile_k, cluster_m, cluster_n)                                    \
  launch_##pass##_##epilogue##_##format##_##out_dtype##_##accumulation##_##tile_m##x##tile_n##x##tile_k##_c##cluster_m##x##cluster_n

namespace sparse24::gemm::sm90 {

#define SP24_GEMM_KERNEL(...) Launcher SP24_GEMM_LAUNCHER(__VA_ARGS__);
#include "gemm/sm90/kernels.def"
#undef SP24_GEMM_KERNEL

}  // namespace sparse24::gemm::sm90
