// vector.cuh: memory accesses of up to 16 bytes with the cache hints that streaming kernels want.
//
// Two kinds of loads, because neither is always the faster one. The cached ones are plain: packing,
// MVUE and activations are 1 to 6 % faster with them (docs/kernels). load16 and load8 do not
// allocate in L1: the mask search alone, which writes next to nothing, is 8 % faster so. All stay
// ordinary (coherent) loads, because some callers update in place, and are volatile so that a batch
// of them stays together, in front of the arithmetic that waits for them. Stores are plain: what a
// kernel writes here is what the next GEMM reads, possibly from L2.
#pragma once

#include <cstdint>

namespace sparse24 {

__device__ __forceinline__ uint4 load16(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ uint2 load8(const void* address) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(address));
  return v;
}

__device__ __forceinline__ uint4 load16_cached(const void* address) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ uint2 load8_cached(const void* address) {
  uint2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

// Written out, because the compiler splits such a store in four where that spares it a move.
__device__ __forceinline__ void store16(void* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store8(void* address, uint2 v) {
  *static_cast<uint2*>(address) = v;
}
__device__ __forceinline__ void store4(void* address, uint32_t v) {
  *static_cast<uint32_t*>(address) = v;
}

/// 16 bytes of global memory (zeros, if `there` is false) into shared memory, past the L1 and the
/// registers.
__device__ __forceinline__ void copy16_async(void* shared, const void* address, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(address), "r"(there ? 16 : 0)
               : "memory");
}
/// Until all that this thread copies is there, for itself.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace sparse24
