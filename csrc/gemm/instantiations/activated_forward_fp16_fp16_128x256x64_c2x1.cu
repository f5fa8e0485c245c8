#include "gemm/sm90/kernel.h"

SP24_DEFINE_GEMM_KERNEL(ActivatedForward, Float16, Float16, 128, 256, 64, 2, 1)
