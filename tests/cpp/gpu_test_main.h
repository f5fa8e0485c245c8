// gpu_test_main.h: main() of a program of GPU tests: arguments choose tests by name; one line a
// test, a summary at the end; exit status 0, 1 (failures) or 77 (no GPU with kernels).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "gemm/arch.h"
#include "gemm_problems.h"

namespace gpu_testing {

struct NamedTest {
  const char* name;
  void (*run)();
  bool only_by_name = false;  // not part of a run of all
};

inline bool has_kernels(const gemm::GemmArch* arch, bool of_8_bits) {
  return arch != nullptr && std::any_of(arch->kernels, arch->kernels + arch->count,
                                        [&](const gemm::KernelEntry& entry) {
                                          return is_float8(entry.format) || !of_8_bits;
                                        });
}

/// of_8_bits: the tests are of products that only some architectures have.
inline int run_gpu_tests(const std::vector<NamedTest>& tests, int count, char** arguments,
                         bool of_8_bits = false) {
  int devices = 0;
  cudaDeviceProp properties;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0 ||
      cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("skipped: no GPU\n");
    return 77;
  }
  gemm::Capability gpu;
  try {
    gpu = gemm::chosen_capability({properties.major, properties.minor});
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  if (!has_kernels(gemm::arch_of(gpu), of_8_bits)) {
    std::printf(
        "skipped: %s%s\n",
        of_8_bits ? "products of 8 bits need an Ada or Hopper GPU, and a build for it; " : "",
        gemm::no_arch_reason(gpu).c_str());
    return 77;
  }
  int ran = 0;
  for (const NamedTest& test : tests) {
    const bool named =
        std::find(arguments + 1, arguments + count, std::string(test.name)) != arguments + count;
    if (!named && (count > 1 || test.only_by_name)) continue;
    ++ran;
    const auto begin = std::chrono::steady_clock::now();
    const int before = failures;
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.name, " threw: ", error.what());
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("%s %s, %.1f s\n", failures == before ? "ok  " : "FAIL", test.name, seconds);
    std::fflush(stdout);
  }
  std::printf("%lld cases, %d failed, on %s by kernels for sm_%d%d\n",
              static_cast<long long>(cases), failures, properties.name, gpu.major, gpu.minor);
  return failures == 0 && ran > 0 ? 0 : 1;
}

}  // namespace gpu_testing
