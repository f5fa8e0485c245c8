// mainloop.h: the K loop of the sparse GEMM by mma.sp, for sm_80, 86 and 89.
//
// Work       a warp has 64 x 64 of the tile; 256x128 has eight of them. All threads copy, and
//            multiply the K tile that is there. Halfway through a K tile the warps have all of it
//            in registers and meet: from there on its stage is filled anew, with the K tile that is
//            as many ahead as there are stages. So copies have the time of two K tiles where there
//            are three stages.
// Stages     32 KB a K tile of 64, 16 of either operand: four on an A100 (163 KB a block), three on
//            a 3090 or 4090 (99 KB). With E they would be two there, so E goes from memory straight
//            to registers; and the epilogue has no memory of its own. How many there are is a
//            run-time number.
// Registers  128 sums, 2 x 16 of lhs, 32 of rhs, 4 of E. Those of rhs are loaded anew for the next
//            step as soon as the instructions that read them have been issued, 28 others before
//            their use; those of lhs are read by all of a step, and have a second set. Words of E
//            are loaded behind the step that reads them, half a K tile before their use.
// 8 bits     e4m3, from sm_89 on. Along k a K tile of 128 has the bytes of one of 64 in 16 bits, E
//            twice as many. Hopper's tensor cores add such products with some 14 bits, and Ada's are
//            taken to do so: each instruction begins at zero, and its sums of 64 k are added to those of the tile in
//            fp32, by units that are idle otherwise: four additions a lane beside an instruction of
//            32 cycles (RTX 4090; 16 on professional cards). So one kernel serves fast and promoted
//            sums. A warp has 64 x 32, since 64 x 64 would spill, a tile of 128x128 eight warps; a
//            stage is of 24 KB: four on a 4090.
//
// Arithmetic, per multiprocessor and K tile of 64 (estimates from published peaks: dense 16-bit
// products with fp32 sums are 1024 multiply-adds a cycle on an A100, 256 on a 3090 or 4090, and 2:4
// ones twice that):
//            256x128: 2.1 M multiply-adds of the dense product. A100 1024 cycles, 3090 and 4090
//            4096. Shared memory: 8 warps x 12 KB read, 32 KB written, 128 B a cycle: 1024 cycles.
//            E comes through the same unit, 8 warps x 4 loads that touch 256 B each: 64 more. So an
//            A100 is bound by both alike; with 128x128 it would be 1152 and 64 for the same work.
//            L2: 34 KB, 33 B a cycle on an A100, where 128x128 would ask for 49 and L2 gives about
//            48.
#pragma once

#include "gemm/scheduler.h"
#include "gemm/sm80/loader.h"

namespace sparse24::gemm::sm80 {

template <DType kFormat_, Orientation kLhs, Orientation kRhs, int kTileM_, int kTileN_>
class Mainloop {
 public:
  static constexpr DType kFormat = kFormat_;
  static constexpr bool kFloat8 = is_float8(kFormat);
  static constexpr int kElementBytes = kFloat8 ? 1 : 2;
  static constexpr int kFragmentsN = sm80::kFragmentsNOf<kElementBytes>;
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static constexpr int kWarpsM = kTileM / kWarpM, kWarpsN = kTileN / kWarpNOf<kElementBytes>;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kTileK = sm80::kTileKOf<kElementBytes>;
  using Lhs = Staged<kLhs, kTileM, kTileK / 2, kElementBytes>;
  using Rhs = Staged<kRhs, kTileN, kTileK, kElementBytes>;
  static constexpr int kStageBytes = sm80::kStageBytes<Lhs, Rhs>;

  using Sums = float[kFragmentsM][kFragmentsN][4];
  using LhsLoader = OperandLoader<Lhs, kThreads>;
  using RhsLoader = OperandLoader<Rhs, kThreads>;
  using Meta = MetaReader<kElementBytes>;

  struct Params {
    Source lhs, rhs;
    MetaSource meta;
    int width = 0;  // of gate and of up, where rows of lhs come in turns of both (staged.h)
    int stages = 0;
  };
  static Source lhs_of(const void* values, int64_t ld, int m, int packed_k, int width) {
    return LhsLoader::source_of(values, ld, m, packed_k, width == 0 ? LhsLoader::kStep : kTurn);
  }
  static Source rhs_of(const void* values, int64_t ld, int n, int k) {
    return RhsLoader::source_of(values, ld, n, k, RhsLoader::kStep);
  }

