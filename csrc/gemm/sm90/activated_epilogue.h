// activated_epilogue.h: accumulators to the product and to the activation of it, h, in one pass.
//
//   plain   x(m, n) = [scale *] acc [+ bias(m)], rounded   [n, m], m contiguous
//           h(m, n) = act(x(m, n))               [n, m]
//   gated   gate_up, likewise                    [n, 2 d_ff], gate | up
//           h(f, n) = act(gate_up(f, n)) * gate_up(d_ff + f, n)     [n, d_ff]
//
// h is made of rounded values: it has the bits of activation_forward.
//
// Work     a warpgroup has 64 features, or 32 of gate and of up (gated_rows.h). It stages boxes of
//          4 KB, one of each output, in one of two buffers; one thread stores them by TMA while the
//          next tokens are converted. The other warpgroup multiplies meanwhile.
// Bytes    of an element of h: 4 written, gated 6; the product alone writes 2, gated 4, and a pass
//          of its own then reads as much and writes 2.
// Banks    lines of 128 or 64 bytes; units of 16 are exchanged by the swizzle that TMA undoes.
#pragma once

#include "activation/functions.h"
#include "activation/kinds.cuh"
#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "gemm/sm90/warpgroup.h"

namespace sparse24::gemm::sm90 {

template <typename Element_, typename TileShape, bool kGated, bool kScaled>
class ActivatedEpilogue {
 public:
  using Element = Element_;
  static_assert(sizeof(Element) == 2);
  static constexpr int kTileM = cute::size<0>(TileShape{});
  static constexpr int kTileN = cute::size<1>(TileShape{});
  static constexpr int kFeatures = kGated ? kWarpgroupRows / 2 : kWarpgroupRows;  // of a warpgroup
  static constexpr int kChunkN = kGated ? 64 : 32;
  static constexpr int kChunks = kTileN / kChunkN;
  static constexpr int kBuffers = 2;
  static_assert(kTileM == kWarpgroupRows * kMultiplyingWarpgroups && kChunks % kBuffers == 0);

  using Box = cute::Shape<cute::Int<kFeatures>, cute::Int<kChunkN>>;
  using SmemAtom = cute::conditional_t<kGated, cute::GMMA::Layout_MN_SW64_Atom<Element>,
                                       cute::GMMA::Layout_MN_SW128_Atom<Element>>;
  using SmemLayout = decltype(cute::tile_to_shape(SmemAtom{}, Box{}));
  static constexpr int kLineBytes = kFeatures * sizeof(Element);
  static constexpr int kBoxBytes = kLineBytes * kChunkN;
  static_assert(cute::cosize_v<SmemLayout> * sizeof(Element) == kBoxBytes);

  using TmaStore = decltype(cute::make_tma_copy(
      cute::SM90_TMA_STORE{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<Element*>(nullptr)),
                        cute::make_layout(cute::make_shape(int32_t(0), int32_t(0)),
                                          cute::Stride<cute::_1, int64_t>{})),
      SmemLayout{}, Box{}, cute::_1{}));

  struct Arguments {
    Element* out = nullptr;  // gate_up, or x
    int64_t out_ld = 0;
    Element* h = nullptr;
    int64_t h_ld = 0;
    const Element* bias = nullptr;
    Activation activation = Activation::kSilu;
    Scales scales = {};
  };
  struct Params {
    TmaStore out, h;
    const Element* bias;
    Activation activation;
    Scales scales;
  };
  // Box 0 is of gate, or of x.
  static constexpr int kUp = 1, kH = kGated ? 2 : 1, kBoxes = kH + 1;
  struct TensorStorage {
    alignas(1024) char staged[kMultiplyingWarpgroups][kBuffers][kBoxes][kBoxBytes];
  };

  static Params to_params(int m, int n, const Arguments& args) {
    return {tma_store(args.out, m, n, args.out_ld),
            tma_store(args.h, kGated ? m / 2 : m, n, args.h_ld), args.bias, args.activation,
            args.scales};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(params.out.get_tma_descriptor());
    cute::prefetch_tma_descriptor(params.h.get_tma_descriptor());
  }

  CUTLASS_DEVICE ActivatedEpilogue(const Params& params, TensorStorage& shared)
      : params_(params), shared_(shared) {}

  template <typename Problem, typename Accumulators>
  CUTLASS_DEVICE void store(const Problem& problem, int m_tile, int n_tile,
                            const Accumulators& accumulators, int thread) {
    using namespace cute;
    static_assert(decltype(size(accumulators))::value == kTileN / 2,
                  "a thread holds pairs of columns of two rows");
    const int warpgroup =
        __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);  // uniform
    const AccumulatorPlace at(thread % cutlass::NumThreadsPerWarpGroup);
    const int m_rows = get<0>(problem), n_columns = get<1>(problem);
    const int width = kGated ? m_rows / 2 : m_rows;  // of h
    const int box = m_tile * kMultiplyingWarpgroups + warpgroup;
    // A cluster may reach past the last feature, where up begins: TMA clips what lies past up only.
    const int first_box = kGated && box * kFeatures >= width ? m_rows / kFeatures : box;
    const Tensor out = boxes(params_.out, m_rows, n_columns);
    const Tensor h = boxes(params_.h, width, n_columns);

