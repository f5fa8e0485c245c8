// forward.cu: h = act(gate) * up, or act(x), in every mix of layouts.
//
//   gate_up  [tokens, 2*d_ff] = [gate | up], or x [tokens, d_ff]
//   h        [tokens, d_ff]; all bf16, fp16 or fp32, fp32 inside
//
// Three ways, chosen by what the operands allow:
//   stream    both row-major, or both column-major: a thread takes a vector of 16 bytes
//   patches   one row-, one column-major: a thread takes a square patch and turns it in registers
//             (common/square_patch.cuh); tiles go in bands (common/raster.h), so that both
//             directions see long runs in flight
//   elements  anything else: odd widths, strides or addresses; one element a thread
//
// Traffic  6 B a 16-bit output element gated, 4 B plain; each byte once.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/kinds.cuh"
#include "activation/stream.cuh"
#include "common/cuda_check.h"
#include "common/element.cuh"
#include "common/raster.h"
#include "common/square_patch.cuh"
#include "common/tile.h"

namespace sparse24 {
namespace {

// ---- stream -----------------------------------------------------------------------------------

struct StreamForward {
  StreamOperand in;
  StreamOperand h;
  StreamExtent extent;
};

template <Activation kKind, bool kGated, typename T>
__global__ void __launch_bounds__(kStreamThreads)
    forward_stream_kernel(const __grid_constant__ StreamForward p) {
  const uint32_t vector = blockIdx.x * kStreamThreads + threadIdx.x;
  if (vector >= p.extent.vectors) return;
  const StreamPosition position = stream_position(vector, p.extent.per_line);
  const char* from = stream_address(p.in, position);
  float g[Vector<T>::kSize], x[Vector<T>::kSize];
  const uint4 gate = stream_load(from);
  if (kGated) Vector<T>::unpack(stream_load(from + p.in.half_bytes), x);
  Vector<T>::unpack(gate, g);
  SP24_UNROLL
  for (int i = 0; i < Vector<T>::kSize; ++i) {
    const float value = activate<kKind, sizeof(T) == 2>(g[i]).value;
    g[i] = kGated ? value * x[i] : value;
  }
  store16(const_cast<char*>(stream_address(p.h, position)), Vector<T>::pack(g));
}

struct LaunchStream {
  const ActivationArgs& args;
  Layout layout;
  cudaStream_t stream;