  CUTLASS_DEVICE Mainloop(const Params& params, const char* ring, int thread)
      : params_(params),
        ring_(shared_address(ring)),
        lhs_place_(thread / 32 % kWarpsM, thread % 32),
        rhs_place_(thread / 32 / kWarpsM, thread % 32) {}

  /// The first K tiles of a part are on their way. The part before it must have been multiplied.
  CUTLASS_DEVICE void start(const Part& part, int thread) {
    const int m0 = part.m_tile * kTileM, n0 = part.n_tile * kTileN, line = lhs_.line_of(thread);
    if constexpr (Lhs::kKMajor) {
      static_assert(LhsLoader::kStep == 2 * kTurn, "a thread's lines are all of gate, or of up");
      const int width = params_.width;
      const int64_t end = width == 0 ? params_.lhs.extent : (line / kTurn % 2 + 1) * int64_t{width};
      lhs_.begin_along_k(params_.lhs, thread, source_row(m0, line, width),
                         width == 0 ? LhsLoader::kStep : kTurn, end, part.k_begin);
    } else {
      lhs_.begin_across_k(params_.lhs, thread, m0, part.k_begin);
    }
    if constexpr (Rhs::kKMajor) {
      rhs_.begin_along_k(params_.rhs, thread, n0 + rhs_.line_of(thread), RhsLoader::kStep,
                         params_.rhs.extent, part.k_begin);
    } else {
      rhs_.begin_across_k(params_.rhs, thread, n0, part.k_begin);
    }
    meta_.begin(params_.meta, thread % 32,
                source_row(m0, thread / 32 % kWarpsM * kWarpM, params_.width), part.k_begin);
    meta_.template read<0>(params_.meta, words_);
    read_last_words(part.k_tiles() > 1);
    for (int i = 0; i < params_.stages - 1; ++i) {
      copy<kCopyLhs>(i, i < part.k_tiles());
      copy<kCopyRhs>(i, i < part.k_tiles());
    }
  }

  /// Where the stage lies, in the ring, that nothing is copied to before multiply().
  CUTLASS_DEVICE int free_stage() const { return stage(params_.stages - 1) * kStageBytes; }

