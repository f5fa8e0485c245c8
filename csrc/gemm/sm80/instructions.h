// instructions.h: the instructions of sm_80 that the kernels are made of.
#pragma once

#include <cstdint>

#include "cutlass/cutlass.h"
#include "sparse24/types.h"

namespace sparse24::gemm::sm80 {

/// This thread's number in its block, read anew: what the epilogue and the start of a part derive
/// from it is not worked out before the main loop, where it would be spilled.
CUTLASS_DEVICE int thread_in_block() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

CUTLASS_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// 16 bytes to shared memory, of which the first `bytes` are read and the rest are zeros. L2 gets
/// the whole line: its other half is wanted soon.
CUTLASS_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
CUTLASS_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
CUTLASS_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices of 16 bits; kTranspose: each of them transposed.
template <bool kTranspose>
CUTLASS_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t from) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

CUTLASS_DEVICE void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

/// A word that nothing writes while the kernel runs. In this place among the other instructions: it
/// is used long after.
CUTLASS_DEVICE uint32_t load_constant(const void* from) {
  uint32_t word;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(from));
  return word;
}

// Positions in rising order are what newer hardware is quick with; the word came with PTX 8.5.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define SP24_MMA_SP_SHAPE(shape) "mma.sp::ordered_metadata.sync.aligned." shape ".row.col.f32."
#else
#define SP24_MMA_SP_SHAPE(shape) "mma.sp.sync.aligned." shape ".row.col.f32."
#endif
#define SP24_MMA_SP SP24_MMA_SP_SHAPE("m16n8k32")
#define SP24_MMA_SP_OF(types, selector)                                                        \
  asm volatile(SP24_MMA_SP types                                                               \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                 \
               "{%0, %1, %2, %3}, %12, " selector ";"                                          \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                    \
               : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "r"(rhs[0]), "r"(rhs[1]), \
                 "r"(rhs[2]), "r"(rhs[3]), "r"(meta))

/// sums (16 x 8) += lhs (16 x 32, 2:4) rhs (32 x 8); the words of `meta` that count are those of
/// the first or second two lanes of each four.
template <DType kFormat, int kSelector>
CUTLASS_DEVICE void multiply_sparse(float (&sums)[4], const uint32_t (&lhs)[4],
                                    const uint32_t (&rhs)[4], uint32_t meta) {
  static_assert(kFormat == DType::kBFloat16 || kFormat == DType::kFloat16);
  if constexpr (kFormat == DType::kBFloat16) {
    if constexpr (kSelector == 0) {
      SP24_MMA_SP_OF("bf16.bf16", "0x0");
    } else {
      SP24_MMA_SP_OF("bf16.bf16", "0x1");
    }
  } else {
    if constexpr (kSelector == 0) {
      SP24_MMA_SP_OF("f16.f16", "0x0");
    } else {
      SP24_MMA_SP_OF("f16.f16", "0x1");
    }
  }
}

/// product (16 x 8) = lhs (16 x 64, 2:4) rhs (64 x 8), of e4m3: all lanes' words of `meta` count.
/// For sm_89 and later alone.
CUTLASS_DEVICE void multiply_sparse8(float (&product)[4], const uint32_t (&lhs)[4],
                                     const uint32_t (&rhs)[4], uint32_t meta) {
  asm volatile(SP24_MMA_SP_SHAPE("m16n8k64") "e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9, %10, %11}, {%13, %13, %13, %13}, %12, 0x0;"
               : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
               : "r"(lhs[0]), "r"(lhs[1]), "r"(lhs[2]), "r"(lhs[3]), "r"(rhs[0]), "r"(rhs[1]),
                 "r"(rhs[2]), "r"(rhs[3]), "r"(meta), "f"(0.0f));
}
#undef SP24_MMA_SP_OF
#undef SP24_MMA_SP
#undef SP24_MMA_SP_SHAPE

}  // namespace sparse24::gemm::sm80
