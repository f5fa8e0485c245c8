#include "gemm/sm90/kernel.h"

SP24_DEFINE_GEMM_KERNEL(ActivatedForward, BFloat16, BFloat16, 128, 256, 64, 2, 1)