    // Of this thread's two rows: features eight apart, or the same of gate and of up.
    float bias[2] = {0.0f, 0.0f};
    if (params_.bias != nullptr) {
      const int row = box * kFeatures + at.warp * (kGated ? 8 : 16) + at.lane / 4;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int m = row + half * (kGated ? width : 8);
        if (m < m_rows) bias[half] = static_cast<float>(params_.bias[m]);
      }
    }

    const float scale = kScaled ? params_.scales.product() : 1.0f;
    const auto value = [&](int i, int half) {
      const float sum = accumulators(i);
      return (kScaled ? scale * sum : sum) + bias[half];
    };

    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Words words[kBoxes];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kChunkN / 4; ++i) {  // pairs of tokens of both rows
        const int first = chunk * kChunkN / 2 + i * 2;
        const float pair[2] = {value(first, i % 2), value(first + 1, i % 2)};
        if constexpr (kGated) {
          words[i % 2][i / 2] = pack_pair<Element>(pair);
        } else {
          words[0][i] = pack_pair<Element>(pair);
        }
      }
      with_kind(params_.activation, [&](auto kind) {
        CUTLASS_PRAGMA_UNROLL
        for (int block = 0; block < kBlocks; ++block) {
          words[kH][block] =
              activated<decltype(kind)::value>(words[0][block], kGated ? words[kUp][block] : 0);
        }
      });

      auto& buffer = shared_.staged[warpgroup][chunk % kBuffers];
      if (at.is_first) tma_store_wait<kBuffers - 1>();  // what was stored from this buffer is read
      synchronize_warpgroup(warpgroup);
      CUTLASS_PRAGMA_UNROLL
      for (int of = 0; of < kBoxes; ++of) stage(buffer[of], at, words[of]);
      tma_store_fence();
      synchronize_warpgroup(warpgroup);
      if (at.is_first) {
        const int n_box = n_tile * kChunks + chunk;
        store_box(params_.out, buffer[0], out(_, _, first_box, n_box));
        if constexpr (kGated) {
          store_box(params_.out, buffer[kUp], out(_, _, width / kFeatures + box, n_box));
        }
        store_box(params_.h, buffer[kH], h(_, _, box, n_box));
        tma_store_arrive();
      }
    }
  }

  /// A block must outlive the reads of its shared memory.
  CUTLASS_DEVICE void finish() { cute::tma_store_wait<0>(); }

 private:
  // A warp's part of a box in registers: a word, two tokens of a feature, of each 8 x 8 block.
  static constexpr int kBlocks = kFeatures / 8 * (kChunkN / 8) / 4;
  using Words = uint32_t[kBlocks];

  static TmaStore tma_store(Element* to, int m, int n, int64_t ld) {
    using namespace cute;
    const auto layout =
        make_layout(make_shape(int32_t(m), int32_t(n)), Stride<_1, int64_t>{_1{}, ld});
    return make_tma_copy(SM90_TMA_STORE{}, make_tensor(make_gmem_ptr(to), layout), SmemLayout{},
                         Box{}, _1{});
  }

  CUTLASS_DEVICE static auto boxes(const TmaStore& tma, int m, int n) {
    using namespace cute;
    return local_tile(tma.get_tma_tensor(make_shape(m, n)), Box{}, make_coord(_, _));
  }

  template <typename GlobalBox>
  CUTLASS_DEVICE static void store_box(const TmaStore& tma, char* from, const GlobalBox& to) {
    sm90::store_box<Element, SmemLayout>(tma, from, to);
  }

  /// act(gate) * up, or act(x), of rounded pairs.
  template <Activation kKind>
  CUTLASS_DEVICE static uint32_t activated(uint32_t gate, uint32_t up) {
    using Pair = cutlass::Array<Element, 2>;
    const Pair &g = reinterpret_cast<const Pair&>(gate), &u = reinterpret_cast<const Pair&>(up);
    float h[2];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      h[i] = activate<kKind, true>(static_cast<float>(g[i])).value;
      if constexpr (kGated) h[i] *= static_cast<float>(u[i]);
    }
    return pack_pair<Element>(h);
  }

  /// Registers to one box. One stmatrix takes four blocks of eight tokens and eight features; a
  /// lane gives the address of one line of eight features: block lane / 8, token lane % 8.
  CUTLASS_DEVICE static void stage(char* box, const AccumulatorPlace& at, const Words& words) {
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kBlocks; first += 4) {
      const int block = first + at.lane / 8;
      const int line = (kGated ? block : block / 2) * 8 + at.lane % 8;
      const int unit = kGated ? at.warp ^ line / 2 % 4 : (at.warp * 2 + block % 2) ^ line % 8;
      cute::SM90_U16x8_STSM_T::copy(
          words[first], words[first + 1], words[first + 2], words[first + 3],
          *reinterpret_cast<cute::uint128_t*>(box + line * kLineBytes + unit * 16));
    }
  }

  const Params& params_;
  TensorStorage& shared_;
};

}  // namespace sparse24::gemm::sm90
