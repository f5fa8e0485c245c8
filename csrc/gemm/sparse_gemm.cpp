// sparse_gemm.cpp: validate, choose, launch.
#include "gemm/sparse_gemm.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "common/check.h"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "gemm/arch.h"
#include "gemm/config.h"

namespace sparse24::gemm {
namespace {

struct Gpu {
  Capability capability;  // that kernels are chosen for
  int multiprocessors = 0, shared_bytes = 0;
};

Gpu ask_driver(int device) {
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    SP24_CHECK_CUDA(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  const Capability own = {attribute(cudaDevAttrComputeCapabilityMajor),
                          attribute(cudaDevAttrComputeCapabilityMinor)};
  const Capability chosen = chosen_capability(own);
  return {chosen, attribute(cudaDevAttrMultiProcessorCount),
          std::min(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), shared_bytes_of(chosen))};
}

/// Properties of a device, asked for once: the attributes cost microseconds.
Gpu gpu(int device) {
  static std::array<std::atomic<uint64_t>, 64> known{};
  const bool cached = device >= 0 && device < 64;
  if (cached) {
    if (const uint64_t packed = known[device].load(std::memory_order_relaxed)) {
      return {{static_cast<int>(packed >> 56), static_cast<int>(packed >> 48 & 0xFF)},
              static_cast<int>(packed >> 32 & 0xFFFF),
              static_cast<int>(packed & 0xFFFFFFFF)};
    }
  }
  const Gpu out = ask_driver(device);
  if (cached) {
    known[device].store(static_cast<uint64_t>(out.capability.major) << 56 |
                            static_cast<uint64_t>(out.capability.minor) << 48 |
                            static_cast<uint64_t>(out.multiprocessors) << 32 |
                            static_cast<uint32_t>(out.shared_bytes),
                        std::memory_order_relaxed);
  }
  return out;
}

const GemmArch& arch_on(const Gpu& gpu) {
  const GemmArch* arch = arch_of(gpu.capability);
  SP24_CHECK(arch != nullptr, no_arch_reason(gpu.capability));
  return *arch;
}

GemmConfig config_of(const SparseGemmArgs& args, const Gpu& gpu) {
  const GemmDesc desc = describe(args);
  const GemmArch& arch = arch_on(gpu);
  return args.config == 0 ? choose_config(arch, desc, gpu.multiprocessors)
                          : decode(arch, desc, args.config);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

/// What the kernels ask beyond the public rules: weights that are neighbours along n are read two
/// at a time.
void check_decay(const SparseGemmArgs& args) {
  const MaskedDecayTerm& decay = args.decay;
  if (decay.factor == nullptr) return;
  SP24_CHECK(args.k > 0, "a product of no tokens takes no decay; add it by masked_decay");
  const bool n_cols = is_m_by_n(args.pass);
  const int64_t along_n = n_cols ? decay.col_stride : decay.row_stride,
                lines = n_cols ? decay.row_stride : decay.col_stride;
  const uintptr_t pair = 2 * bytes_of(args.out_dtype);
  for (const void* weight : decay.weight) {
    SP24_CHECK(along_n != 1 || (lines % 2 == 0 && reinterpret_cast<uintptr_t>(weight) % pair == 0),
               n_cols ? "rows" : "columns", " of decay.weight must be ", pair,
               "-byte aligned, got ", weight, " with lines ", lines, " elements apart");
  }
}

void check_addresses(const SparseGemmArgs& args) {
  SP24_CHECK(is_aligned(args.lhs.values) && is_aligned(args.lhs.E) && is_aligned(args.rhs.values) &&
                 is_aligned(args.out),
             "packed, E, rhs and out must be 16-byte aligned, got ", args.lhs.values, ", ",
             static_cast<const void*>(args.lhs.E), ", ", args.rhs.values, ", ", args.out);
  SP24_CHECK(args.epilogue == GemmEpilogue::kPlain || is_aligned(args.h),
             "h must be 16-byte aligned, got ", args.h);
}

bool has_float8(const GemmArch& arch) {
  return std::any_of(arch.kernels, arch.kernels + arch.count,
                     [](const KernelEntry& entry) { return is_float8(entry.format); });
}

/// A product of no k.
void write_zeros(const SparseGemmArgs& args, cudaStream_t stream) {
  const bool m_rows = is_m_by_n(args.pass);
  const int64_t rows = m_rows ? args.m : args.n, element = bytes_of(args.out_dtype);
  SP24_CHECK_CUDA(cudaMemset2DAsync(args.out, args.out_ld * element, 0,
                                    (m_rows ? args.n : args.m) * element, rows, stream));
}

}  // namespace

std::string unsupported(const SparseGemmArgs& args, int device) {
  const Gpu properties = gpu(device);
  const GemmArch* arch = arch_of(properties.capability);
  if (arch == nullptr) return no_arch_reason(properties.capability);
  if (args.lhs.format == DType::kFloat32)
    return "float32 operands (sparse tensor cores take bfloat16, float16 and float8_e4m3fn)";
  if (const GemmDesc desc = describe(args); !is_compiled(*arch, desc)) {
    return concat("no kernel is compiled for ", to_string(desc),
                  has_float8(*arch) || !is_float8(desc.format)
                      ? ""
                      : concat(" on ", arch->name,
                               "; products of 8 bits need a GPU of compute "
                               "capability 8.9 or 9.0, and a build for it"));
  }
  return arch->unsupported(args);
}

int64_t workspace_bytes(const SparseGemmArgs& args, int device) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return 0;
  const Gpu properties = gpu(device);
  return workspace_bytes(config_of(args, properties), properties.multiprocessors);
}

void run(const SparseGemmArgs& args, int device, cudaStream_t stream) {
  const std::string why_not = unsupported(args, device);
  const GemmDesc desc = describe(args);
  SP24_CHECK(why_not.empty(), "sparse_gemm cannot run ", to_string(desc), ": ", why_not);
  check_addresses(args);
  if (args.m == 0 || args.n == 0) return;
  check_decay(args);
  if (args.k == 0) {
    if (!args.accumulate) write_zeros(args, stream);
    return;
  }
  const Gpu properties = gpu(device);
  const GemmConfig config = config_of(args, properties);
  SP24_CHECK(!config.stream_k || (args.workspace != nullptr && is_aligned(args.workspace)),
             "workspace must be ", workspace_bytes(config, properties.multiprocessors),
             " bytes, 16-byte aligned, got ", args.workspace,
             "; sparse_gemm_workspace_bytes says how many");
  const GemmArch& arch = arch_on(properties);
  try {
    arch.launchers[row_of(arch, desc, config)](
        args, config, {device, properties.multiprocessors, properties.shared_bytes, stream});
  } catch (const Error& error) {
    throw Error(concat(error.what(), "; ", to_string(desc), " by ", to_string(config)));
  }
}

const GemmArch& arch_on(int device) { return arch_on(gpu(device)); }

std::string config_text(const SparseGemmArgs& args, int device) {
  return to_string(config_of(args, gpu(device)));
}

std::vector<int64_t> configs(const SparseGemmArgs& args, int device) {
  const GemmDesc desc = describe(args);
  const Gpu properties = gpu(device);
  const GemmArch& arch = arch_on(properties);
  std::vector<int64_t> codes;
  for (const GemmConfig& config : candidate_configs(arch, desc, properties.multiprocessors)) {
    codes.push_back(encode(arch, desc, config));
  }
  return codes;
}

}  // namespace sparse24::gemm
