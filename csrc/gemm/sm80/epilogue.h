// epilogue.h: sums to memory, each warp for itself.
//
//   out  = [scale *] sums [+ out] [+ masked decay] [+ bias(m)], rounded once
//   h    = act(out), or act(gate) * up of two halves, of rounded values: the bits of
//          activation_forward
//
// Work      a warp stages eight lines of 64 of its sums at a time, as fp32, where lines run as
//           those of out do. A lane then has eight neighbours of a line: 16 bytes of a 16-bit output.
//           Rows of out that are there, weights and masks are read in the same places. All that
//           differs between products is decided at run time, once for eight values: a tile of sums
//           takes a twentieth of the time of a K loop of 4096, and kernels are few.
// Memory    the chunks have a place of their own beside the stages, so that the next tile's
//           operands arrive meanwhile.
// Edges     what lies outside of out is not read and not written, in whole units of 16 bytes.
#pragma once

#include "activation/functions.h"
#include "activation/kinds.cuh"
#include "common/pair16.h"
#include "cutlass/cutlass.h"
#include "gemm/sm80/staged.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm::sm80 {

struct EpilogueParams {
  int m = 0, n = 0;
  int width = 0;  // of gate and of up, where there are both
  bool m_contiguous = true, float_out = false, accumulate = false;
  void* out = nullptr;
  int64_t out_ld = 0;
  const void* bias = nullptr;
  MaskedDecayTerm decay;
  GemmEpilogue kind = GemmEpilogue::kPlain;
  Activation activation = Activation::kSilu;
  void* h = nullptr;
  int64_t h_ld = 0;
  const float* lhs_scale = nullptr;  // of 8-bit operands, in device memory; null: 1
  const float* rhs_scale = nullptr;
};

/// `Element` is of 16-bit outputs and the bias, kElementBytes of the operands; kNContiguous: lines
/// of out may run along n, too.
template <typename Element, int kElementBytes, bool kNContiguous>
class Epilogue {
 public:
  static constexpr int kFragmentsN = sm80::kFragmentsNOf<kElementBytes>;
  using Sums = float[kFragmentsM][kFragmentsN][4];

  /// m0, n0: of the tile. `chunk` is the warp's own memory.
  CUTLASS_DEVICE Epilogue(const EpilogueParams& params, float* chunk, int m0, int n0, int warp_m,
                          int warp_n, int lane)
      : params_(params),
        chunk_(chunk),
        m0_(m0),
        row_(warp_m * kWarpM),
        n_(n0 + warp_n * kWarpNOf<kElementBytes>),
        lane_(lane) {}

  CUTLASS_DEVICE void store(Sums& sums) const {
    if constexpr (kElementBytes == 1) scale(sums);
    if constexpr (kNContiguous) {
      if (!params_.m_contiguous) return store_lines<false>(sums);
    }
    if (params_.bias != nullptr) add_bias(sums);
    store_lines<true>(sums);
  }

 private:
  template <bool kMContiguous>
  static constexpr int kUnits =  // of a line
      (kMContiguous ? kWarpM : kWarpNOf<kElementBytes>) / kUnitElements;
  template <bool kMContiguous>
  static constexpr int kChunks = kMContiguous ? kFragmentsN : 2 * kFragmentsM;
  struct Unit {
    float value[kUnitElements];
  };
  /// A unit's place in out: those that follow it in its row are inside up to column `cols`.
  struct Place {
    int64_t row;
    int64_t col;
    int cols;
  };

