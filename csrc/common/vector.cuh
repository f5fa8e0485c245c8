// vector.cuh: memory accesses of up to 16 bytes with the cache hints that streaming kernels want.
//
// Loads do not allocate in L1: each byte is used by one thread, once. They stay ordinary (coherent)
// loads, because some callers update in place. Stores are plain: what a kernel writes here is what
// the next GEMM reads, possibly from L2. The loads are volatile so that a batch of them stays
// together, in front of the arithmetic that waits for them.
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

__device__ __forceinline__ void store16(void* address, uint4 v) {
  *static_cast<uint4*>(address) = v;
}
__device__ __forceinline__ void store8(void* address, uint2 v) {
  *static_cast<uint2*>(address) = v;
}

}  // namespace sparse24
