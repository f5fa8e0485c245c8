// memory_kernels_main.h: main() of the programs that compare kernels with the CPU backend byte by byte.
//
//   --quick        all shapes, layouts and dtypes, but few of their combinations
//   --tight        no guards and no poison around buffers: for compute-sanitizer
//   --bench        besides, times kernels; --bench-only: nothing but that
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>

#include "common/current_arch.h"
#include "twins.h"

namespace gpu_testing {

/// Exit status 0, 1 (failures) or 77 (no GPU).
inline int run_program(int argc, char** argv, std::initializer_list<void (*)()> tests,
                       void (*benchmarks)() = nullptr) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU here\n");
    return 77;
  }
  const auto asked = [&](const char* name) {
    for (int i = 1; i < argc; ++i)
      if (std::strcmp(argv[i], name) == 0) return true;
    return false;
  };
  if (asked("--tight")) guard = 0;
  quick = asked("--quick");
  try {
    const bool hopper = current_arch() == KernelArch::kSm90;
    std::printf("kernels of %s\n", hopper ? "sm_90a" : "sm_80");
    if (!asked("--bench-only")) {
      for (const auto test : tests) test();
      std::printf("%lld checks, %d failures\n", static_cast<long long>(checks), failures);
    }
    if (benchmarks != nullptr && (asked("--bench") || asked("--bench-only"))) benchmarks();
  } catch (const std::exception& error) {
    fail("exception: ", error.what());
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace gpu_testing
