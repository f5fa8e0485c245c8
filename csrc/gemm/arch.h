// arch.h: what a GPU architecture offers to the sparse GEMM: one object each, in a list that the
// choice of kernels, the launch and the device query all read. Pure host code.
#pragma once

#include <string>

#include "gemm/config.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm {

/// Where a kernel is launched; `stream` is a cudaStream_t.
struct Target {
  int device, multiprocessors;
  void* stream;
};

/// Launches one compiled kernel.
using Launcher = void(const SparseGemmArgs& args, const GemmConfig& config, const Target& target);

/// What a tile of a kernel costs, in cycles.
struct TileCost {
  double k_tile;  // a step along k
  double store;   // what shows of the epilogue
};

struct GemmArch {
  const char* name;            // such as "sm_90a"
  int major, minor;            // the compute capability that runs its kernels: this one alone
  const KernelEntry* kernels;  // its kernels.def
  int count;                   // of kernels
  Launcher* const* launchers;  // one a kernel; null in a build without CUDA
  TileCost (*cost)(const KernelEntry& kernel);
  /// Why its kernels cannot take these arguments, beyond there being none ("" if they can).
  std::string (*unsupported)(const SparseGemmArgs& args);
};

/// All that were built, separated by commas.
std::string arch_names();

/// The one whose kernels run on a GPU of this compute capability, or null.
const GemmArch* arch_of(int major, int minor);

/// Why none does: "the GPU is sm_80, and ...".
std::string no_arch_reason(int major, int minor);

extern const GemmArch kSm90;

}  // namespace sparse24::gemm
