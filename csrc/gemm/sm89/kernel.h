// kernel.h: kernels that sm_89 has beside those of sm_80: the same code for operands of 8 bits.
#pragma once

#include "gemm/sm80/kernel.h"
#include "gemm/sm89/launch.h"

/// The body of a generated file: the launcher of one row of kernels.def.
#undef SP24_DEFINE_GEMM_KERNEL
#define SP24_DEFINE_GEMM_KERNEL(lhs, rhs, format, ...)                                         \
  namespace sparse24::gemm::sm89 {                                                             \
  struct SP24_SM80_NAME(lhs, rhs, format, __VA_ARGS__);                                        \
  void SP24_SM80_LAUNCHER(lhs, rhs, format, __VA_ARGS__)(const SparseGemmArgs& args,           \
                                                         const GemmConfig& config,             \
                                                         const Target& target) {               \
    sm80::SparseGemm<SP24_SM80_NAME(lhs, rhs, format, __VA_ARGS__), Orientation::k##lhs,       \
                     Orientation::k##rhs, DType::k##format, __VA_ARGS__>::launch(args, config, \
                                                                                 target);      \
  }                                                                                            \
  }
