// dispatch.h: from a checked call to its backend.
#pragma once

#include "common/check.h"
#include "cpu/cpu.h"
#include "sparse24/types.h"

#ifdef SPARSE24_WITH_CUDA
#include "common/cuda_check.h"

/// cpu::op(args), or cuda::op(args, stream) with the context's device current.
#define SP24_DISPATCH(context, op, ...)                                    \
  do {                                                                     \
    if ((context).backend == ::sparse24::Backend::kCpu) {                  \
      ::sparse24::cpu::op(__VA_ARGS__);                                    \
    } else {                                                               \
      const ::sparse24::DeviceGuard guard((context).device);               \
      ::sparse24::cuda::op(__VA_ARGS__, ::sparse24::api::stream(context)); \
    }                                                                      \
  } while (false)

namespace sparse24::api {
inline cudaStream_t stream(const Context& context) {
  return static_cast<cudaStream_t>(context.stream);
}
}  // namespace sparse24::api

#else

#define SP24_DISPATCH(context, op, ...)                   \
  do {                                                    \
    if ((context).backend != ::sparse24::Backend::kCpu) { \
      ::sparse24::api::throw_without_cuda(#op);           \
    }                                                     \
    ::sparse24::cpu::op(__VA_ARGS__);                     \
  } while (false)

#endif

namespace sparse24::api {

inline constexpr const char* kWithoutCuda =
    "libsparse24 was built without CUDA; rebuild with SPARSE24_CUDA=1";

[[noreturn]] inline void throw_without_cuda(const char* op) {
  throw Error(concat(op, ": ", kWithoutCuda));
}

}  // namespace sparse24::api
