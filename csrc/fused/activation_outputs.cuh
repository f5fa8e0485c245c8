// activation_outputs.cuh: the activation of a layer, forward or backward, whose result leaves in
// several forms from one read (pack/tile_outputs.cuh).
//
//   forward    gate_up [tokens, 2*d_ff] (plain: d_ff)            -> h [tokens, d_ff]
//   backward   d_h [tokens, d_ff], gate_up                       -> d_gate_up [tokens, 2*d_ff]
//
// The result is rounded to 16 bits first, and every form is made of that: the bits are those of the
// plain pass followed by quantize and mvue_pack.
//
// Work     A block of 256 threads takes 128 tokens x 128 features of h, a thread 8 x 8: it loads
//          its patches of all operands at once, makes the results in their place, and hands one
//          half (gate, then up) after the other to its outputs.
// Traffic  Bytes an element of h, gated. Forward: 4 read; h 2, h8 1, h8_t 1, h packed 1.125. With
//          h8 and h8_t 6 in all: 8192 x 11008 takes 541 MB, 129 us at 4.2 TB/s.
//          Backward: 6 read; d_gate_up8 2, packed 2.25 in 16 bits, 1.25 in 8. FP8 9.25: 834 MB,
//          199 us; hybrid 10.25.
// Edges    Row-major operands in whole vectors, and packing as told in tile_outputs.cuh; else the
//          plain pass writes the result, and others read it again (activation_*_outputs.cu).
#pragma once

#include "activation/functions.h"
#include "fused/backward_rows.cuh"
#include "pack/pack_cuda.h"
#include "pack/tile_outputs.cuh"

namespace sparse24 {

struct ActivationParams {
  ConstMatrix d_h, gate_up;  // d_h: backward only
  Matrix h;                  // backward: recomputed where data is not null
  int lines =
      kPatch;  // at least those of a patch, and unknown to the compiler (backward_patch.cuh)
  TileOutputs to;
};

/// This thread's patches of gate and up; plain: of the input.
template <bool kGated, typename T>
__device__ __forceinline__ void load_gate_up(const ActivationParams& p, const PatchPlace& at,
                                             Patch16& gate, Patch16& up) {
  const int d_ff = static_cast<int>(p.gate_up.cols) / (kGated ? 2 : 1), feature = at.feature();
  gate = load_vectors<T>(p.gate_up, at.token(), feature, d_ff).lines;
  // A patch past the gate's end must not read up's beginning as gate, nor past up's end.
  const int end = feature < d_ff ? 2 * d_ff : 0;
  if (kGated) up = load_vectors<T>(p.gate_up, at.token(), feature + d_ff, end).lines;
}

template <Activation kKind, bool kGated, typename T>
__device__ __forceinline__ uint32_t forward_word(uint32_t gate, uint32_t up) {
  float low = activate<kKind, true>(low_value<T>(gate)).value;
  float high = activate<kKind, true>(high_value<T>(gate)).value;
  if constexpr (kGated) low *= low_value<T>(up), high *= high_value<T>(up);
  return make_pair16<T>(low, high);
}

template <Activation kKind, bool kGated, typename T, typename Packed>
__global__ void __launch_bounds__(kTile8Threads, 2)
    forward_outputs_kernel(const __grid_constant__ ActivationParams p) {
  __shared__ alignas(16) TileMemory<Packed> memory;
  const PatchPlace at = patch_place(p.to);
  DensePatch<T> h;
  Patch16 up = {};
  load_gate_up<kGated, T>(p, at, h.lines, up);
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    if (i >= p.lines) continue;  // a branch a line: see backward_patch.cuh
    SP24_UNROLL
    for (int w = 0; w < 4; ++w)
      h.lines.line[i][w] = forward_word<kKind, kGated, T>(h.lines.line[i][w], up.line[i][w]);
  }
  if (p.to.x16 != nullptr)
    store_vectors(p.to.x16, p.to.x16_ld, h.lines, at.token(), at.feature(), p.to.tokens,
                  p.to.features);
  write_outputs<T, Packed>(p.to, memory, h, at);
}

/// One half of the result, in all its forms.
template <typename T, typename Packed>
__device__ __forceinline__ void write_half(const ActivationParams& p, TileMemory<Packed>& memory,
                                           const DensePatch<T>& gradient, const PatchPlace& at) {
  if (p.to.x16 != nullptr)
    store_vectors(p.to.x16 + int64_t{at.half} * p.to.features, p.to.x16_ld, gradient.lines,
                  at.token(), at.feature(), p.to.tokens, p.to.features);
  write_outputs<T, Packed>(p.to, memory, gradient, at);
}

