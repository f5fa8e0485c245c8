// config.cpp: the table of compiled kernels as data, and the choice among them.
#include "gemm/config.h"

#include <algorithm>

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
constexpr int kTableSize = static_cast<int>(sizeof kTable / sizeof kTable[0]);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool computes(const KernelEntry& entry, const GemmDesc& desc) {
  return entry.pass == desc.pass && entry.dtype == desc.dtype && entry.out_dtype == desc.out_dtype;
}

/// The clusters of tiles that cover an output, and how many of them run at a time.
struct Cover {
  int64_t m_clusters, n_clusters, resident;
  int64_t clusters() const { return m_clusters * n_clusters; }
};

Cover cover(const GemmConfig& config, const GemmDesc& desc, int multiprocessors) {
  return {ceil_div(desc.m, int64_t{config.tile_m} * config.cluster_m),
          ceil_div(desc.n, int64_t{config.tile_n} * config.cluster_n),
          std::max<int64_t>(multiprocessors / (config.cluster_m * config.cluster_n), 1)};
}

/// Cycles that a product takes, near enough to compare configs by. The constants are fitted to the
/// sweep on an H200 (bench/results/gemm_sweep.csv).
double cycles(const GemmConfig& config, const GemmDesc& desc, int multiprocessors) {
  const Cover tiles = cover(config, desc, multiprocessors);
  const double k_tiles = static_cast<double>(ceil_div(desc.k, config.tile_k));
  const double k_tile = config.tile_n == 256 ? 690 : 550;  // wgmma waits for shared memory
  const double store = config.tile_n == 256 ? 800 : 600;   // what shows of a tile's epilogue
  const double whole_tile = k_tiles * k_tile + store;
  if (!config.stream_k) {
    return static_cast<double>(ceil_div(tiles.clusters(), tiles.resident)) * whole_tile;
  }
  const int64_t whole_waves = std::max<int64_t>(tiles.clusters() / tiles.resident - 1, 0);
  const double resident = static_cast<double>(tiles.resident);
  const double cut_clusters = static_cast<double>(tiles.clusters() - whole_waves * tiles.resident);
  const double cut_waves = cut_clusters / resident;
  // Blocks are at different places of k, so operands that exceed L2 are read from memory more
  // often.
  const int64_t operand_bytes = desc.m * desc.k * 9 / 8 + desc.n * desc.k * 2;
  const double locality = operand_bytes < 60'000'000 ? 1.0 : 1.25;
  const double parts_of_a_tile = std::max(1.0, resident / cut_clusters);
  const double hand_over = 5000 + 4500 * parts_of_a_tile;  // sums through the workspace, its flags
  return static_cast<double>(whole_waves) * whole_tile + cut_waves * k_tiles * k_tile * locality +
         (cut_waves + 1) * store + hand_over;
}

/// The order of the tiles. Strips of eight clusters keep both operands in L2; where few clusters
/// cover m, the strip is all of them. With stream-K, neighbours share the operand of the shorter
/// extent.
void choose_walk(GemmConfig& config, const GemmDesc& desc, int multiprocessors) {
  const Cover tiles = cover(config, desc, multiprocessors);
  const bool weight_grad = desc.pass == GemmPass::kGradWeight;
  if (config.stream_k && (weight_grad || tiles.m_clusters <= 16)) {
    const bool along_n = weight_grad && tiles.m_clusters < tiles.n_clusters;
    config.raster = along_n ? Raster::kAlongN : Raster::kAlongM;
    config.strip = 1;
  } else {
    const bool along_n = config.stream_k || weight_grad || tiles.m_clusters <= 8;
    config.raster = along_n ? Raster::kAlongN : Raster::kAlongM;
    config.strip = 8;
  }
}

/// Products of the sweep for which the formula is more than 3 % off: their best config there.
struct Measured {
  GemmPass pass;
  int64_t m, n, k;
  int tile_n;
  Raster raster;
  int strip;
  bool stream_k;
};
constexpr int kMeasuredMultiprocessors = 132;
constexpr Measured kMeasured[] = {
    {GemmPass::kForward, 1600, 8192, 6400, 256, Raster::kAlongN, 1, true},
    {GemmPass::kGradInput, 1600, 8192, 6400, 256, Raster::kAlongN, 1, true},
    {GemmPass::kGradWeight, 3072, 768, 16384, 192, Raster::kAlongN, 8, true},
    {GemmPass::kGradWeight, 768, 3072, 16384, 192, Raster::kAlongN, 1, true},
    {GemmPass::kGradWeight, 3072, 768, 65536, 256, Raster::kAlongN, 1, true},
    {GemmPass::kGradWeight, 1280, 5120, 16384, 192, Raster::kAlongN, 8, true},
    {GemmPass::kGradWeight, 3584, 4096, 32768, 192, Raster::kAlongN, 8, false},
    {GemmPass::kGradWeight, 4096, 11008, 8192, 256, Raster::kAlongM, 1, false},
};

