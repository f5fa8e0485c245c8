// config.cpp: the table of compiled kernels as data, and the choice among them.
#include "gemm/config.h"

#include "common/check.h"
#include "common/convert.h"

namespace sparse24::gemm {
namespace {

constexpr KernelEntry kTable[] = {
#define SP24_GEMM_KERNEL(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m, cluster_n) \
  {GemmPass::k##pass, DType::k##dtype, DType::k##out_dtype, tile_m, tile_n, tile_k,            \
   cluster_m,         cluster_n},
#include "gemm/kernels.def"
#undef SP24_GEMM_KERNEL
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Waves of tiles over the GPU, each as long as its tile is large: what a config costs, up to a
/// constant factor.
int64_t tile_cost(const KernelEntry& entry, const GemmDesc& desc, int multiprocessors) {
  // A cluster is scheduled as a whole, so tiles come in multiples of it.
  const int64_t tiles_m =
      ceil_div(ceil_div(desc.m, entry.tile_m), entry.cluster_m) * entry.cluster_m;
  const int64_t tiles_n =
      ceil_div(ceil_div(desc.n, entry.tile_n), entry.cluster_n) * entry.cluster_n;
  return ceil_div(tiles_m * tiles_n, multiprocessors) * entry.tile_m * entry.tile_n;
}

/// How wide the strips of the raster walk are, in clusters: 4 where L2 would otherwise see an
/// operand many times.
///
/// The scheduler pads both extents to multiples of the width, so a strip that does not divide them
/// costs whole tiles; and below some 32 waves the operands stay in L2 anyway (docs/kernels/gemm.md,
/// sweep).
int choose_swizzle(const KernelEntry& entry, const GemmDesc& desc, int multiprocessors) {
  const int64_t clusters_m = ceil_div(desc.m, entry.tile_m * entry.cluster_m);
  const int64_t clusters_n = ceil_div(desc.n, entry.tile_n * entry.cluster_n);
  const int64_t tiles = clusters_m * entry.cluster_m * clusters_n * entry.cluster_n;
  const bool divides = clusters_m % 4 == 0 && clusters_n % 4 == 0;
  return divides && tiles >= int64_t{32} * multiprocessors ? 4 : 1;
}

}  // namespace

const KernelEntry* kernel_table(int* count) {
  *count = static_cast<int>(sizeof kTable / sizeof kTable[0]);
  return kTable;
}

GemmConfig choose_config(const GemmDesc& desc, int multiprocessors) {
  const KernelEntry* best = nullptr;
  for (const KernelEntry& entry : kTable) {
    if (entry.pass != desc.pass || entry.dtype != desc.dtype || entry.out_dtype != desc.out_dtype)
      continue;
    if (best == nullptr ||
        tile_cost(entry, desc, multiprocessors) < tile_cost(*best, desc, multiprocessors)) {
      best = &entry;
    }
  }
  SP24_CHECK(best != nullptr, "no sparse GEMM kernel is compiled for ", to_string(desc));
  // Along m: consecutive tiles share the dense operand, the larger part of what a tile loads. It
  // won or tied at every shape of the sweep.
  return {best->tile_m,
          best->tile_n,
          best->tile_k,
          best->cluster_m,
          best->cluster_n,
          Raster::kAlongM,
          choose_swizzle(*best, desc, multiprocessors)};
}

const char* name_of(GemmPass pass) {
  return pass == GemmPass::kForward     ? "forward"
         : pass == GemmPass::kGradInput ? "grad_input"
                                        : "grad_weight";
}

std::string to_string(const GemmDesc& desc) {
  return concat(name_of(desc.pass), " m=", desc.m, " n=", desc.n, " k=", desc.k, " ",
                sparse24::name_of(desc.dtype), " -> ", sparse24::name_of(desc.out_dtype));
}

std::string to_string(const GemmConfig& config) {
  return concat(config.tile_m, "x", config.tile_n, "x", config.tile_k, " cluster ",
                config.cluster_m, "x", config.cluster_n, " cooperative raster ",
                config.raster == Raster::kAlongM ? "m" : "n", " swizzle ", config.swizzle);
}

}  // namespace sparse24::gemm
