// backward.cu: d_gate_up from d_h and gate_up, and h again if wanted, in every mix of layouts.
//
//   d_h, h              [tokens, d_ff]
//   gate_up, d_gate_up  [tokens, 2*d_ff] = [gate | up], plain [tokens, d_ff]
//   all bf16, fp16 or fp32, fp32 inside: d_gate = d_h up act'(gate), d_up = d_h act(gate)
//
// The same three ways as in forward.cu: stream (all operands of one layout), tiles (mixed),
// elements (anything else).
//
// Traffic  10 B a 16-bit element of h gated, 6 B plain; 2 B more for h. Gated, 8192 x 11008:
//          902 MB, 215 us at 4.2 TB/s.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/backward_tile.cuh"
#include "activation/kinds.cuh"
#include "activation/stream.cuh"
#include "common/cuda_check.h"
#include "common/element.cuh"

namespace sparse24 {
namespace {

// ---- stream -----------------------------------------------------------------------------------

struct StreamBackward {
  StreamOperand d_h, gate_up, d_gate_up, h;
  StreamExtent extent;
};

__device__ __forceinline__ char* output(const StreamOperand& operand, StreamPosition position) {
  return const_cast<char*>(stream_address(operand, position));
}

template <Activation kKind, bool kGated, typename T>
__global__ void __launch_bounds__(kStreamThreads)
    backward_stream_kernel(const __grid_constant__ StreamBackward p) {
  constexpr int kSize = Vector<T>::kSize;
  const uint32_t vector = blockIdx.x * kStreamThreads + threadIdx.x;
  if (vector >= p.extent.vectors) return;
  const StreamPosition position = stream_position(vector, p.extent.per_line);
  const char* from = stream_address(p.gate_up, position);
  float d[kSize], g[kSize], x[kSize];
  const uint4 gate = stream_load(from);
  const uint4 up = kGated ? stream_load(from + p.gate_up.half_bytes) : gate;
  Vector<T>::unpack(stream_load(stream_address(p.d_h, position)), d);
  Vector<T>::unpack(gate, g);
  Vector<T>::unpack(up, x);
  SP24_UNROLL
  for (int i = 0; i < kSize; ++i) {
    if constexpr (kGated) {
      const GatedBackward back = gated_backward<kKind, sizeof(T) == 2>(d[i], g[i], x[i]);
      d[i] = back.h, g[i] = back.d_gate, x[i] = back.d_up;
    } else {
      const ValueAndSlope act = activate<kKind, sizeof(T) == 2>(g[i]);
      g[i] = d[i] * act.slope, d[i] = act.value;
    }
  }
  char* to = output(p.d_gate_up, position);
  store16(to, Vector<T>::pack(g));
  if (kGated) store16(to + p.d_gate_up.half_bytes, Vector<T>::pack(x));
  if (p.h.data != nullptr) store16(output(p.h, position), Vector<T>::pack(d));
}

struct LaunchStream {
  const ActivationBackwardArgs& args;
  Layout layout;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    const int64_t d_ff = args.d_h.cols;
    const StreamBackward p = {
        stream_operand(args.d_h, layout, d_ff), stream_operand(args.gate_up, layout, d_ff),
        stream_operand(args.d_gate_up, layout, d_ff), stream_operand(args.h, layout, d_ff),
        stream_extent(args.d_h, layout)};
    backward_stream_kernel<kKind, kGated, T><<<p.extent.blocks(), kStreamThreads, 0, stream>>>(p);
  }
};

// ---- tiles ------------------------------------------------------------------------------------

template <typename T>
using BackwardTile = PatchTile<T, 16, 16>;

// A gated 16-bit patch holds 96 words of operands: two blocks an SM keep them in registers.
template <Activation kKind, bool kGated, typename T, typename Operand>
__global__ void __launch_bounds__(BackwardTile<T>::kThreads, 2)
    backward_tile_kernel(const __grid_constant__ TileBackward<Operand> p) {
  if (!kRunsHere<Operand>) return;
  using Tile = BackwardTile<T>;
  extern __shared__ __align__(128) char staged[];
  __shared__ uint64_t arrived;
  const TileIndex tile = p.walk.tile();
  const int token = static_cast<int>(tile.row) * Tile::kTokens;
  const int feature = static_cast<int>(tile.col) * Tile::kFeatures;
  if (!kByEngine<Operand> || threadIdx.x == 0)
    load_operands<Tile, kGated>(p, staged, &arrived, token, feature);
  wait_for_loads<Operand>(&arrived);

  const bool by_columns = p.gate.column_major;  // gate and up need no turning then
  SquarePatch<T> d_h, gate, up;
  read_operands<Tile, kGated>(p, staged, by_columns, d_h, gate, up);
  backward_patch<kKind, kGated>(p.lines, d_h, gate, up);

  __syncthreads();  // all operands have been read
  stage_results<Tile, kGated>(p, staged, by_columns, d_h, gate, up);
  fence_results<Operand>();
  __syncthreads();  // all results are staged
  if (!kByEngine<Operand> || threadIdx.x == 0) {
    store_results<Tile, kGated>(p, staged, token, feature);
    finish_stores<Operand>();
  }
}

struct LaunchTiles {
  const ActivationBackwardArgs& args;
  const BackwardLayouts& layouts;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    using Tile = BackwardTile<T>;
    with_tile_operand([this](auto kind) {
      using Operand = typename decltype(kind)::Type;
      launch_tile_pass<Tile>(backward_tile_kernel<kKind, kGated, T, Operand>,
                             tile_backward<Tile, Operand>(args, layouts),
                             kBackwardBytes<Tile, kGated>, stream);
    });
  }
};

