#include "gemm/sm90/kernel.h"

SP24_DEFINE_GEMM_KERNEL(Forward, BFloat16, Float32, 128, 256, 64, 2, 1)
