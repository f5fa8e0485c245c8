// gpu_testing.h: what programs that test kernels on a GPU share: how failures are counted.
#pragma once

#include <cstdio>

#include "common/check.h"
#include "random.h"

namespace gpu_testing {

inline int failures = 0;

/// Counts a failure, and prints the first of them.
template <typename... Parts>
void fail(const Parts&... parts) {
  if (++failures <= 40) std::printf("FAIL %s\n", sparse24::concat(parts...).c_str());
}

using testing::Random;

}  // namespace gpu_testing
