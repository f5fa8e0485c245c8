// cuda_check.h: CUDA calls and launches that fail become sparse24::Error; work runs on the device
// of its tensors.
#pragma once

#include <cuda_runtime_api.h>

#include "common/check.h"

namespace sparse24 {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) cudaGetLastError();  // clear it: the next launch must not report it
  SP24_CHECK(status == cudaSuccess, what, ": CUDA reports ", cudaGetErrorName(status), " (",
             cudaGetErrorString(status), ")");
}

/// Makes `device` current for its own lifetime, so that an op runs where its tensors are.
///
/// A thread that has made no CUDA call yet, such as autograd's, reports a current device but has no
/// context, and encoding a TMA descriptor needs one: the first guard of a thread sets its device
/// even where it is the right one already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    thread_local bool has_context = false;
    if (previous_ == device && has_context) return;
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    has_context = true;
    changed_ = previous_ != device;
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
#define SP24_CHECK_LAUNCH(...)                                                   \
  do {                                                                           \
    const cudaError_t launched = cudaGetLastError();                             \
    if (launched != cudaSuccess)                                                 \
      ::sparse24::check_cuda(launched, ::sparse24::concat(__VA_ARGS__).c_str()); \
  } while (false)