  CUTLASS_DEVICE void scale(Sums& sums) const {
    const float* const lhs = params_.lhs_scale;
    const float* const rhs = params_.rhs_scale;
    const float factor = (lhs == nullptr ? 1.0f : *lhs) * (rhs == nullptr ? 1.0f : *rhs);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kFragmentsM * kFragmentsN * 4; ++i) (&sums[0][0][0])[i] *= factor;
  }

  CUTLASS_DEVICE void add_bias(Sums& sums) const {
    CUTLASS_PRAGMA_UNROLL
    for (int m16 = 0; m16 < kFragmentsM; ++m16) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row_ + m16 * 16 + half * 8 + lane_ / 4;
        if (!is_source_row(m0_, row, params_.width, params_.m)) continue;
        const float bias = to_float(
            static_cast<const Element*>(params_.bias)[source_row(m0_, row, params_.width)]);
        CUTLASS_PRAGMA_UNROLL
        for (int n8 = 0; n8 < kFragmentsN; ++n8) {
          sums[m16][n8][2 * half] += bias;
          sums[m16][n8][2 * half + 1] += bias;
        }
      }
    }
  }

  template <bool kMContiguous>
  CUTLASS_DEVICE void store_lines(const Sums& sums) const {
    constexpr int kUnits = Epilogue::kUnits<kMContiguous>, kPasses = kChunkLines * kUnits / 32;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int chunk = 0; chunk < kChunks<kMContiguous>; ++chunk) {
      __syncwarp();
      switch (chunk) {  // sums are registers: each chunk has code of its own
        case 0: stage<kMContiguous, 0>(sums); break;
        case 1: stage<kMContiguous, 1>(sums); break;
        case 2: stage<kMContiguous, 2>(sums); break;
        case 3: stage<kMContiguous, 3>(sums); break;
        case 4: stage<kMContiguous, 4>(sums); break;
        case 5: stage<kMContiguous, 5>(sums); break;
        case 6: stage<kMContiguous, 6>(sums); break;
        default: stage<kMContiguous, 7>(sums);
      }
      static_assert(kChunks<kMContiguous> <= 8);
      __syncwarp();
      CUTLASS_PRAGMA_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const int line = pass * (kChunkLines / kPasses) + lane_ / kUnits, unit = lane_ % kUnits;
        store_unit<kMContiguous>(chunk, line, unit);
      }
    }
  }

  /// Along m, a chunk is eight columns n of all rows; along n, eight rows of all columns.
  template <bool kMContiguous, int kChunk>
  CUTLASS_DEVICE void stage(const Sums& sums) const {
    constexpr int kStride = kChunkStride<kMContiguous>;
    const int g = lane_ / 4, q = lane_ % 4;
    if constexpr (kChunk >= kChunks<kMContiguous>) {
      return;
    } else if constexpr (kMContiguous) {
      CUTLASS_PRAGMA_UNROLL
      for (int m16 = 0; m16 < kFragmentsM; ++m16) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i)
          chunk_[(2 * q + i % 2) * kStride + m16 * 16 + i / 2 * 8 + g] = sums[m16][kChunk][i];
      }
    } else {
      constexpr int kM16 = kChunk / 2, kHalf = kChunk % 2;
      CUTLASS_PRAGMA_UNROLL
      for (int n8 = 0; n8 < kFragmentsN; ++n8) {
        *reinterpret_cast<float2*>(chunk_ + g * kStride + n8 * 8 + 2 * q) =
            make_float2(sums[kM16][n8][2 * kHalf], sums[kM16][n8][2 * kHalf + 1]);
      }
    }
  }

  template <bool kMContiguous>
  CUTLASS_DEVICE void store_unit(int chunk, int line, int unit) const {
    Place at;
    if constexpr (kMContiguous) {
      const int row = row_ + unit * kUnitElements;
      at = {n_ + chunk * kChunkLines + line, source_row(m0_, row, params_.width), params_.m};
      if (at.row >= params_.n || !is_source_row(m0_, row, params_.width, params_.m)) return;
    } else {
      at = {m0_ + row_ + chunk * kChunkLines + line, n_ + unit * kUnitElements, params_.n};
      if (at.row >= params_.m || at.col >= at.cols) return;
    }
    const float* staged = chunk_ + line * kChunkStride<kMContiguous>;
    Unit values = read(staged, unit);
    if (params_.accumulate) add_existing(values, at);
    const float* factor = params_.decay.factor;
    if (factor != nullptr && *factor != 0.0f) {
      params_.float_out ? add_decay<float>(values, at, *factor)
                        : add_decay<Element>(values, at, *factor);
    }
    if (params_.float_out) {
      store_floats(values, at);
      return;
    }
    const uint4 rounded = round(values);
    *out<Element, uint4>(at) = rounded;
    if (kMContiguous && params_.kind != GemmEpilogue::kPlain) {
      const bool gated = params_.kind == GemmEpilogue::kGate;
      constexpr int kUp = kUnits<true> / 2;
      if (gated && unit >= kUp) return;  // of up: who has gate reads it
      const uint4 up = gated ? round(read(staged, unit + kUp)) : uint4{};
      store_activated(at, rounded, up, gated);
    }
  }

  CUTLASS_DEVICE static Unit read(const float* line, int unit) {
    Unit values;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kUnitElements; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(line + unit * kUnitElements + i);
      values.value[i] = four.x, values.value[i + 1] = four.y;
      values.value[i + 2] = four.z, values.value[i + 3] = four.w;
    }
    return values;
  }

  CUTLASS_DEVICE static uint4 round(const Unit& values) {
    const float* v = values.value;
    return {make_pair16<Element>(v[0], v[1]), make_pair16<Element>(v[2], v[3]),
            make_pair16<Element>(v[4], v[5]), make_pair16<Element>(v[6], v[7])};
  }

  template <typename T, typename Vector>
  CUTLASS_DEVICE Vector* out(const Place& at) const {
    return reinterpret_cast<Vector*>(static_cast<T*>(params_.out) + at.row * params_.out_ld +
                                     at.col);
  }

  CUTLASS_DEVICE void add_existing(Unit& values, const Place& at) const {
    float* v = values.value;
    if (!params_.float_out) {
      const uint4 existing = *out<Element, uint4>(at);
      const uint32_t words[4] = {existing.x, existing.y, existing.z, existing.w};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        v[2 * i] += low_value<Element>(words[i]);
        v[2 * i + 1] += high_value<Element>(words[i]);
      }
      return;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kUnitElements; i += 4) {
      if (at.col + i >= at.cols) continue;
      const float4 existing = out<float, float4>(at)[i / 4];
      v[i] += existing.x, v[i + 1] += existing.y, v[i + 2] += existing.z, v[i + 3] += existing.w;
    }
  }

  CUTLASS_DEVICE void store_floats(const Unit& values, const Place& at) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kUnitElements; i += 4) {
      const float* v = values.value + i;
      if (at.col + i < at.cols) out<float, float4>(at)[i / 4] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }

  /// Rows and columns of out are those of the weight, or of two weights one after the other, and
  /// multiples of 4: four neighbours share a mask. Product and sum are rounded as masked_decay
  /// rounds them.
  template <typename T>
  CUTLASS_DEVICE void add_decay(Unit& values, const Place& at, float factor) const {
    const MaskedDecayTerm& decay = params_.decay;
    const bool second = at.row >= decay.first_rows;
    const int64_t row = at.row - (second ? decay.first_rows : 0);
    const T* weight = static_cast<const T*>(second ? decay.weight[1] : decay.weight[0]) +
                      row * decay.row_stride + at.col * decay.col_stride;
    const uint16_t* mask =
        (second ? decay.mask[1] : decay.mask[0]) + row / 4 * (at.cols / 4) + at.col / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int four = 0; four < kUnitElements; four += 4) {
      if (at.col + four >= at.cols) continue;
      const uint32_t kept = mask[four / 4] >> (row % 4 * 4);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float pull = __fmul_rn(factor, to_float(weight[(four + i) * decay.col_stride]));
        const float pulled = __fadd_rn(values.value[four + i], pull);
        if ((kept >> i & 1) == 0) values.value[four + i] = pulled;
      }
    }
  }

  CUTLASS_DEVICE void store_activated(const Place& at, const uint4& gate, const uint4& up,
                                      bool gated) const {
    const uint32_t g[4] = {gate.x, gate.y, gate.z, gate.w}, u[4] = {up.x, up.y, up.z, up.w};
    uint32_t h[4];
    with_kind(params_.activation, [&](auto kind) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float low = activate<decltype(kind)::value, true>(low_value<Element>(g[i])).value;
        float high = activate<decltype(kind)::value, true>(high_value<Element>(g[i])).value;
        if (gated) low *= low_value<Element>(u[i]), high *= high_value<Element>(u[i]);
        h[i] = make_pair16<Element>(low, high);
      }
    });
    Element* to = static_cast<Element*>(params_.h) + at.row * params_.h_ld + at.col;
    *reinterpret_cast<uint4*>(to) = uint4{h[0], h[1], h[2], h[3]};
  }

  const EpilogueParams& params_;
  float* chunk_;
  int m0_, row_, n_, lane_;
};

}  // namespace sparse24::gemm::sm80
