// current_arch.h: whose kernels run on the current device (kernel_arch.h).
#pragma once

#include <array>
#include <atomic>

#include "common/cuda_check.h"
#include "common/kernel_arch.h"

namespace sparse24 {

/// Asked for once a device: what it reads costs microseconds.
inline KernelArch current_arch() {
  static std::array<std::atomic<int>, 64> known{};  // 1 + the answer
  int device = 0;
  SP24_CHECK_CUDA(cudaGetDevice(&device));
  const bool cached = device < static_cast<int>(known.size());
  if (cached) {
    if (const int answer = known[device].load(std::memory_order_relaxed))
      return static_cast<KernelArch>(answer - 1);
  }
  int major = 0, minor = 0;
  SP24_CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  SP24_CHECK_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const KernelArch arch = kernel_arch(major, minor, asked_arch());
  if (cached) known[device].store(static_cast<int>(arch) + 1, std::memory_order_relaxed);
  return arch;
}

}  // namespace sparse24
