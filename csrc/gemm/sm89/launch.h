// launch.h: names of the launchers that the generated files define, one for each row of
// kernels.def.
#pragma once

#include "gemm/sm80/launch.h"

namespace sparse24::gemm::sm89 {

#define SP24_GEMM_KERNEL(...) Launcher SP24_SM80_LAUNCHER(__VA_ARGS__);
#include "gemm/sm89/kernels.def"
#undef SP24_GEMM_KERNEL

}  // namespace sparse24::gemm::sm89
