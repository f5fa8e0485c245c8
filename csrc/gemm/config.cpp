// config.cpp: the table of compiled kernels as data, and the choice among them.
#include "gemm/config.h"

#include "common/check.h"
#include "common/convert.h"

namespace sparse24::gemm {
namespace {

constexpr KernelEntry kTable[] = {
#define SP24_GEMM_KERNEL(pass, dtype, out_dtype, tile_m, tile_n, tile_k, cluster_m, cluster_n)     \
  {GemmPass::k##pass, DType::k##dtype, DType::k##out_dtype, tile_m, tile_n, tile_k, cluster_m, cluster_n},
#include "gemm/kernels.def"
#undef SP24_GEMM_KERNEL
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Waves of tiles over the GPU, each as long as its tile is large: what a config costs, up to a constant factor.
int64_t tile_cost(const KernelEntry& entry, const GemmDesc& desc, int multiprocessors) {
  // A cluster is scheduled as a whole, so tiles come in multiples of it.
  const int64_t tiles_m = ceil_div(ceil_div(desc.m, entry.tile_m), entry.cluster_m) * entry.cluster_m;
  const int64_t tiles_n = ceil_div(ceil_div(desc.n, entry.tile_n), entry.cluster_n) * entry.cluster_n;
  return ceil_div(tiles_m * tiles_n, multiprocessors) * entry.tile_m * entry.tile_n;
}

}  // namespace

const KernelEntry* kernel_table(int* count) {
  *count = static_cast<int>(sizeof kTable / sizeof kTable[0]);
  return kTable;
}

GemmConfig choose_config(const GemmDesc& desc, int multiprocessors) {
  const KernelEntry* best = nullptr;
  for (const KernelEntry& entry : kTable) {
    if (entry.pass != desc.pass || entry.dtype != desc.dtype || entry.out_dtype != desc.out_dtype) continue;
    if (best == nullptr || tile_cost(entry, desc, multiprocessors) < tile_cost(*best, desc, multiprocessors)) {
      best = &entry;
    }
  }
  SP24_CHECK(best != nullptr, "no sparse GEMM kernel is compiled for ", to_string(desc));
  // Walk along the longer side: strips of the shorter one stay in L2 meanwhile.
  const Raster raster = desc.m > desc.n ? Raster::kAlongM : Raster::kAlongN;
  return {best->tile_m, best->tile_n, best->tile_k, best->cluster_m, best->cluster_n, raster, 8};
}

const char* name_of(GemmPass pass) {
  return pass == GemmPass::kForward ? "forward" : pass == GemmPass::kGradInput ? "grad_input" : "grad_weight";
}

std::string to_string(const GemmDesc& desc) {
  return concat(name_of(desc.pass), " m=", desc.m, " n=", desc.n, " k=", desc.k, " ", sparse24::name_of(desc.dtype),
                " -> ", sparse24::name_of(desc.out_dtype));
}

std::string to_string(const GemmConfig& config) {
  return concat(config.tile_m, "x", config.tile_n, "x", config.tile_k, " cluster ", config.cluster_m, "x",
                config.cluster_n, " cooperative raster ", config.raster == Raster::kAlongM ? "m" : "n", " swizzle ",
                config.swizzle);
}

}  // namespace sparse24::gemm
