// arch.cpp: the list of architectures.
#include "gemm/arch.h"

#include "common/check.h"

namespace sparse24::gemm {
namespace {

const GemmArch* const kArchs[] = {&kSm90};

}  // namespace

std::string arch_names() {
  std::string names;
  for (const GemmArch* arch : kArchs)
    names += (names.empty() ? "" : ", ") + std::string(arch->name);
  return names;
}

const GemmArch* arch_of(int major, int minor) {
  for (const GemmArch* arch : kArchs)
    if (arch->major == major && arch->minor == minor) return arch;
  return nullptr;
}

std::string no_arch_reason(int major, int minor) {
  return concat("the GPU is sm_", major, minor, ", and sparse GEMM kernels are built for ",
                arch_names());
}

}  // namespace sparse24::gemm
