// sparse_gemm.h: the GPU side of the public sparse GEMM: what it can take, and the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "gemm/arch.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm {

/// Why these arguments cannot run on `device` ("" if they can).
std::string unsupported(const SparseGemmArgs& args, int device);
int64_t workspace_bytes(const SparseGemmArgs& args, int device);
void run(const SparseGemmArgs& args, int device, cudaStream_t stream);
/// The architecture whose kernels run there. Throws Error where there are none.
const GemmArch& arch_on(int device);
std::string config_text(const SparseGemmArgs& args, int device);
std::vector<int64_t> configs(const SparseGemmArgs& args, int device);

}  // namespace sparse24::gemm
