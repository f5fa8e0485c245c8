// warpgroup.h: what the epilogues share: a thread's place in a wgmma accumulator, a warpgroup's
// barrier, and the store of a staged box.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/cutlass.h"
#include "cutlass/numeric_conversion.h"

namespace sparse24::gemm::sm90 {

constexpr int kWarpgroupRows = 64;  // of a wgmma accumulator
constexpr int kMultiplyingWarpgroups = 2;

/// A thread's place in the 64 x 8 blocks of an accumulator: rows row and row + 8, columns column
/// and column + 1.
struct AccumulatorPlace {
  int lane, warp, row, column;
  bool is_first;
  CUTLASS_DEVICE explicit AccumulatorPlace(int thread)  // of the warpgroup
      : lane(thread % 32),
        warp(thread / 32),
        row(thread / 32 * 16 + lane / 4),
        column(lane % 4 * 2),
        is_first(thread == 0) {}
};

/// This thread's number in its block, read anew. What is derived from a number kept since the
/// kernel's start lives in the epilogue too, where registers are few: it would be spilled there,
/// and loaded again in every K tile.
CUTLASS_DEVICE int thread_in_block() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

/// A value of which the compiler does not know where it comes from: what is derived from it is
/// computed after this place, and not together with the same of all other batches, which would
/// spill.
template <typename T>
CUTLASS_DEVICE const T* computed_here(const T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
CUTLASS_DEVICE int computed_here(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// Of both operands, in device memory; null: 1.
struct Scales {
  const float* lhs = nullptr;
  const float* rhs = nullptr;
  CUTLASS_DEVICE float product() const {
    return (lhs == nullptr ? 1.0f : *lhs) * (rhs == nullptr ? 1.0f : *rhs);
  }
};

/// The hardware's barriers 0 and 1: each warpgroup's own. 0 is that of __syncthreads too, which
/// nothing calls once the warps have their roles; CUTLASS' NamedBarrier counts from 8. The compiler
/// moves no memory access past this one, as it might past those.
CUTLASS_DEVICE void synchronize_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, %1;" ::"r"(warpgroup), "n"(cutlass::NumThreadsPerWarpGroup)
               : "memory");
}

/// By one thread: a staged box to its place in an output.
template <typename Element, typename SmemLayout, typename TmaCopy, typename GlobalBox>
CUTLASS_DEVICE void store_box(const TmaCopy& tma, char* from, const GlobalBox& to) {
  using namespace cute;
  const auto block = tma.get_slice(_0{});
  const Tensor smem = make_tensor(make_smem_ptr(reinterpret_cast<Element*>(from)), SmemLayout{});
  copy(tma, block.partition_S(smem), block.partition_D(to));
}

/// Two values, rounded, in one word.
template <typename Output>
CUTLASS_DEVICE uint32_t pack_pair(const float (&pair)[2]) {
  const cutlass::Array<float, 2> two{pair[0], pair[1]};
  const auto rounded = cutlass::NumericArrayConverter<Output, float, 2>{}(two);
  return reinterpret_cast<const uint32_t&>(rounded);
}

}  // namespace sparse24::gemm::sm90
