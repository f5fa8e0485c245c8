// forward.cu: h = act(gate) * up, or act(x), in every mix of layouts.
//
//   gate_up  [tokens, 2*d_ff] = [gate | up], or x [tokens, d_ff]
//   h        [tokens, d_ff]; all bf16, fp16 or fp32, fp32 inside
//
// Three ways, chosen by what the operands allow:
//   stream    both row-major, or both column-major: a thread takes a vector of 16 bytes
//   tiles     one row-, one column-major: through shared memory, patches turned in registers
//             (tile_pass.cuh)
//   elements  anything else: odd widths, strides or addresses; one element a thread
//
// Traffic  6 B a 16-bit output element gated, 4 B plain; each byte once. Gated, 8192 x 11008:
//          541 MB, 129 us at 4.2 TB/s.
#include <cuda_runtime.h>

#include "activation/activation_cuda.h"
#include "activation/kinds.cuh"
#include "activation/stream.cuh"
#include "activation/tile_pass.cuh"
#include "common/cuda_check.h"
#include "common/element.cuh"

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

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    const int64_t d_ff = args.h.cols;
    const StreamForward p = {stream_operand(args.gate_up, layout, d_ff),
                             stream_operand(args.h, layout, d_ff), stream_extent(args.h, layout)};
    forward_stream_kernel<kKind, kGated, T><<<p.extent.blocks(), kStreamThreads, 0, stream>>>(p);
  }
};

// ---- tiles ------------------------------------------------------------------------------------

template <typename T>
using ForwardTile = PatchTile<T, 16, 16>;

template <typename Operand>
struct TileForward {
  Operand gate, up, h;  // plain: no up
  TileWalk walk;
};

template <Activation kKind, bool kGated, typename T, typename Operand>
__global__ void __launch_bounds__(ForwardTile<T>::kThreads, 3)
    forward_tile_kernel(const __grid_constant__ TileForward<Operand> p) {
  if (!kRunsHere<Operand>) return;
  using Tile = ForwardTile<T>;
  extern __shared__ __align__(128) char staged[];  // gate, up; h in the place of gate
  __shared__ uint64_t arrived;
  const TileIndex tile = p.walk.tile();
  const int token = static_cast<int>(tile.row) * Tile::kTokens;
  const int feature = static_cast<int>(tile.col) * Tile::kFeatures;
  if (!kByEngine<Operand> || threadIdx.x == 0) {
    begin_loads<Operand>(&arrived, (kGated ? 2 : 1) * Tile::kBytes);
    load_tile<Tile>(staged, p.gate, &arrived, token, feature);
    if (kGated) load_tile<Tile>(staged + Tile::kBytes, p.up, &arrived, token, feature);
  }
  wait_for_loads<Operand>(&arrived);

  // Elementwise work does not care for the direction: h is turned on its way out.
  const typename Tile::Place place{};
  const bool column_major = p.gate.column_major;
  SquarePatch<T> h;
  SP24_UNROLL
  for (int i = 0; i < Tile::kSide; ++i) {
    const uint4 gate = Tile::read_line(staged, place, column_major, i);
    const uint4 up = kGated ? Tile::read_line(staged + Tile::kBytes, place, column_major, i) : gate;
    float g[Tile::kSide], x[Tile::kSide];
    Vector<T>::unpack(gate, g);
    Vector<T>::unpack(up, x);
    SP24_UNROLL
    for (int j = 0; j < Tile::kSide; ++j) {
      const float value = activate<kKind, sizeof(T) == 2>(g[j]).value;
      g[j] = kGated ? value * x[j] : value;
    }
    SP24_UNROLL
    for (int w = 0; w < 4; ++w) h.word[i][w] = patch_word<T>(&g[w * Tile::kSide / 4]);
  }
  if (column_major != p.h.column_major) turn(h);
  __syncthreads();  // gate has been read
  Tile::write(staged, place, p.h.column_major, h);
  fence_results<Operand>();
  __syncthreads();  // h is staged
  if (!kByEngine<Operand> || threadIdx.x == 0) {
    store_tile<Tile>(p.h, staged, token, feature);
    finish_stores<Operand>();
  }
}

struct LaunchTiles {
  const ActivationArgs& args;
  Layout in, out;
  cudaStream_t stream;

  template <Activation kKind, bool kGated, typename T>
  void launch() const {
    using Tile = ForwardTile<T>;
    const int64_t d_ff = args.h.cols;
    with_tile_operand([&](auto kind) {
      using Operand = typename decltype(kind)::Type;
      const TileForward<Operand> p = {
          tile_operand<Tile, Operand>(args.gate_up, in, 0, d_ff),
          tile_operand<Tile, Operand>(args.gate_up, in, kGated ? d_ff : 0, d_ff),
          tile_operand<Tile, Operand>(args.h, out, 0, d_ff),
          tile_walk<Tile>(args.h.rows, d_ff, out)};
      launch_tile_pass<Tile>(forward_tile_kernel<kKind, kGated, T, Operand>, p,
                             (kGated ? 2 : 1) * Tile::kBytes, stream);
    });
  }
};

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
  if (in == out && in != Layout::kStrided) {
    with_kernel(args.kind, args.gated, args.h.dtype, LaunchStream{args, in, stream});
  } else if (tiles_fit(args.gate_up, in) && tiles_fit(args.h, out)) {
    with_kernel(args.kind, args.gated, args.h.dtype, LaunchTiles{args, in, out, stream});
  } else {
    with_type(args.h.dtype, [&](auto zero) {
      forward_element_kernel<decltype(zero)>
          <<<element_blocks(args.h), kElementThreads, 0, stream>>>(args.gate_up, args.h, args.gated,
                                                                   args.kind);
    });
  }
  SP24_CHECK_LAUNCH("activation_forward of ", name_of(args.h.dtype), " gate_up [",
                    args.gate_up.rows, ", ", args.gate_up.cols, "]");
}

}  // namespace cuda
}  // namespace sparse24