GemmConfig config_of(const KernelEntry& entry, const GemmDesc& desc, bool stream_k,
                     int multiprocessors) {
  GemmConfig config{entry.tile_m,
                    entry.tile_n,
                    entry.tile_k,
                    entry.cluster_m,
                    entry.cluster_n,
                    Raster::kAlongM,
                    1,
                    stream_k};
  choose_walk(config, desc, multiprocessors);
  return config;
}

/// Stream-K has something to share out only where the last wave is not full.
bool last_wave_is_partial(const GemmConfig& config, const GemmDesc& desc, int multiprocessors) {
  const Cover tiles = cover(config, desc, multiprocessors);
  return tiles.clusters() % tiles.resident != 0;
}

}  // namespace

const KernelEntry* kernel_table(int* count) {
  *count = kTableSize;
  return kTable;
}

GemmConfig choose_config(const GemmDesc& desc, int multiprocessors) {
  GemmConfig best{};
  double best_cycles = -1;
  for (const KernelEntry& entry : kTable) {
    if (!computes(entry, desc)) continue;
    for (const bool stream_k : {false, true}) {
      const GemmConfig config = config_of(entry, desc, stream_k, multiprocessors);
      if (stream_k && !last_wave_is_partial(config, desc, multiprocessors)) continue;
      const double cost = cycles(config, desc, multiprocessors);
      if (best_cycles < 0 || cost < best_cycles) best = config, best_cycles = cost;
    }
  }
  SP24_CHECK(best_cycles >= 0, "no sparse GEMM kernel is compiled for ", to_string(desc));
  if (multiprocessors == kMeasuredMultiprocessors) {
    for (const Measured& known : kMeasured) {
      if (known.pass != desc.pass || known.m != desc.m || known.n != desc.n || known.k != desc.k)
        continue;
      best.tile_n = known.tile_n;
      best.raster = known.raster;
      best.strip = known.strip;
      best.stream_k = known.stream_k;
    }
  }
  return best;
}

std::vector<GemmConfig> candidate_configs(const GemmDesc& desc, int multiprocessors) {
  std::vector<GemmConfig> all = {choose_config(desc, multiprocessors)};
  for (const KernelEntry& entry : kTable) {
    if (!computes(entry, desc)) continue;
    for (const bool stream_k : {false, true}) {
      GemmConfig config = config_of(entry, desc, stream_k, multiprocessors);
      if (stream_k && !last_wave_is_partial(config, desc, multiprocessors)) continue;
      for (const Raster raster : {Raster::kAlongM, Raster::kAlongN}) {
        for (const int strip : {1, 8}) {
          config.raster = raster;
          config.strip = strip;
          if (encode(desc, config) != encode(desc, all[0])) all.push_back(config);
        }
      }
    }
  }
  return all;
}

int64_t encode(const GemmDesc& desc, const GemmConfig& config) {
  for (int row = 0; row < kTableSize; ++row) {
    const KernelEntry& entry = kTable[row];
    if (computes(entry, desc) && entry.tile_m == config.tile_m && entry.tile_n == config.tile_n &&
        entry.tile_k == config.tile_k && entry.cluster_m == config.cluster_m &&
        entry.cluster_n == config.cluster_n) {
      return (row + 1) | int64_t{config.strip} << 8 |
             int64_t{config.raster == Raster::kAlongN} << 16 | int64_t{config.stream_k} << 17;
    }
  }
  throw Error(concat("config ", to_string(config), " is not compiled for ", to_string(desc)));
}

GemmConfig decode(const GemmDesc& desc, int64_t code) {
  const int64_t row = (code & 0xFF) - 1, strip = code >> 8 & 0xFF;
  SP24_CHECK(code > 0 && code >> 18 == 0 && row >= 0 && row < kTableSize && strip > 0 &&
                 computes(kTable[row], desc),
             "config must be one of sparse_gemm_configs for ", to_string(desc), ", got ", code);
  const KernelEntry& entry = kTable[row];
  return {entry.tile_m,
          entry.tile_n,
          entry.tile_k,
          entry.cluster_m,
          entry.cluster_n,
          (code >> 16 & 1) != 0 ? Raster::kAlongN : Raster::kAlongM,
          static_cast<int>(strip),
          (code >> 17 & 1) != 0};
}

int stream_k_blocks(const GemmConfig& config, int multiprocessors) {
  const int cluster = config.cluster_m * config.cluster_n;
  return multiprocessors / cluster * cluster;
}

int64_t workspace_bytes(const GemmConfig& config, int multiprocessors) {
  if (!config.stream_k) return 0;
  const int blocks = stream_k_blocks(config, multiprocessors);
  return stream_k_flag_bytes(blocks) + int64_t{4} * blocks * config.tile_m * config.tile_n;
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
                config.cluster_m, "x", config.cluster_n, " strips of ", config.strip, " along ",
                config.raster == Raster::kAlongM ? "m" : "n", config.stream_k ? " stream-k" : "");
}

}  // namespace sparse24::gemm
