// kinds.cuh: from an activation known at run time to code for it.
//
// Kernels that move whole vectors have one instantiation an activation, whether it is gated, and a
// dtype: a kernel that holds all activations takes 3 to 4 us longer at any size
// (docs/kernels/activation.md). Those that go element by element are slow anyway, and branch; so do
// products with an activation in their epilogue, which would be five times as many kernels.
#pragma once

#include <type_traits>

#include "activation/functions.h"
#include "common/convert.h"

namespace sparse24 {

template <Activation kKind>
using KindConstant = std::integral_constant<Activation, kKind>;

/// Calls function(KindConstant<kind>{}), inside a kernel.
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

template <typename Launcher>
struct LaunchOfKind {
  const Launcher& launcher;
  bool gated;
  DType dtype;

  template <Activation kKind>
  void operator()() const {
    with_type(dtype, [this](auto zero) {
      using T = decltype(zero);
      gated ? launcher.template launch<kKind, true, T>()
            : launcher.template launch<kKind, false, T>();
    });
  }
};

/// Calls launcher.launch<kind, gated, type>(), on the host.
template <typename Launcher>
void with_kernel(Activation kind, bool gated, DType dtype, const Launcher& launcher) {
  with_activation(kind, LaunchOfKind<Launcher>{launcher, gated, dtype});
}

}  // namespace sparse24
