// launch.h: names of the kernels and of the launchers that the generated files define, one for
// each row of kernels.def.
#pragma once

#include "gemm/arch.h"

// As in cmake/allowed_spills.txt.
#define SP24_SM80_NAME(lhs, rhs, format, tile_m, tile_n, tile_k) \
  lhs##_##rhs##_##format##_##tile_m##_##tile_n##_##tile_k

#define SP24_SM80_LAUNCHER(lhs, rhs, format, tile_m, tile_n, tile_k) \
  launch_##lhs##_##rhs##_##format##_##tile_m##x##tile_n##x##tile_k

namespace sparse24::gemm::sm80 {

#define SP24_GEMM_KERNEL(...) Launcher SP24_SM80_LAUNCHER(__VA_ARGS__);
#include "gemm/sm80/kernels.def"
#undef SP24_GEMM_KERNEL

}  // namespace sparse24::gemm::sm80
