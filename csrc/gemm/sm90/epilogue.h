// epilogue.h: accumulators to memory, each warpgroup for itself: one stores, the other multiplies.
//
//   out(m, n) = [scale *] acc [+ bias(m)] [+ out(m, n)] [+ masked decay(m, n)], rounded once
//
// Work      a warpgroup has 64 rows of the tile. It stages 64 x kChunkN of them, 8 KB, in one of
//           its three buffers; one thread stores them by TMA while the next chunk is converted.
//           Reading a buffer takes TMA long compared with filling it, hence three. Nothing here
//           waits for the other warpgroup.
// Layouts   stmatrix for 16-bit outputs, transposing where m is contiguous; plain stores for fp32.
//           16-byte units of a line of 128 bytes are exchanged by the line's number (the 128-byte
//           swizzle that TMA undoes), so that banks do not conflict.
// Existing  values of out: to fp32 ones TMA adds in L2, and nothing is read; subnormal numbers
//           become zero there. 16-bit ones are read straight into registers, half of the tile at
//           a time (a quarter where m is contiguous, or fp32 ones meet a decay), and added to the
//           accumulators: one rounding. A source tile in shared memory would cost every product a
//           stage.
// Decay     of weight gradients, in masked_decay.h. A fp32 output that meets one is read, if it
//           accumulates, and not added to in L2.
// Scale     of 8-bit operands: the product of both. It comes first: the rest is in units of out.
// Edges     TMA clips what lies outside of out; reads of bias and out are guarded.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/arch/memory.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "gemm/sm90/masked_decay.h"
#include "gemm/sm90/warpgroup.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm::sm90 {

template <typename Bias_, typename Output_, typename TileShape, bool kMContiguous, bool kDecays,
          bool kScaled>
class WarpgroupEpilogue {
 public:
  using Bias = Bias_;
  using Output = Output_;
  static constexpr int kTileM = cute::size<0>(TileShape{});
  static constexpr int kTileN = cute::size<1>(TileShape{});
  static constexpr int kRows = kWarpgroupRows, kWarpgroups = kMultiplyingWarpgroups;
  static constexpr int kChunkN = 128 / sizeof(Output);
  static constexpr int kChunks = kTileN / kChunkN;
  static constexpr int kBuffers = 3;
  static constexpr bool kWide = sizeof(Output) == 4;
  static_assert(kTileM == kRows * kWarpgroups && kTileN % kChunkN == 0);

  /// One buffer: lines of n with m contiguous (two blocks of 32 m for fp32), or lines of m with n
  /// contiguous. Lines are of 128 bytes.
  using SmemAtom = cute::conditional_t<kMContiguous, cute::GMMA::Layout_MN_SW128_Atom<Output>,
                                       cute::GMMA::Layout_K_SW128_Atom<Output>>;
  using Box = cute::Shape<cute::Int<kRows>, cute::Int<kChunkN>>;
  using SmemLayout =
      decltype(cute::tile_to_shape(SmemAtom{}, Box{},
                                   cute::conditional_t<kMContiguous, cute::Step<cute::_2, cute::_1>,
                                                       cute::Step<cute::_1, cute::_2>>{}));
  static constexpr int kBufferBytes = kRows * kChunkN * sizeof(Output);
  static_assert(cute::cosize_v<SmemLayout> * sizeof(Output) == kBufferBytes);

  using Stride = cute::conditional_t<kMContiguous, cute::Stride<cute::_1, int64_t>,
                                     cute::Stride<int64_t, cute::_1>>;
  template <typename Operation>
  using Tma = decltype(cute::make_tma_copy(
      Operation{},
      cute::make_tensor(cute::make_gmem_ptr(static_cast<Output*>(nullptr)),
                        cute::make_layout(cute::make_shape(int32_t(0), int32_t(0)), Stride{})),
      SmemLayout{}, Box{}, cute::_1{}));
  using TmaStore = Tma<cute::SM90_TMA_STORE>;
  using TmaAdd = Tma<cute::SM90_TMA_REDUCE_ADD>;

  struct Arguments {
    Output* out = nullptr;
    int64_t ld = 0;
    const Bias* bias = nullptr;
    bool accumulate = false;
    MaskedDecayTerm decay = {};
    Scales scales = {};
  };
  struct Nothing {};
  struct Params {
    TmaStore tma;
    cute::conditional_t<kWide, TmaAdd, Nothing> tma_add;
    Arguments args;
  };
  struct TensorStorage {
    alignas(1024) char staged[kWarpgroups][kBuffers][kBufferBytes];
  };

