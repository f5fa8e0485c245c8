// epilogue.h: accumulators to memory, each warpgroup for itself: one stores, the other multiplies.
//
//   out(m, n) = acc [+ bias(m)] [+ out(m, n)] [+ factor * (1 - mask(m, n)) * weight(m, n)],
//   rounded once
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
// Decay     of weight gradients: weight and mask are read into registers too, a quarter of the tile
//           at a time (fp32: an eighth). Product and sum are rounded as masked_decay rounds them: a
//           fp32 gradient has the same bits as after that pass, for which it is read, if it
//           accumulates, and not added to in L2.
// Edges     TMA clips what lies outside of out; reads of bias, out, weight and mask are guarded.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/arch/memory.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "gemm/sm90/warpgroup.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm::sm90 {

template <typename Element_, typename Output_, typename TileShape, bool kMContiguous>
class WarpgroupEpilogue {
 public:
  using Element = Element_;
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
    const Element* bias = nullptr;
    bool accumulate = false;
    MaskedDecayTerm decay = {};
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

    DecayPlace decay{};
    if constexpr (!kMContiguous) {
      decay = decay_place(m_box * kRows, at.row, column, m_rows, n_columns);
    }
    const bool adds_in_l2 = kWide && params_.args.accumulate && decay.factor == 0.0f;
    if (params_.args.accumulate && !adds_in_l2) {
      add_existing(accumulators, row, column, m_rows, n_columns);
    }
    if constexpr (!kMContiguous) {
      if (decay.factor != 0.0f) {
        if (params_.args.decay.col_stride == 1) {
          add_decay<true>(accumulators, decay, n_columns);
        } else {
          add_decay<false>(accumulators, decay, n_columns);
        }
      }
    }

    const Tensor whole = params_.tma.get_tma_tensor(make_shape(m_rows, n_columns));
    const Tensor boxes = local_tile(whole, Box{}, make_coord(m_box, _));

    CUTLASS_PRAGMA_UNROLL
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float values[kChunkN / 8][2][2];  // [eight columns][row and row + 8][neighbouring columns]
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kChunkN / 8; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          values[j][i / 2][i % 2] = accumulators(chunk * kChunkN / 2 + j * 4 + i) + bias[i / 2];
        }
      }
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
        const Tensor box = boxes(_, _, n_tile * kChunks + chunk);
        if constexpr (kWide) {
          adds_in_l2 ? store_box(params_.tma_add, buffer, box)
                     : store_box(params_.tma, buffer, box);
        } else {
          store_box(params_.tma, buffer, box);
        }
        tma_store_arrive();
      }
    }
  }

  /// A block must outlive the reads of its shared memory.
  CUTLASS_DEVICE void finish() {
    cute::tma_store_wait<0>();  // nothing to wait for in threads that issued no store
  }

 private:
  using Values = float[kChunkN / 8][2][2];

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
    const Output* out = params_.args.out;
    const int64_t ld = params_.args.ld;
    constexpr int kBatch = kOctets / (kMContiguous || kWide ? 4 : 2);
    static_assert(kOctets % kBatch == 0);
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kOctets; first += kBatch) {
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
                                                  out + (n + i) * ld + m,
                                                  m < m_rows && n + i < n_columns);
            }
          } else {
            global_load<Pair, sizeof(Pair)>(existing[j][half], out + m * ld + n,
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

  /// A thread's place in the weight and the mask of masked decay, at the tile's first columns.
  struct DecayPlace {
    float factor;  // 0: nothing to add
    const Output* weight;
    const uint16_t* mask;
    int shift;                    // of the bits in a mask
    int rows_left, columns_left;  // down to and right of the place, up to the ends of the weight
  };

  /// `box_row` is the first row of the warpgroup's box, which lies in one weight as a whole.
  CUTLASS_DEVICE DecayPlace decay_place(int box_row, int row_in_box, int column, int m_rows,
                                        int n_columns) const {
    const MaskedDecayTerm& term = params_.args.decay;
    if (term.factor == nullptr) return {0.0f, nullptr, nullptr, 0, 0, 0};
    const int first_rows = int(term.first_rows), second = box_row >= first_rows;
    const uint32_t row = box_row + row_in_box - (second ? first_rows : 0), col = column;
    const int rows = second ? m_rows - first_rows : first_rows;
    const void* weight = second ? term.weight[1] : term.weight[0];
    const uint16_t* mask = second ? term.mask[1] : term.mask[0];
    return {*term.factor,
            static_cast<const Output*>(weight) + row * term.row_stride + col * term.col_stride,
            mask + int64_t{row / 4} * (n_columns / 4) + col / 4,
            int(row % 4 * 4 + col % 4),
            rows - int(row),
            n_columns - column};
  }

  /// Extents are multiples of 4 and a thread's columns begin at an even one: the mask's bits of
  /// both are in one block, inside or outside together. Eight rows or columns further on the shift
  /// is the same.
  template <bool kRowMajor, typename Accumulators>
  CUTLASS_DEVICE void add_decay(Accumulators& sums, const DecayPlace& at, int n_columns) const {
    using cutlass::arch::global_load;
    const int64_t ld = kRowMajor ? params_.args.decay.row_stride : params_.args.decay.col_stride;
    constexpr int kBatch = kOctets / (kWide ? 8 : 4);
    static_assert(kOctets % kBatch == 0);
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kOctets; first += kBatch) {
      Pair pairs[kBatch][2];
      uint16_t kept[kBatch][2];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const int n = (first + j) * 8;
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const bool inside = half * 8 < at.rows_left && n < at.columns_left;
          pairs[j][half] = {};
          kept[j][half] = 0xFFFF;
          global_load<uint16_t, 2>(kept[j][half], at.mask + half * 2 * (n_columns / 4) + n / 4,
                                   inside);
          if constexpr (kRowMajor) {
            global_load<Pair, sizeof(Pair)>(pairs[j][half], at.weight + half * 8 * ld + n, inside);
          } else {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 2; ++i) {
              global_load<Output, sizeof(Output)>(pairs[j][half].column[i],
                                                  at.weight + (n + i) * ld + half * 8, inside);
            }
          }
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& sum = sums((first + j) * 4 + i);
          const float pull =
              __fmul_rn(at.factor, static_cast<float>(pairs[j][i / 2].column[i % 2]));
          const float pulled = __fadd_rn(sum, pull);
          if ((kept[j][i / 2] >> (at.shift + i % 2) & 1) == 0) sum = pulled;
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
