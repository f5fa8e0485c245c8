#include "gemm/sm90/kernel.h"

SP24_DEFINE_GEMM_KERNEL(GatedForward, Float16, Float16, 128, 256, 64, 2, 1)