  static Params to_params(int m, int n, const Arguments& args) {
    using namespace cute;
    const auto layout = [&] {
      const auto shape = make_shape(int32_t(m), int32_t(n));
      if constexpr (kMContiguous) {
        return make_layout(shape, make_stride(_1{}, args.ld));
      } else {
        return make_layout(shape, make_stride(args.ld, _1{}));
      }
    }();
    const auto tma = [&](auto operation) {
      return make_tma_copy(operation, make_tensor(make_gmem_ptr(args.out), layout), SmemLayout{},
                           Box{}, _1{});
    };
    if constexpr (kWide) {
      return {tma(SM90_TMA_STORE{}), tma(SM90_TMA_REDUCE_ADD{}), args};
    } else {
      return {tma(SM90_TMA_STORE{}), {}, args};
    }
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(params.tma.get_tma_descriptor());
    if constexpr (kWide) cute::prefetch_tma_descriptor(params.tma_add.get_tma_descriptor());
  }

  CUTLASS_DEVICE WarpgroupEpilogue(const Params& params, TensorStorage& shared)
      : params_(params), shared_(shared) {}

  template <typename Problem, typename Accumulators>
  CUTLASS_DEVICE void store(const Problem& problem, int m_tile, int n_tile,
                            Accumulators& accumulators, int thread) {
    using namespace cute;
    static_assert(decltype(size(accumulators))::value == kTileN / 2,
                  "a thread holds pairs of columns of two rows");
    const int warpgroup =
        __shfl_sync(0xFFFFFFFF, thread / cutlass::NumThreadsPerWarpGroup, 0);  // uniform
    const AccumulatorPlace at(thread % cutlass::NumThreadsPerWarpGroup);
    const int m_rows = get<0>(problem), n_columns = get<1>(problem);
    const int m_box = m_tile * kWarpgroups + warpgroup;
    const int row = m_box * kRows + at.row, column = n_tile * kTileN + at.column;

    float bias[2] = {0.0f, 0.0f};
    if (params_.args.bias != nullptr) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int m = row + 8 * half;
        if (m < m_rows) bias[half] = static_cast<float>(params_.args.bias[m]);
      }
    }

    if constexpr (kScaled) {
      const float scale = params_.args.scales.product();
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(accumulators); ++i) accumulators(i) *= scale;
    }
    const bool adds_in_l2 = add_terms(accumulators, row, column, m_rows, n_columns);

    const Tensor whole = params_.tma.get_tma_tensor(make_shape(m_rows, n_columns));
    const Tensor boxes = local_tile(whole, Box{}, make_coord(m_box, _));

    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Values values;
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kChunkN / 8; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          values[j][i / 2][i % 2] = accumulators(chunk * kChunkN / 2 + j * 4 + i) + bias[i / 2];
        }
      }
      store_chunk(chunk, values, at, warpgroup, boxes(_, _, n_tile * kChunks + chunk), adds_in_l2);
    }
  }

  /// A block must outlive the reads of its shared memory.
  CUTLASS_DEVICE void finish() {
    cute::tma_store_wait<0>();  // nothing to wait for in threads that issued no store
  }

 private:
  using Values = float[kChunkN / 8][2][2];  // [eight columns][row and row + 8][its neighbours]

  /// One buffer filled and given to TMA.
  template <typename GlobalBox>
  CUTLASS_DEVICE void store_chunk(int chunk, const Values& values, const AccumulatorPlace& at,
                                  int warpgroup, const GlobalBox& box, bool adds_in_l2) {
    using namespace cute;
    char* buffer = shared_.staged[warpgroup][chunk % kBuffers];
    if (chunk == 0 || chunk >= kBuffers) {
      // The last store from this buffer has read it: one of the tile before, or of kBuffers ago.
      if (at.is_first) {
        if (chunk == 0) {
          tma_store_wait<0>();
        } else {
          tma_store_wait<kBuffers - 1>();
        }
      }
      synchronize_warpgroup(warpgroup);
    }
    stage(buffer, at, values);
    tma_store_fence();
    synchronize_warpgroup(warpgroup);
    if (at.is_first) {
      if constexpr (kWide) {
        adds_in_l2 ? store_box(params_.tma_add, buffer, box) : store_box(params_.tma, buffer, box);
      } else {
        store_box(params_.tma, buffer, box);
      }
      tma_store_arrive();
    }
  }

  /// What is in memory to the sums: values of out, and decay. Returns whether values of out are
  /// left to L2, which adds what is stored.
  template <typename Accumulators>
  CUTLASS_DEVICE bool add_terms(Accumulators& sums, int row, int column, int m_rows,
                                int n_columns) const {
    const Arguments& args = params_.args;
    const bool decays = kDecays && args.decay.factor != nullptr && *args.decay.factor != 0.0f;
    const bool adds_in_l2 = kWide && args.accumulate && !decays;
    if (args.accumulate && !adds_in_l2) add_existing(sums, row, column, m_rows, n_columns);
    if constexpr (kDecays) {
      if (decays) {
        MaskedDecayAdder<Output, kTileN, kMContiguous>(args.decay, row, column, m_rows, n_columns)
            .add_to(sums);
      }
    }
    return adds_in_l2;
  }

  template <typename TmaCopy, typename GlobalBox>
  CUTLASS_DEVICE static void store_box(const TmaCopy& tma, char* from, const GlobalBox& to) {
    sm90::store_box<Output, SmemLayout>(tma, from, to);
  }

  struct alignas(2 * sizeof(Output)) Pair {
    Output column[2];
  };
  static constexpr int kOctets = kTileN / 8;  // of columns: a thread has a pair of each, twice

  /// Batches are as large as registers allow beside the accumulators: larger ones spill, also in
  /// the main loop. A pair may reach one past an odd width, into what is scratch.
  template <typename Accumulators>
  CUTLASS_DEVICE void add_existing(Accumulators& sums, int row, int column, int m_rows,
                                   int n_columns) const {
    using cutlass::arch::global_load;  // predicated, and kept in order
    const int64_t ld = params_.args.ld;
    constexpr int kBatch = kOctets / (kMContiguous || kWide ? 4 : 2);
    static_assert(kOctets % kBatch == 0);
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kOctets; first += kBatch) {
      const int64_t n_first = column + first * 8;
      const Output* out = computed_here(params_.args.out +
                                        (kMContiguous ? n_first * ld + row : row * ld + n_first));
      Pair existing[kBatch][2];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int m = row + half * 8, n = column + (first + j) * 8;
          existing[j][half] = {};
          if constexpr (kMContiguous) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 2; ++i) {
              global_load<Output, sizeof(Output)>(existing[j][half].column[i],
                                                  out + (j * 8 + i) * ld + half * 8,
                                                  m < m_rows && n + i < n_columns);
            }
          } else {
            global_load<Pair, sizeof(Pair)>(existing[j][half], out + half * 8 * ld + j * 8,
                                            m < m_rows && n < n_columns);
          }
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          sums((first + j) * 4 + i) += static_cast<float>(existing[j][i / 2].column[i % 2]);
        }
      }
    }
  }

  CUTLASS_DEVICE static char* unit(char* buffer, int line, int unit) {
    return buffer + line * 128 + (unit ^ line % 8) * 16;
  }

  /// Registers to one buffer, in the order of SmemLayout.
  CUTLASS_DEVICE static void stage(char* buffer, const AccumulatorPlace& at, const Values& values) {
    if constexpr (!kWide) {
      // One stmatrix takes two blocks of eight columns, both of rows row and row + 8. A lane gives
      // the address of one line of eight elements: matrix lane / 8, line lane % 8.
      const int matrix = at.lane / 8, line = at.lane % 8;
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kChunkN / 8; j += 2) {
        const uint32_t words[4] = {pack_pair<Output>(values[j][0]), pack_pair<Output>(values[j][1]),
                                   pack_pair<Output>(values[j + 1][0]),
                                   pack_pair<Output>(values[j + 1][1])};
        if constexpr (kMContiguous) {
          char* to = unit(buffer, (j + matrix / 2) * 8 + line, at.warp * 2 + matrix % 2);
          cute::SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3],
                                        *reinterpret_cast<cute::uint128_t*>(to));
        } else {
          char* to = unit(buffer, at.warp * 16 + matrix % 2 * 8 + line, j + matrix / 2);
          cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3],
                                        *reinterpret_cast<cute::uint128_t*>(to));
        }
      }
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kChunkN / 8; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int m = at.row + half * 8, n = j * 8 + at.column;
          if constexpr (kMContiguous) {
            char* block = buffer + m / 32 * (kChunkN * 128);
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 2; ++i) {
              *reinterpret_cast<float*>(unit(block, n + i, m % 32 / 4) + m % 4 * 4) =
                  values[j][half][i];
            }
          } else {
            *reinterpret_cast<float2*>(unit(buffer, m, n / 4) + n % 4 * 4) =
                make_float2(values[j][half][0], values[j][half][1]);
          }
        }
      }
    }
  }

  const Params& params_;
  TensorStorage& shared_;
};

}  // namespace sparse24::gemm::sm90
