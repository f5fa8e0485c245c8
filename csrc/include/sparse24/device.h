// device.h: what was built, and what the machine has.
#pragma once

#include <string>

#include "sparse24/types.h"

namespace sparse24 {

SP24_API const char* version();

struct DeviceInfo {
  bool cuda_built = false;   // was this library compiled with CUDA?
  std::string cuda_archs;    // GPUs that kernels were compiled for, such as "80, 90a"; "" without CUDA
  std::string gemm_archs;    // architectures with sparse GEMM kernels, such as "sm_90a"; "" without CUDA
  int device_count = 0;      // 0 without a driver, and when device < 0
  int capability_major = 0;  // of `device`
  int capability_minor = 0;
  int multiprocessors = 0;
  double memory_bandwidth = 0;  // bytes a second that its memory bus could move; 0 where the driver does not say
  std::string reason;           // why the sparse kernels cannot run on `device`; "" if they can
};
/// Never throws for a missing driver or GPU: it says so in `reason`. With device < 0 it tells only what was built and does
/// not call the driver at all: a process may still fork after that.
SP24_API DeviceInfo device_info(int device);

/// Threads that the CPU backend may use for one op (default 1).
SP24_API void set_cpu_threads(int threads);

}  // namespace sparse24