/// d_up waits in shared memory while d_gate is written: it would not fit in registers beside it.
struct Waiting {
  uint4 line[kPatch][kTile8Threads];

  __device__ __forceinline__ void put(const Patch16& patch, int i) {
    line[i][threadIdx.x] =
        make_uint4(patch.line[i][0], patch.line[i][1], patch.line[i][2], patch.line[i][3]);
  }
  __device__ __forceinline__ Patch16 take() const {
    Patch16 patch;
    SP24_UNROLL
    for (int i = 0; i < kPatch; ++i) {
      const uint4 v = line[i][threadIdx.x];
      patch.line[i][0] = v.x, patch.line[i][1] = v.y;
      patch.line[i][2] = v.z, patch.line[i][3] = v.w;
    }
    return patch;
  }
};
template <bool kGated>
constexpr int kWaitingBytes = kGated ? static_cast<int>(sizeof(Waiting)) : 0;

template <Activation kKind, bool kGated, typename T, typename Packed>
__global__ void __launch_bounds__(kTile8Threads, 2)
    backward_outputs_kernel(const __grid_constant__ ActivationParams p) {
  __shared__ alignas(16) TileMemory<Packed> memory;
  extern __shared__ __align__(16) char dynamic[];
  [[maybe_unused]] Waiting& waiting = *reinterpret_cast<Waiting*>(dynamic);
  PatchPlace at = patch_place(p.to);
  DensePatch<T> gradient;
  Patch16 up = {};
  load_gate_up<kGated, T>(p, at, gradient.lines, up);
  Patch16 d_h = load_vectors<T>(p.d_h, at.token(), at.feature(), p.to.features).lines;
  SP24_UNROLL
  for (int i = 0; i < kPatch; ++i) {
    if (i >= p.lines) continue;
    SP24_UNROLL
    for (int w = 0; w < 4; ++w)
      backward_word<kKind, kGated, T>(d_h.line[i][w], gradient.lines.line[i][w], up.line[i][w]);
    if constexpr (kGated) waiting.put(up, i);
  }
  if (p.h.data != nullptr)
    store_vectors(static_cast<uint16_t*>(p.h.data), p.h.row_stride, d_h, at.token(), at.feature(),
                  p.to.tokens, p.to.features);
  constexpr int kHalves = kGated ? 2 : 1;
#pragma unroll 1
  for (int half = 0; half < kHalves; ++half) {  // a loop: half the code
    at.half = half;
    write_half<T, Packed>(p, memory, gradient, at);
    if (half + 1 < kHalves) {
      __syncthreads();  // before shared memory is reused
      gradient.lines = waiting.take();
    }
  }
}

// ---- host -------------------------------------------------------------------------------------

/// Row-major in whole vectors? `parts` lie side by side; an absent matrix fits.
template <typename Pointer>
bool rows_fit(const MatrixView<Pointer>& m, int parts = 1) {
  return m.data == nullptr || vector_layout(m, parts) == Layout::kRowMajor;
}

/// Can a pass pack `features` (of each half) itself? Args: of forward or backward.
template <typename Args>
bool packing_fits(const Args& args, DType packed_dtype, int64_t features, bool halves) {
  if (args.packed == nullptr) return true;
  if (halves && features % kMetaBlock != 0) return false;  // a half must have whole blocks of E
  return is_float8(packed_dtype) || packing16_fits(args.packed, features);
}

inline void check_written(const Matrix& result, const char* name) {
  SP24_CHECK(result.data != nullptr, name,
             " must be given where one pass cannot make all outputs: that takes ",
             names_of(Types16{}),
             ", row-major in whole 16 bytes, and packing a gated gradient d_ff % 64 == 0; got ",
             name_of(result.dtype), " [", result.rows, ", ", result.cols, "]");
}

/// The result has been written; passes of their own make the other outputs from it.
template <typename Args>
void write_others(const Args& args, const Matrix& result, float* tile_sums, cudaStream_t stream) {
  MvueArgs mvue;
  mvue.dy = as_const(result), mvue.seed = args.seed, mvue.packed = args.packed, mvue.E = args.E;
  mvue.packed_dtype = args.packed_dtype, mvue.scale = args.scale, mvue.float8 = args.float8;
  mvue.tile_sums = tile_sums;
  if (args.packed == nullptr) return cuda::quantize({mvue.dy, mvue.float8}, stream);
  cuda::mvue_pack(mvue, stream);
}

}  // namespace sparse24
