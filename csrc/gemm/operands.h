// operands.h: how operands and outputs must lie in memory, for kernels that move them in whole
// units of 16 bytes: by TMA, or by cp.async.
#pragma once

#include <string>

#include "sparse24/gemm.h"

namespace sparse24::gemm {

/// Why they do not lie so ("" if they do).
std::string unsupported_layout(const SparseGemmArgs& args);

}  // namespace sparse24::gemm
