// cuda_check.h: CUDA calls and launches that fail become sparse24::Error; work runs on the device of its tensors.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace sparse24 {

inline void check_cuda(cudaError_t status, const char* what) {
  SP24_CHECK(status == cudaSuccess, what, ": CUDA reports ", cudaGetErrorName(status), " (",
             cudaGetErrorString(status), ")");
}

/// Makes `device` current for its own lifetime, so that an op runs where its tensors are.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace sparse24

#define SP24_CHECK_CUDA(call) ::sparse24::check_cuda((call), #call)
/// After each launch: `what` names the op and its shapes.
#define SP24_CHECK_LAUNCH(...) \
  ::sparse24::check_cuda(cudaGetLastError(), ::sparse24::concat(__VA_ARGS__).c_str())
