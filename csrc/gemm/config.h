// config.h: which sparse GEMM kernel runs a product, and how. Pure host code: no CUDA, no CUTLASS;
// tested without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sparse24/gemm.h"

namespace sparse24::gemm {

struct GemmArch;  // arch.h

/// What a product asks for; orientations follow from pass and format.
struct GemmDesc {
  GemmPass pass;
  GemmEpilogue epilogue;
  int64_t m, n, k;
  DType format, out_dtype;
  Accumulation accumulation = Accumulation::kFast;  // never kAuto
};

/// A product of these arguments, with kAuto resolved.
GemmDesc describe(const SparseGemmArgs& args);

/// Strips of the walk over tiles go along this extent (scheduler.h).
enum class Raster : int { kAlongM, kAlongN };

/// How a kernel computes it. The first fields pick a compiled kernel; the rest are run-time
/// choices.
struct GemmConfig {
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  Accumulation accumulation;
  Raster raster;
  int strip;      // width of a strip, in clusters
  bool stream_k;  // share out the last wave along k (stream_k.h)
};

/// One row of an architecture's table of compiled kernels (kernels.def).
struct KernelEntry {
  GemmPass pass;
  GemmEpilogue epilogue;
  DType format, out_dtype;
  Accumulation accumulation;
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
};

/// Whether any kernel of an architecture computes this product.
bool is_compiled(const GemmArch& arch, const GemmDesc& desc);

/// The row of the kernel that a config names. Throws Error where none computes this product.
int row_of(const GemmArch& arch, const GemmDesc& desc, const GemmConfig& config);

/// The config for a product on a GPU of `multiprocessors`, among the compiled ones. Throws Error
/// where none fits.
GemmConfig choose_config(const GemmArch& arch, const GemmDesc& desc, int multiprocessors);

/// What a tuner may try: choose_config's first, then others that may be better.
std::vector<GemmConfig> candidate_configs(const GemmArch& arch, const GemmDesc& desc,
                                          int multiprocessors);

/// A config as one positive number, and back. Throws Error where the number names no compiled
/// kernel of this product.
int64_t encode(const GemmArch& arch, const GemmDesc& desc, const GemmConfig& config);
GemmConfig decode(const GemmArch& arch, const GemmDesc& desc, int64_t code);

/// Blocks of a stream-K launch: one a multiprocessor, in whole clusters.
int stream_k_blocks(const GemmConfig& config, int multiprocessors);

/// Its workspace: a flag for each multiplying warpgroup of a block, then a tile of fp32 sums for
/// each block.
inline int64_t stream_k_flag_bytes(int blocks) {
  return (blocks * int64_t{2 * 4} + 255) / 256 * 256;
}
int64_t workspace_bytes(const GemmConfig& config, int multiprocessors);

std::string to_string(const GemmDesc& desc);
std::string to_string(const GemmConfig& config);
const char* name_of(GemmPass pass);
const char* name_of(GemmEpilogue epilogue);

}  // namespace sparse24::gemm
