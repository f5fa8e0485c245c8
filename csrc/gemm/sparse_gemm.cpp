// sparse_gemm.cpp: validate, choose, launch.
#include "gemm/sparse_gemm.h"

#include <array>
#include <atomic>
#include <limits>

#include "common/check.h"
#include "common/convert.h"
#include "common/cuda_check.h"
#include "gemm/config.h"
#include "gemm/launch.h"

namespace sparse24::gemm {
namespace {

struct Gpu {
  int major = 0, minor = 0, multiprocessors = 0;
};

/// Properties of a device, asked for once: the three attributes cost microseconds.
Gpu gpu(int device) {
  static std::array<std::atomic<uint64_t>, 64> known{};
  const bool cached = device >= 0 && device < 64;
  if (cached) {
    if (const uint64_t packed = known[device].load(std::memory_order_relaxed)) {
      return {static_cast<int>(packed >> 48), static_cast<int>(packed >> 32 & 0xFFFF),
              static_cast<int>(packed)};
    }
  }
  Gpu out;
  SP24_CHECK_CUDA(cudaDeviceGetAttribute(&out.major, cudaDevAttrComputeCapabilityMajor, device));
  SP24_CHECK_CUDA(cudaDeviceGetAttribute(&out.minor, cudaDevAttrComputeCapabilityMinor, device));
  SP24_CHECK_CUDA(
      cudaDeviceGetAttribute(&out.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (cached) {
    known[device].store(static_cast<uint64_t>(out.major) << 48 |
                            static_cast<uint64_t>(out.minor) << 32 |
                            static_cast<uint32_t>(out.multiprocessors),
                        std::memory_order_relaxed);
  }
  return out;
}

GemmDesc describe(const SparseGemmArgs& args) {
  return {args.pass, args.m, args.n, args.k, args.dtype, args.out_dtype};
}

GemmConfig config_of(const SparseGemmArgs& args, int multiprocessors) {
  const GemmDesc desc = describe(args);
  return args.config == 0 ? choose_config(desc, multiprocessors) : decode(desc, args.config);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

/// What the kernels ask beyond the public rules: row-major weights are read two elements at a time.
void check_decay(const SparseGemmArgs& args) {
  const MaskedDecayTerm& decay = args.decay;
  if (decay.factor == nullptr) return;
  SP24_CHECK(args.k > 0, "a product of no tokens takes no decay; add it by masked_decay");
  const uintptr_t pair = 2 * bytes_of(args.out_dtype);
  for (const void* weight : decay.weight) {
    SP24_CHECK(decay.col_stride != 1 ||
                   (decay.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(weight) % pair == 0),
               "rows of decay.weight must be ", pair, "-byte aligned, got ", weight,
               " with row_stride ", decay.row_stride);
  }
}

Launcher* find_launcher(const GemmDesc& desc, const GemmConfig& config) {
#define SP24_GEMM_KERNEL(pass_, dtype_, out_, tm, tn, tk, cm, cn)                       \
  if (desc.pass == GemmPass::k##pass_ && desc.dtype == DType::k##dtype_ &&              \
      desc.out_dtype == DType::k##out_ && config.tile_m == tm && config.tile_n == tn && \
      config.tile_k == tk && config.cluster_m == cm && config.cluster_n == cn)          \
    return &SP24_GEMM_LAUNCHER(pass_, dtype_, out_, tm, tn, tk, cm, cn);
#include "gemm/kernels.def"
#undef SP24_GEMM_KERNEL
  return nullptr;
}

}  // namespace

std::string unsupported(const SparseGemmArgs& args, int device) {
  const Gpu properties = gpu(device);
  if (properties.major != 9) {
    return concat("the GPU is sm_", properties.major, properties.minor,
                  ", sparse GEMM kernels are built for sm_90a");
  }
  if (args.dtype == DType::kFloat32)
    return "float32 operands (sparse tensor cores take bfloat16 and float16)";
  if (args.out_dtype != args.dtype && args.out_dtype != DType::kFloat32) {
    return concat("output ", sparse24::name_of(args.out_dtype), " for operands ",
                  sparse24::name_of(args.dtype));
  }
  // TMA reads and writes rows of whole 16-byte units.
  const int64_t out_unit = 16 / bytes_of(args.out_dtype);
  if (args.rhs_ld % 8 != 0)
    return concat("rows of the dense operand ", args.rhs_ld,
                  " elements apart, not a multiple of 8");
  if (args.out_ld % out_unit != 0) {
    return concat("rows of the output ", args.out_ld, " elements apart, not a multiple of ",
                  out_unit);
  }
  if (is_forward(args.pass) && args.k == 0) return "a forward product of no features";
  if (is_forward(args.pass) && args.k % 16 != 0) {
    return concat("in_features ", args.k, ", not a multiple of 16");
  }
  if (!is_forward(args.pass) && args.m % 8 != 0) {
    return concat(args.pass == GemmPass::kGradInput ? "in_features " : "out_features ", args.m,
                  ", not a multiple of 8");
  }
  if (has_activation(args.pass) && args.h_ld % 8 != 0) {
    return concat("rows of h ", args.h_ld, " elements apart, not a multiple of 8");
  }
  // Coordinates are 32-bit; addresses are not.
  constexpr int64_t kLargest = std::numeric_limits<int>::max() - 1024;
  if (args.m > kLargest || args.n > kLargest || args.k > kLargest)
    return "an extent of 2^31 or more";
  return "";
}

int64_t workspace_bytes(const SparseGemmArgs& args, int device) {
  if (args.m == 0 || args.n == 0 || args.k == 0) return 0;
  const int multiprocessors = gpu(device).multiprocessors;
  return workspace_bytes(config_of(args, multiprocessors), multiprocessors);
}

void run(const SparseGemmArgs& args, int device, cudaStream_t stream) {
  const std::string why_not = unsupported(args, device);
  SP24_CHECK(why_not.empty(), "sparse_gemm cannot run ", to_string(describe(args)), ": ", why_not);
  SP24_CHECK(
      is_aligned(args.packed) && is_aligned(args.E) && is_aligned(args.rhs) && is_aligned(args.out),
      "packed, E, rhs and out must be 16-byte aligned, got ", args.packed, ", ",
      static_cast<const void*>(args.E), ", ", args.rhs, ", ", args.out);
  SP24_CHECK(!has_activation(args.pass) || is_aligned(args.h), "h must be 16-byte aligned, got ",
             args.h);
  if (args.m == 0 || args.n == 0) return;
  check_decay(args);
  if (args.k == 0) {
    if (!args.accumulate) {
      const bool tall = args.pass == GemmPass::kGradWeight;
      const int64_t rows = tall ? args.m : args.n,
                    width = (tall ? args.n : args.m) * bytes_of(args.out_dtype);
      SP24_CHECK_CUDA(cudaMemset2DAsync(args.out, args.out_ld * bytes_of(args.out_dtype), 0, width,
                                        rows, stream));
    }
    return;
  }
  const GemmDesc desc = describe(args);
  const int multiprocessors = gpu(device).multiprocessors;
  const GemmConfig config = config_of(args, multiprocessors);
  SP24_CHECK(!config.stream_k || (args.workspace != nullptr && is_aligned(args.workspace)),
             "workspace must be ", workspace_bytes(config, multiprocessors),
             " bytes, 16-byte aligned, got ", args.workspace,
             "; sparse_gemm_workspace_bytes says how many");
  Launcher* launch = find_launcher(desc, config);
  SP24_CHECK(launch != nullptr, "config ", to_string(config), " is not compiled for ",
             to_string(desc));
  try {
    launch(args, config, device, multiprocessors, stream);
  } catch (const Error& error) {
    throw Error(concat(error.what(), "; ", to_string(desc), " by ", to_string(config)));
  }
}

std::string config_text(const SparseGemmArgs& args, int device) {
  return to_string(config_of(args, gpu(device).multiprocessors));
}

std::vector<int64_t> configs(const SparseGemmArgs& args, int device) {
  const GemmDesc desc = describe(args);
  std::vector<int64_t> codes;
  for (const GemmConfig& config : candidate_configs(desc, gpu(device).multiprocessors)) {
    codes.push_back(encode(desc, config));
  }
  return codes;
}

}  // namespace sparse24::gemm
