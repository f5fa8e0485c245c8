// kinds.cuh: from an activation known at run time to code for it, inside a kernel.
//
// The streaming kernels have one instantiation a kind; those of patches are long, and branch once a
// patch instead: all threads of a launch take the same way.
#pragma once

#include <type_traits>

#include "activation/functions.h"

namespace sparse24 {

template <Activation kKind>
using KindConstant = std::integral_constant<Activation, kKind>;

/// Calls function(KindConstant<kind>{}).
template <typename Function>
__device__ __forceinline__ void with_kind(Activation kind, const Function& function) {
  switch (kind) {
    case Activation::kSilu: return function(KindConstant<Activation::kSilu>{});
    case Activation::kGelu: return function(KindConstant<Activation::kGelu>{});
    case Activation::kGeluTanh: return function(KindConstant<Activation::kGeluTanh>{});
    case Activation::kRelu: return function(KindConstant<Activation::kRelu>{});
    case Activation::kSquaredRelu: return function(KindConstant<Activation::kSquaredRelu>{});
    case Activation::kIdentity: return function(KindConstant<Activation::kIdentity>{});
  }
}

}  // namespace sparse24
