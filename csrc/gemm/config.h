// config.h: which sparse GEMM kernel runs a product. Pure host code: no CUDA, no CUTLASS; tested
// without a GPU.
#pragma once

#include <cstdint>
#include <string>

#include "sparse24/gemm.h"

namespace sparse24::gemm {

/// What a product asks for; layouts follow from the pass.
struct GemmDesc {
  GemmPass pass;
  int64_t m, n, k;
  DType dtype, out_dtype;
};

enum class Raster : int { kAlongM, kAlongN };

/// How a kernel computes it. The tile and the cluster pick a compiled kernel; the rest are run-time
/// choices.
struct GemmConfig {
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  Raster raster;
  int swizzle;  // clusters a strip of the raster walk is wide
};

/// One row of the table of compiled kernels (kernels.def).
struct KernelEntry {
  GemmPass pass;
  DType dtype, out_dtype;
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
};

/// The table that the heuristic, the build and the tests read.
const KernelEntry* kernel_table(int* count);

/// The config for a product on a GPU of `multiprocessors`, among the compiled ones. Throws Error
/// where none fits.
GemmConfig choose_config(const GemmDesc& desc, int multiprocessors);

std::string to_string(const GemmDesc& desc);
std::string to_string(const GemmConfig& config);
const char* name_of(GemmPass pass);

}  // namespace sparse24::gemm