  /// The sums of a part that was started. Nothing of the ring is read any more when it returns, by
  /// no thread of the block.
  CUTLASS_DEVICE void multiply(Sums& sums, int k_tiles) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kFragmentsM * kFragmentsN * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
    Fragments f;
    wait_for_stage();
    copy_last<kCopyLhs>(k_tiles >= params_.stages);
    copy_last<kCopyRhs>(k_tiles >= params_.stages);
    load_lhs(f.lhs[0], 0);
    CUTLASS_PRAGMA_UNROLL
    for (int n8 = 0; n8 < kFragmentsN; ++n8) load_rhs(f.rhs[n8], n8, 0);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int left = k_tiles; left > 1; --left) multiply_tile<true>(sums, f, left);
    multiply_tile<false>(sums, f, 1);
  }

 private:
  struct Fragments {
    uint32_t lhs[kSteps][kFragmentsM][4];
    uint32_t rhs[kFragmentsN][4];
  };
  static_assert(kSteps == 2);

  enum CopyOf { kCopyLhs, kCopyRhs };

  /// The number of the stage that is `ahead` of the one that is read.
  CUTLASS_DEVICE int stage(int ahead) const {
    const int stage = read_ + ahead;
    return stage >= params_.stages ? stage - params_.stages : stage;
  }

  /// Half of what fills a stage; after rhs the stage is complete. Groups are counted in
  /// wait_for_stage: there is one a K tile, even where nothing is left to copy.
  template <CopyOf kOf>
  CUTLASS_DEVICE void copy(int ahead, bool any_left) {
    if (any_left) {
      const uint32_t to = ring_ + stage(ahead) * kStageBytes;
      if constexpr (kOf == kCopyLhs) lhs_.copy(params_.lhs, to);
      if constexpr (kOf == kCopyRhs) rhs_.copy(params_.rhs, to + Lhs::kBytes);
    }
    if constexpr (kOf == kCopyRhs) commit_copies();
  }
  template <CopyOf kOf>
  CUTLASS_DEVICE void copy_last(bool any_left) {
    copy<kOf>(params_.stages - 1, any_left);
  }

  /// The stage to be read next is there, for all threads; and all threads have read those before.
  CUTLASS_DEVICE void wait_for_stage() {
    static_assert(kMostStages == 4);
    switch (params_.stages) {
      case 4: wait_for_copies<2>(); break;
      case 3: wait_for_copies<1>(); break;
      default: wait_for_copies<0>();
    }
    __syncthreads();
  }

  /// `left`: K tiles from this one on; kMore: others than this one.
  template <bool kMore>
  CUTLASS_DEVICE void multiply_tile(Sums& sums, Fragments& f, int left) {
    load_lhs(f.lhs[1], 1);
    CUTLASS_PRAGMA_UNROLL
    for (int n8 = 0; n8 < kFragmentsN; ++n8) {
      multiply_column<0>(sums, f, n8);
      load_rhs(f.rhs[n8], n8, 1);
    }
    if constexpr (kMore) meta_.template read<0>(params_.meta, words_);
    wait_for_stage();
    read_ = stage(1);
    if constexpr (kMore) load_lhs(f.lhs[0], 0);
    CUTLASS_PRAGMA_UNROLL
    for (int n8 = 0; n8 < kFragmentsN; ++n8) {
      multiply_column<1>(sums, f, n8);
      if constexpr (kMore) {
        load_rhs(f.rhs[n8], n8, 0);
        if (n8 == 0) copy_last<kCopyLhs>(left > params_.stages);
        if (n8 == kFragmentsN / 4) copy_last<kCopyRhs>(left > params_.stages);
      }
    }
    if constexpr (kMore) read_last_words(left > 2);
  }

  /// All rows of the warp by eight columns.
  template <int kStep>
  CUTLASS_DEVICE void multiply_column(Sums& sums, const Fragments& f, int n8) const {
    if constexpr (kFloat8) {
      CUTLASS_PRAGMA_UNROLL
      for (int m16 = 0; m16 < kFragmentsM; ++m16) {
        const uint32_t meta = kStep == 0 ? words_[m16][0] : words_[m16][1];
        float product[4];
        multiply_sparse8(product, f.lhs[kStep][m16], f.rhs[n8], meta);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) sums[m16][n8][i] += product[i];
      }
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < kFragmentsM / 2; ++pair) {
        const uint32_t meta = kStep == 0 ? words_[pair][0] : words_[pair][1];
        multiply_sparse<kFormat, 0>(sums[2 * pair][n8], f.lhs[kStep][2 * pair], f.rhs[n8], meta);
        multiply_sparse<kFormat, 1>(sums[2 * pair + 1][n8], f.lhs[kStep][2 * pair + 1], f.rhs[n8],
                                    meta);
      }
    }
  }

  /// Of the next K tile. Those of the first step have been read before.
  CUTLASS_DEVICE void read_last_words(bool more) {
    meta_.template read<1>(params_.meta, words_);
    meta_.advance(params_.meta, more);
  }

  CUTLASS_DEVICE uint32_t read_stage() const { return ring_ + read_ * kStageBytes; }

  CUTLASS_DEVICE void load_lhs(uint32_t (&to)[kFragmentsM][4], int step) const {
    CUTLASS_PRAGMA_UNROLL
    for (int m16 = 0; m16 < kFragmentsM; ++m16)
      load_matrices<!Lhs::kKMajor>(to[m16], read_stage() + lhs_place_.offset(m16, step));
  }
  CUTLASS_DEVICE void load_rhs(uint32_t (&to)[4], int n8, int step) const {
    load_matrices<!Rhs::kKMajor>(to, read_stage() + Lhs::kBytes + rhs_place_.offset(n8, step));
  }

  const Params& params_;
  uint32_t ring_;
  LhsPlace<Lhs> lhs_place_;
  RhsPlace<Rhs> rhs_place_;
  LhsLoader lhs_;
  RhsLoader rhs_;
  Meta meta_;
  typename Meta::Tile words_;  // of E, for the K tile that is multiplied
  int read_ = 0;               // stage
};

}  // namespace sparse24::gemm::sm80
