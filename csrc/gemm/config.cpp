// config.cpp: the choice among an architecture's compiled kernels.
#include "gemm/config.h"

#include <algorithm>

#include "common/check.h"
#include "common/convert.h"
#include "gemm/arch.h"
#include "gemm/stream_k.h"

namespace sparse24::gemm {
namespace {

/// The rows of an architecture's table, for loops.
struct Rows {
  const KernelEntry *first, *last;
  const KernelEntry* begin() const { return first; }
  const KernelEntry* end() const { return last; }
};
Rows kernels_of(const GemmArch& arch) { return {arch.kernels, arch.kernels + arch.count}; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// 8-bit operands are K-major in every pass: dx is a product like y, by the same kernels, and those
/// of a sparse activation are products like the weight gradient, which is [m, n], too.
GemmPass kernel_pass(const GemmDesc& desc) {
  if (!is_float8(desc.format)) return desc.pass;
  if (desc.pass == GemmPass::kGradInput) return GemmPass::kForward;
  return is_of_activation(desc.pass) ? GemmPass::kGradWeight : desc.pass;
}

bool computes(const KernelEntry& entry, const GemmDesc& desc) {
  return entry.pass == kernel_pass(desc) && entry.epilogue == desc.epilogue &&
         entry.format == desc.format && entry.out_dtype == desc.out_dtype &&
         entry.accumulation == desc.accumulation;
}

/// The clusters of tiles that cover an output, and how many of them run at a time.
struct Cover {
  int64_t clusters, resident;
};

Cover cover(const GemmConfig& config, const GemmDesc& desc, int multiprocessors) {
  return {ceil_div(desc.m, int64_t{config.tile_m} * config.cluster_m) *
              ceil_div(desc.n, int64_t{config.tile_n} * config.cluster_n),
          std::max<int64_t>(multiprocessors / (config.cluster_m * config.cluster_n), 1)};
}

/// How stream-K shares out the last wave.
StreamK cut_of(const Cover& tiles, int64_t k_tiles) {
  return StreamK::of(static_cast<int>(tiles.clusters % tiles.resident),
                     static_cast<int>(tiles.resident), static_cast<int>(k_tiles));
}

/// Cycles that a product takes, near enough to compare configs by.
double cycles(const TileCost& cost, const GemmConfig& config, const GemmDesc& desc,
              int multiprocessors) {
  const Cover tiles = cover(config, desc, multiprocessors);
  const int64_t k_tiles = ceil_div(desc.k, config.tile_k);
  const double wave = static_cast<double>(k_tiles) * cost.k_tile + cost.store;
  if (!config.stream_k) {
    return static_cast<double>(ceil_div(tiles.clusters, tiles.resident)) * wave;
  }
  const double slower = 1.1;  // clusters are at a few places of k instead of one
  const double shared_wave = cut_of(tiles, k_tiles).time() * cost.k_tile * slower + cost.store;
  return static_cast<double>(tiles.clusters / tiles.resident) * wave + shared_wave;
}

/// The order of the tiles: strips of eight clusters keep both operands in L2. They go along n, but
/// for short K loops with a long m that is contiguous in the output: there its writing counts.
void choose_walk(GemmConfig& config, const GemmDesc& desc) {
  const bool long_m = desc.m > int64_t{8} * config.tile_m * config.cluster_m;
  const bool m_contiguous = !is_grad_weight(desc.pass) && !is_m_by_n(desc.pass);
  const bool writes = m_contiguous && long_m && desc.k <= 1536;
  config.raster = writes ? Raster::kAlongM : Raster::kAlongN;
  config.strip = 8;
}

GemmConfig config_of(const KernelEntry& entry, const GemmDesc& desc, bool stream_k) {
  GemmConfig config{entry.tile_m,    entry.tile_n,       entry.tile_k,    entry.cluster_m,
                    entry.cluster_n, entry.accumulation, Raster::kAlongM, 1,
                    stream_k};
  choose_walk(config, desc);
  return config;
}

/// Stream-K is worth a try where the last wave is not full and its tiles long enough to be cut.
bool stream_k_cuts(const GemmConfig& config, const GemmDesc& desc, int multiprocessors) {
  const Cover tiles = cover(config, desc, multiprocessors);
  if (tiles.clusters % tiles.resident == 0) return false;
  return cut_of(tiles, ceil_div(desc.k, config.tile_k)).is_cut();
}

}  // namespace

GemmDesc describe(const SparseGemmArgs& args) {
  // With fast accumulation the error on normal data is 0.2 % of its size at any k, below that of
  // the operands themselves; on sums of one sign it is a bias, -3 % at k 4096, -13 % at 14336
  // (promoted: -0.05 %). Weight gradients are summed over all tokens.
  const bool promotes = is_float8(args.lhs.format) &&
                        (args.accumulation == Accumulation::kPromoted ||
                         (args.accumulation == Accumulation::kAuto && is_grad_weight(args.pass)));
  return {args.pass,      args.epilogue,
          args.m,         args.n,
          args.k,         args.lhs.format,
          args.out_dtype, promotes ? Accumulation::kPromoted : Accumulation::kFast};
}

bool is_compiled(const GemmArch& arch, const GemmDesc& desc) {
  return std::any_of(arch.kernels, arch.kernels + arch.count,
                     [&](const KernelEntry& entry) { return computes(entry, desc); });
}

int row_of(const GemmArch& arch, const GemmDesc& desc, const GemmConfig& config) {
  for (int row = 0; row < arch.count; ++row) {
    const KernelEntry& entry = arch.kernels[row];
    if (computes(entry, desc) && entry.tile_m == config.tile_m && entry.tile_n == config.tile_n &&
        entry.tile_k == config.tile_k && entry.cluster_m == config.cluster_m &&
        entry.cluster_n == config.cluster_n) {
      return row;
    }
  }
  throw Error(concat("config ", to_string(config), " is not compiled for ", to_string(desc)));
}

GemmConfig choose_config(const GemmArch& arch, const GemmDesc& desc, int multiprocessors) {
  GemmConfig best{};
  double best_cycles = -1;
  for (const KernelEntry& entry : kernels_of(arch)) {
    if (!computes(entry, desc)) continue;
    for (const bool stream_k : {false, true}) {
      const GemmConfig config = config_of(entry, desc, stream_k);
      if (stream_k && !stream_k_cuts(config, desc, multiprocessors)) continue;
      const double cost = cycles(arch.cost(entry), config, desc, multiprocessors);
      if (best_cycles < 0 || cost < best_cycles) best = config, best_cycles = cost;
    }
  }
  SP24_CHECK(best_cycles >= 0, "no sparse GEMM kernel is compiled for ", to_string(desc));
  if (is_float8(desc.format)) return best;
  for (int i = 0; i < arch.measured_count; ++i) {
    const MeasuredChoice& known = arch.measured[i];
    if (known.multiprocessors != multiprocessors || known.pass != desc.pass || known.m != desc.m ||
        known.n != desc.n || known.k != desc.k)
      continue;
    best.tile_n = known.tile_n;
    best.raster = known.raster;
    best.strip = known.strip;
    best.stream_k = known.stream_k;
  }
  return best;
}

std::vector<GemmConfig> candidate_configs(const GemmArch& arch, const GemmDesc& desc,
                                          int multiprocessors) {
  std::vector<GemmConfig> all = {choose_config(arch, desc, multiprocessors)};
  const int64_t first = encode(arch, desc, all[0]);
  for (const KernelEntry& entry : kernels_of(arch)) {
    if (!computes(entry, desc)) continue;
    for (const bool stream_k : {false, true}) {
      GemmConfig config = config_of(entry, desc, stream_k);
      if (stream_k && !stream_k_cuts(config, desc, multiprocessors)) continue;
      for (const Raster raster : {Raster::kAlongM, Raster::kAlongN}) {
        for (const int strip : {1, 8}) {
          config.raster = raster;
          config.strip = strip;
          if (encode(arch, desc, config) != first) all.push_back(config);
        }
      }
    }
  }
  return all;
}

int64_t encode(const GemmArch& arch, const GemmDesc& desc, const GemmConfig& config) {
  return (row_of(arch, desc, config) + 1) | int64_t{config.strip} << 8 |
         int64_t{config.raster == Raster::kAlongN} << 16 | int64_t{config.stream_k} << 17;
}

GemmConfig decode(const GemmArch& arch, const GemmDesc& desc, int64_t code) {
  const int64_t row = (code & 0xFF) - 1, strip = code >> 8 & 0xFF;
  SP24_CHECK(code > 0 && code >> 18 == 0 && row >= 0 && row < arch.count && strip > 0 &&
                 computes(arch.kernels[row], desc),
             "config must be one of sparse_gemm_configs for ", to_string(desc), ", got ", code);
  const KernelEntry& entry = arch.kernels[row];
  return {entry.tile_m,
          entry.tile_n,
          entry.tile_k,
          entry.cluster_m,
          entry.cluster_n,
          entry.accumulation,
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
  switch (pass) {
    case GemmPass::kForward: return "forward";
    case GemmPass::kGradInput: return "grad_input";
    case GemmPass::kGradWeight: return "grad_weight";
    case GemmPass::kGradWeightOfInput: return "grad_weight_of_input";
    case GemmPass::kForwardOfInput: return "forward_of_input";
    case GemmPass::kGradInputOfOutput: return "grad_input_of_output";
  }
  return "?";
}

const char* name_of(GemmEpilogue epilogue) {
  switch (epilogue) {
    case GemmEpilogue::kPlain: return "plain";
    case GemmEpilogue::kActivation: return "activation";
    case GemmEpilogue::kGate: return "gate";
  }
  return "?";
}

std::string to_string(const GemmDesc& desc) {
  return concat(name_of(desc.pass), desc.epilogue == GemmEpilogue::kPlain ? "" : " and ",
                desc.epilogue == GemmEpilogue::kPlain ? "" : name_of(desc.epilogue), " m=", desc.m,
                " n=", desc.n, " k=", desc.k, " ", sparse24::name_of(desc.format), " -> ",
                sparse24::name_of(desc.out_dtype),
                desc.accumulation == Accumulation::kPromoted ? " promoted" : "");
}

std::string to_string(const GemmConfig& config) {
  return concat(config.tile_m, "x", config.tile_n, "x", config.tile_k, " cluster ",
                config.cluster_m, "x", config.cluster_n,
                config.accumulation == Accumulation::kPromoted ? " promoted" : "", " strips of ",
                config.strip, " along ", config.raster == Raster::kAlongM ? "m" : "n",
                config.stream_k ? " stream-k" : "");
}

}  // namespace sparse24::gemm
