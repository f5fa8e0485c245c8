// arch.cpp: the list of architectures.
#include "gemm/arch.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "common/check.h"
#include "common/kernel_arch.h"

namespace sparse24::gemm {
namespace {

// What products of 8 bits for sm_89 were compiled for (cmake/CudaTargets.cmake).
#ifdef SPARSE24_FLOAT8_ARCHS
constexpr const char* kFloat8Archs = SPARSE24_FLOAT8_ARCHS;
#else
constexpr const char* kFloat8Archs = "";
#endif

constexpr Capability kNone{};

std::vector<const GemmArch*> built() {
  std::vector<const GemmArch*> archs;
  for (const GemmArch* arch : {&kSm80, &kSm89, &kSm90})
    if (arch->is_built) archs.push_back(arch);
  return archs;
}

bool runs(const GemmArch& arch, Capability gpu) {
  const auto end = std::end(arch.capabilities);
  return !(gpu == kNone) && std::find(std::begin(arch.capabilities), end, gpu) != end;
}

Capability asked_capability(Capability gpu, const std::string& asked) {
  kernel_arch(gpu.major, gpu.minor, asked);  // throws where it is none
  SP24_CHECK(gpu.major >= 8, "SPARSE24_ARCH=", asked,
             " needs a GPU of compute capability 8.0 or later, this one has ", gpu.major, ".",
             gpu.minor, "; unset it to go by the GPU");
  return {asked[2] - '0', asked[3] - '0'};
}

std::string name_of(Capability gpu) { return concat("sm_", gpu.major, gpu.minor); }

}  // namespace

std::string arch_names() {
  std::string names;
  for (const GemmArch* arch : built()) {
    std::string own = arch->name;
    for (const Capability also : arch->capabilities)
      if (!(also == kNone) && own.rfind(name_of(also), 0) != 0) own += ", " + name_of(also);
    names += (names.empty() ? "" : ", ") + own;
  }
  return names;
}

const GemmArch* arch_of(Capability gpu) {
  for (const GemmArch* arch : built())
    if (runs(*arch, gpu)) return arch;
  return nullptr;
}

std::string no_arch_reason(Capability gpu) {
  const char* blackwell =
      gpu.major >= 10 ? "; Blackwell's tensor cores read other instructions (tcgen05.mma.sp), for "
                        "which there are no kernels yet"
                      : "";
  return concat("the GPU is ", name_of(gpu), ", and sparse GEMM kernels are built for ",
                arch_names(), blackwell);
}

Capability chosen_capability(Capability gpu) {
  return chosen_capability(gpu, asked_arch(), kFloat8Archs);
}

Capability chosen_capability(Capability gpu, const std::string& asked,
                             const std::string& float8_archs) {
  const Capability chosen = asked.empty() ? gpu : asked_capability(gpu, asked);
  const bool ada = chosen == Capability{8, 9};
  return ada && !has_code_for(gpu.major, gpu.minor, float8_archs) ? Capability{8, 6} : chosen;
}

int shared_bytes_of(Capability gpu) {
  if (gpu.major == 8) return (gpu.minor == 0 ? 163 : 99) * 1024;
  return gpu.major < 8 ? 48 * 1024 : 227 * 1024;
}

}  // namespace sparse24::gemm
