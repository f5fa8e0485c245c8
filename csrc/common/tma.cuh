// tma.cuh: boxes of a matrix between global and shared memory by the copy engine of Hopper.
// Code for other GPUs must not get here: activation/tile_copies.cuh chooses.
//
// A matrix is a number of lines, each contiguous: rows of a row-major one, columns of a
// column-major one. A box is `box_lines` lines of `box_along` elements; in shared memory they lie
// one behind the other. One thread orders the copy of a whole box. What a box has outside of the
// matrix is read as zero, and not written.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/check.h"
#include "common/cuda_check.h"

namespace sparse24 {

using TensorMap = CUtensorMap;

/// The driver's function that encodes a TensorMap: libcuda is not linked, so that the library loads
/// where there is no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    SP24_CHECK_CUDA(
        cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found));
#else
    SP24_CHECK_CUDA(cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found));
#endif
    SP24_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr, "the driver has no ",
               kName, "; it must be one for CUDA 12 or later");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

/// `data` and `line_bytes` are multiples of 16; box extents at most 256.
inline TensorMap make_tensor_map(const void* data, int element_bytes, int64_t along, int64_t lines,
                                 int64_t line_bytes, uint32_t box_along, uint32_t box_lines) {
  TensorMap map;
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(along), static_cast<cuuint64_t>(lines)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(line_bytes)};
  const cuuint32_t box[2] = {box_along, box_lines}, steps[2] = {1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, element_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_UINT32 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(data), extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SP24_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled of ", lines, " lines of ", along,
             " elements, ", line_bytes, " bytes apart: CUDA reports error ",
             static_cast<int>(status));
  return map;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A barrier in shared memory that completes when the bytes that one thread announced have arrived.
__device__ __forceinline__ void start_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // seen by the copy engine
}
__device__ __forceinline__ void announce_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Waits until the barrier completes for the first time.
__device__ __forceinline__ void wait_for_bytes(uint64_t* barrier) {
  asm volatile(
      "{\n .reg .pred done;\n wait:\n"
      " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n @!done bra wait;\n}" ::"r"(
          shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void load_box(void* to, const TensorMap& map, uint64_t* barrier,
                                         int along, int line) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(along), "r"(line)
      : "memory");
}

/// What threads wrote to shared memory must be fenced, by each of them, before a box is stored.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void store_box(const TensorMap& map, const void* from, int along,
                                          int line) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(from)), "r"(along), "r"(line)
      : "memory");
}
/// Waits until this thread's stores have read shared memory, which is gone when a block ends.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace sparse24
