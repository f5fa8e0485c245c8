// device.cpp: public functions of device.h.
#include "sparse24/device.h"

#include "api/dispatch.h"
#include "common/check.h"
#include "cpu/parallel.h"

#ifdef SPARSE24_WITH_CUDA
#include <cuda_runtime_api.h>

#include "common/kernel_arch.h"
#include "gemm/arch.h"
#endif

namespace sparse24 {
namespace {

#ifdef SPARSE24_WITH_CUDA

/// Why kernels do not run on a GPU ("" if they do), by what was built and what SPARSE24_ARCH asks
/// for: first the products, then the kernels around them.
std::string no_kernels_reason(gemm::Capability gpu) {
  try {
    const gemm::Capability chosen = gemm::chosen_capability(gpu);
    if (gemm::arch_of(chosen) == nullptr) return gemm::no_arch_reason(chosen);
  } catch (const Error& error) {
    return error.what();
  }
  if (has_code_for(gpu.major, gpu.minor, SPARSE24_CUDA_ARCHS)) return "";
  return concat("the GPU is sm_", gpu.major, gpu.minor, ", and libsparse24 was built for ",
                SPARSE24_CUDA_ARCHS, " alone; build it with SPARSE24_CUDA_ARCHS=all, or on this ",
                "machine");
}

/// Fills in what the driver says. Attributes are read without creating a context on the device.
void ask_driver(int device, DeviceInfo& info) {
  const auto failed = [&](cudaError_t status, const char* what) {
    if (status == cudaSuccess) return false;
    cudaGetLastError();  // clear it: a missing driver is an answer, and no error of a later launch
    info.reason = concat(what, ": ", cudaGetErrorString(status));
    return true;
  };
  if (failed(cudaGetDeviceCount(&info.device_count), "no usable NVIDIA driver or GPU")) {
    info.device_count = 0;
    return;
  }
  if (device >= info.device_count) {
    info.reason =
        concat("there is no CUDA device ", device, "; the driver shows ", info.device_count);
    return;
  }
  const auto attribute = [&](int* value, cudaDeviceAttr which) {
    return !failed(cudaDeviceGetAttribute(value, which, device), "cudaDeviceGetAttribute");
  };
  if (!attribute(&info.capability_major, cudaDevAttrComputeCapabilityMajor) ||
      !attribute(&info.capability_minor, cudaDevAttrComputeCapabilityMinor) ||
      !attribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount)) {
    return;
  }
  int clock_khz = 0, bus_bits = 0;
  if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, device) == cudaSuccess) {
    info.memory_bandwidth = 2.0 * clock_khz * 1e3 * bus_bits / 8;  // two transfers a clock
  } else {
    cudaGetLastError();  // clear it: the bandwidth stays unknown, 0
  }
  if (info.reason.empty())
    info.reason = no_kernels_reason({info.capability_major, info.capability_minor});
}

#endif

}  // namespace

const char* version() { return SPARSE24_VERSION; }

DeviceInfo device_info(int device) {
  DeviceInfo info;
#ifdef SPARSE24_WITH_CUDA
  info.cuda_built = true;
  info.cuda_archs = SPARSE24_CUDA_ARCHS;
  info.gemm_archs = gemm::arch_names();
  if (device >= 0) {
    ask_driver(device, info);
  } else {
    info.reason = "no device was named";
  }
#else
  static_cast<void>(device);
  info.reason = api::kWithoutCuda;
#endif
  return info;
}

void set_cpu_threads(int threads) { cpu::set_threads(threads); }

}  // namespace sparse24