  template <Activation kKind>
  void operator()() const {
    with_type(args.h.dtype, [this](auto zero) {
      args.gated ? launch<kKind, true, decltype(zero)>() : launch<kKind, false, decltype(zero)>();
    });
  }
  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    const int64_t d_ff = args.h.cols;
    const StreamForward p = {stream_operand(args.gate_up, layout, d_ff),
                             stream_operand(args.h, layout, d_ff), stream_extent(args.h, layout)};
    forward_stream_kernel<kKind, kGated, T><<<p.extent.blocks(), kStreamThreads, 0, stream>>>(p);
  }
};

// ---- patches ----------------------------------------------------------------------------------

struct PatchForward {
  PatchOperand in, h;
  int tokens, d_ff;
  uint32_t tile_rows, tile_cols;
  Activation kind;
};

template <bool kGated, typename T>
__global__ void __launch_bounds__(kTileThreads, 5)
    forward_patch_kernel(const __grid_constant__ PatchForward p) {
  constexpr int kSide = kVectorSize<T>;
  const TileIndex tile = raster_tile(blockIdx.x, p.tile_rows, p.tile_cols, kMixedBand);
  const PatchOrigin origin = patch_origin(Walk::kSquare, false, threadIdx.x);
  const int token = (static_cast<int>(tile.row) * kTileRows + origin.row) / kPatch * kSide;
  const int feature = (static_cast<int>(tile.col) * kTileCols + origin.col) / kPatch * kSide;
  if (token >= p.tokens || feature >= p.d_ff)
    return;  // patches are inside or outside, as both extents allow vectors

  const char* from = patch_address<T>(p.in, token, feature);
  SquarePatch<T> gate = load_lines<T>(from, p.in.line_bytes, kSide), up;
  if (kGated) up = load_lines<T>(from + p.in.half_bytes, p.in.line_bytes, kSide);
  // Elementwise work does not care for the direction: lines stay as they came, and h is turned on
  // its way out.
  SP24_UNROLL
  for (int i = 0; i < kSide; ++i) {
    with_kind(p.kind, [&](auto kind) {  // once a line: see backward_patch
      float x[kSide];
      SP24_UNROLL
      for (int j = 0; j < kSide; ++j) {
        const float value =
            activate<decltype(kind)::value, sizeof(T) == 2>(patch_value(gate, i, j)).value;
        x[j] = kGated ? value * patch_value(up, i, j) : value;
      }
      SP24_UNROLL
      for (int w = 0; w < 4; ++w) gate.word[i][w] = patch_word<T>(&x[w * kSide / 4]);
    });
  }
  if (p.in.column_major) turn(gate);
  store_patch(p.h, patch_address<T>(p.h, token, feature), kSide, gate);
}

template <typename T>
void launch_patches(const ActivationArgs& args, Layout in, Layout out, cudaStream_t stream) {
  constexpr int kSide = kVectorSize<T>;
  const int64_t d_ff = args.h.cols;
  const uint32_t tile_rows =
      static_cast<uint32_t>(round_up(args.h.rows / kSide * kPatch, kTileRows) / kTileRows);
  const uint32_t tile_cols =
      static_cast<uint32_t>(round_up(d_ff / kSide * kPatch, kTileCols) / kTileCols);
  const PatchForward p = {patch_operand(args.gate_up, in, d_ff),
                          patch_operand(args.h, out, d_ff),
                          static_cast<int>(args.h.rows),
                          static_cast<int>(d_ff),
                          tile_rows,
                          tile_cols,
                          args.kind};
  const auto kernel = args.gated ? forward_patch_kernel<true, T> : forward_patch_kernel<false, T>;
  kernel<<<tile_rows * tile_cols, kTileThreads, 0, stream>>>(p);
}

// ---- elements ---------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kElementThreads)
    forward_element_kernel(ConstMatrix in, Matrix h, bool gated, Activation kind) {
  ElementIndex at;
  if (!element_index(h.rows, h.cols, in.row_stride < in.col_stride, at)) return;
  const float gate = to_float(element<const T>(in, at.row, at.col));
  const float up = gated ? to_float(element<const T>(in, at.row, at.col + h.cols)) : 1.0f;
  with_kind(kind, [&](auto kind_constant) {
    const float value = activate<decltype(kind_constant)::value, sizeof(T) == 2>(gate).value;
    element<T>(h, at.row, at.col) = from_float<T>(gated ? value * up : value);
  });
}

}  // namespace

namespace cuda {

void activation_forward(const ActivationArgs& args, cudaStream_t stream) {
  if (args.h.rows == 0 || args.h.cols == 0) return;
  check_extents32(args.gate_up.rows, args.gate_up.cols, "gate_up");
  const Layout in = vector_layout(args.gate_up, args.gated ? 2 : 1), out = vector_layout(args.h);
  if (in == Layout::kStrided || out == Layout::kStrided) {
    with_type(args.h.dtype, [&](auto zero) {
      forward_element_kernel<decltype(zero)>
          <<<element_blocks(args.h), kElementThreads, 0, stream>>>(args.gate_up, args.h, args.gated,
                                                                   args.kind);
    });
  } else if (in == out) {
    with_activation(args.kind, LaunchStream{args, in, stream});
  } else {
    with_type(args.h.dtype,
              [&](auto zero) { launch_patches<decltype(zero)>(args, in, out, stream); });
  }
  SP24_CHECK_LAUNCH("activation_forward of ", name_of(args.h.dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
