// kernel_arch.h: whose kernels run on a GPU, where they differ: those of Hopper, or those of sm_80,
// which every later GPU can run.
//
// The environment variable SPARSE24_ARCH=sm80 asks for the latter on a Hopper GPU too: that is how
// they are tested.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

#include "common/check.h"

// Which the build has: cmake/CudaTargets.cmake says where one is missing.
#ifndef SPARSE24_BUILT_SM80
#define SPARSE24_BUILT_SM80 1
#endif
#ifndef SPARSE24_BUILT_SM89  // products of 8 bits for sm_89
#define SPARSE24_BUILT_SM89 1
#endif
#ifndef SPARSE24_BUILT_SM90
#define SPARSE24_BUILT_SM90 1
#endif

namespace sparse24 {

enum class KernelArch { kSm80, kSm90 };

constexpr bool kBuiltSm80 = SPARSE24_BUILT_SM80 != 0, kBuiltSm90 = SPARSE24_BUILT_SM90 != 0;

/// What SPARSE24_ARCH says; "" if nothing.
inline std::string asked_arch() {
  const char* asked = std::getenv("SPARSE24_ARCH");
  return asked == nullptr ? "" : asked;
}

/// Whose kernels run on a GPU of this compute capability, where SPARSE24_ARCH says `asked`.
inline KernelArch kernel_arch(int major, int minor, const std::string& asked,
                              bool built_sm80 = kBuiltSm80, bool built_sm90 = kBuiltSm90) {
  const bool hopper = major == 9 && minor == 0;
  const bool older = asked == "sm80" || asked == "sm86" || asked == "sm89";
  SP24_CHECK(asked.empty() || older || asked == "sm90",
             "SPARSE24_ARCH must be sm80, sm86, sm89 or sm90, got '", asked,
             "'; unset it to go by the GPU");
  SP24_CHECK(asked != "sm90" || hopper,
             "SPARSE24_ARCH=sm90 needs a GPU of compute capability 9.0, ", "this one has ", major,
             ".", minor, "; unset it to go by the GPU");
  const bool sm90 = hopper && !older && (built_sm90 || !asked.empty());
  SP24_CHECK(sm90 ? built_sm90 : built_sm80, "libsparse24 was built without kernels for ",
             sm90 ? "sm_90a" : "GPUs other than sm_90a", "; build it with SPARSE24_CUDA_ARCHS=all",
             asked.empty() ? "" : ", or unset SPARSE24_ARCH");
  return sm90 ? KernelArch::kSm90 : KernelArch::kSm80;
}

/// Has a build for `archs` (SPARSE24_CUDA_ARCHS, such as "80, 90a, 89-virtual") code that a GPU of
/// this compute capability runs? Real code runs from its minor version on, that with an `a` on one
/// GPU alone, PTX on all later ones.
inline bool has_code_for(int major, int minor, const std::string& archs) {
  std::istringstream words(archs);
  for (std::string arch; words >> arch;) {
    const int number = std::atoi(arch.c_str()), of_gpu = 10 * major + minor;
    const bool virtual_arch = arch.find("-virtual") != std::string::npos;
    const bool exact = arch.find('a') == 2 && !virtual_arch;
    if (exact ? number == of_gpu : number <= of_gpu && (virtual_arch || number / 10 == major))
      return true;
  }
  return false;
}

}  // namespace sparse24