// ---- elements ---------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    backward_element_kernel(ConstMatrix d_h, ConstMatrix in, Matrix d_in, Matrix h, bool gated,
                            Activation kind) {
  ElementIndex at;
  if (!element_index(d_h.rows, d_h.cols, in.row_stride < in.col_stride, at)) return;
  const int64_t row = at.row, col = at.col, up_col = col + d_h.cols;
  const float d = to_float(element<const T>(d_h, row, col)),
              gate = to_float(element<const T>(in, row, col));
  const float up = gated ? to_float(element<const T>(in, row, up_col)) : 0.0f;
  with_kind(kind, [&](auto kind_constant) {
    constexpr Activation kKind = decltype(kind_constant)::value;
    if (gated) {
      const GatedBackward back = gated_backward<kKind, sizeof(T) == 2>(d, gate, up);
      element<T>(d_in, row, col) = from_float<T>(back.d_gate);
      element<T>(d_in, row, up_col) = from_float<T>(back.d_up);
      if (h.data != nullptr) element<T>(h, row, col) = from_float<T>(back.h);
    } else {
      const ValueAndSlope act = activate<kKind, sizeof(T) == 2>(gate);
      element<T>(d_in, row, col) = from_float<T>(d * act.slope);
      if (h.data != nullptr) element<T>(h, row, col) = from_float<T>(act.value);
    }
  });
}

}  // namespace

namespace cuda {

void activation_backward_dense(const ActivationBackwardArgs& args, cudaStream_t stream) {
  if (args.d_h.rows == 0 || args.d_h.cols == 0) return;
  check_extents32(args.gate_up.rows, args.gate_up.cols, "gate_up");
  const BackwardLayouts layouts(args);
  const bool mixed = layouts.any(Layout::kRowMajor) && layouts.any(Layout::kColumnMajor);
  if (!mixed && !layouts.any(Layout::kStrided)) {
    with_kernel(args.kind, args.gated, args.d_h.dtype, LaunchStream{args, layouts.gate_up, stream});
  } else if (backward_tiles_fit(args, layouts)) {
    with_kernel(args.kind, args.gated, args.d_h.dtype, LaunchTiles{args, layouts, stream});
  } else {
    with_type(args.d_h.dtype, [&](auto zero) {
      backward_element_kernel<decltype(zero)>
          <<<element_blocks(args.d_h), kElementThreads, 0, stream>>>(
              args.d_h, args.gate_up, args.d_gate_up, args.h, args.gated, args.kind);
    });
  }
  SP24_CHECK_LAUNCH("activation_backward of ", name_of(args.d_h.dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
