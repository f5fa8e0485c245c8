#include "gemm/sm90/kernel.h"

SP24_DEFINE_GEMM_KERNEL(GradWeight, BFloat16, Float32, 128, 192, 64, 2, 1)
