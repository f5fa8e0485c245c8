// arch.h: what a GPU architecture offers to the sparse GEMM: one object each, in a list that the
// choice of kernels, the launch and the device query all read. Pure host code.
#pragma once

#include <string>

#include "gemm/config.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm {

/// A compute capability.
struct Capability {
  int major = 0, minor = 0;
};
constexpr bool operator==(Capability a, Capability b) {
  return a.major == b.major && a.minor == b.minor;
}

/// Where a kernel is launched; `stream` is a cudaStream_t.
struct Target {
  int device, multiprocessors;
  int shared_bytes;  // that a block may have
  void* stream;
};

/// Launches one compiled kernel.
using Launcher = void(const SparseGemmArgs& args, const GemmConfig& config, const Target& target);

/// What a tile of a kernel costs, in cycles.
struct TileCost {
  double k_tile;  // a step along k
  double store;   // what shows of the epilogue
};

/// A product for which the formula (config.cpp) is more than 3 % off: its best config, as measured.
struct MeasuredChoice {
  GemmPass pass;
  int64_t m, n, k;
  int multiprocessors;
  int tile_n;
  Raster raster;
  int strip;
  bool stream_k;
};

struct GemmArch {
  const char* name;                // such as "sm_90a"
  Capability capabilities[3];      // that run its kernels; {0, 0} where there are fewer
  bool is_built;                   // in this library
  const KernelEntry* kernels;      // its kernels.def
  int count;                       // of kernels
  Launcher* const* launchers;      // one a kernel; null in a build without CUDA
  const MeasuredChoice* measured;  // of products of 16 bits
  int measured_count;
  TileCost (*cost)(const KernelEntry& kernel);
  /// Why its kernels cannot take these arguments, beyond there being none ("" if they can).
  std::string (*unsupported)(const SparseGemmArgs& args);
};

/// All that were built, separated by commas.
std::string arch_names();

/// The one whose kernels run on a GPU of this compute capability, or null.
const GemmArch* arch_of(Capability gpu);

/// Why none does: "the GPU is sm_75, and ...".
std::string no_arch_reason(Capability gpu);

/// The capability that kernels are chosen for: the GPU's own, or what SPARSE24_ARCH names
/// (common/kernel_arch.h), so that kernels of older GPUs run on newer ones. 8.9 becomes 8.6, which
/// differs in products of 8 bits alone, where no code for these was built that the GPU runs. Throws
/// Error where what was asked is none, or cannot be.
Capability chosen_capability(Capability gpu);
Capability chosen_capability(Capability gpu, const std::string& asked,  // "": nothing was asked
                             const std::string& float8_archs);

/// Shared memory that a block may have, in bytes.
int shared_bytes_of(Capability gpu);

extern const GemmArch kSm80;
extern const GemmArch kSm89;
extern const GemmArch kSm90;

}  // namespace sparse24::gemm
