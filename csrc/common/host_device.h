// host_device.h: per-block mathematics is written once, for CPU and GPU.
//
// Both sides are compiled without fast-math and without contraction of a*b + c into one rounding
// (-ffp-contract=off, --fmad=false), so the same function gives the same bits on both.
#pragma once

#if defined(__CUDACC__)
#define SP24_HD __host__ __device__ __forceinline__
#else
#define SP24_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
#define SP24_UNROLL _Pragma("unroll")
#else
#define SP24_UNROLL
#endif
