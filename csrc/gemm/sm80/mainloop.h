// mainloop.h: the K loop of the sparse GEMM by mma.sp, for sm_80, 86 and 89.
//
// Work       a warp has 64 x 64 of the tile; 256x128 has eight of them. All threads copy, and
//            multiply the K tile that is there. Halfway through a K tile the warps have all of it in
//            registers and meet: from there on its stage is filled anew, with the K tile that is as
//            many ahead as there are stages. So copies have the time of all K tiles between, a whole
//            one where there are two stages.
// Stages     34 KB a K tile of 64 (lhs 16, rhs 16, E 2): four on an A100 (163 KB a block, of which
//            the epilogue has 18), two on a 3090 or 4090 (99 KB). How many is a run-time number.
// Registers  128 sums, 2 x 16 of lhs, 32 of rhs. Those of rhs are loaded anew for the next step as
//            soon as the instructions that read them have been issued, 28 others before their use;
//            those of lhs are read by all of a step, and have a second set.
// 8 bits     e4m3, from sm_89 on. Along k a K tile of 128 has the bytes of one of 64 in 16 bits, E
//            twice as many. Hopper's tensor cores add such products with some 14 bits, and Ada's are
//            taken to do so: each instruction begins at zero, and its sums of 64 k are added to those of the tile in
//            fp32, by units that are idle otherwise: four additions a lane beside an instruction of
//            32 cycles (RTX 4090; 16 on professional cards). So one kernel serves fast and promoted
//            sums. A warp has 64 x 32, since 64 x 64 would spill, a tile of 128x128 eight warps; a
//            stage is of 26 KB: three on a 4090.
//
// Arithmetic, per multiprocessor and K tile of 64 (estimates from published peaks: dense 16-bit
// products with fp32 sums are 1024 multiply-adds a cycle on an A100, 256 on a 3090 or 4090, and 2:4
// ones twice that):
//            256x128: 2.1 M multiply-adds of the dense product. A100 1024 cycles, 3090 and 4090
//            4096. Shared memory: 8 warps x 12 KB read, 34 KB written, 128 B a cycle: 1040 cycles.
//            So an A100 is bound by both alike; with 128x128 it would be 1176 for the same work.
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
  using Meta = MetaLoader<kTileM, kElementBytes>;
  static constexpr int kStageBytes = Lhs::kBytes + Rhs::kBytes + Meta::kBytes;
  static constexpr int kMostStages = 4;
  static_assert(Meta::kCopyingThreads <= kThreads);

  using Sums = float[kFragmentsM][kFragmentsN][4];

  struct Params {
    Source lhs, rhs;
    MetaSource meta;
    int width = 0;  // of gate and of up, where rows of lhs come in turns of both (staged.h)
    int stages = 0;
  };

  CUTLASS_DEVICE Mainloop(const Params& params, const char* ring, int thread)
      : params_(params),
        ring_(shared_address(ring)),
        lhs_place_(thread / 32 % kWarpsM, thread % 32),
        rhs_place_(thread / 32 / kWarpsM, thread % 32),
        meta_place_(StagedMeta::words_offset(thread / 32 % kWarpsM, thread % 32)) {}

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
    meta_.begin(params_.meta, thread, m0, params_.width, part.k_begin);
    to_copy_ = part.k_tiles();
    for (int stage = 0; stage < params_.stages; ++stage) {
      copy<kCopyLhs>();
      copy<kCopyRhs>();
      copy<kCopyMeta>();
    }
  }

  /// The sums of a part that was started. Nothing of the ring is read any more when it returns, by
  /// no thread of the block.
  CUTLASS_DEVICE void multiply(Sums& sums, int k_tiles) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kFragmentsM * kFragmentsN * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
    Fragments f;
    wait_for_stage();
    load_lhs(f.lhs[0], 0);
    CUTLASS_PRAGMA_UNROLL
    for (int n8 = 0; n8 < kFragmentsN; ++n8) load_rhs(f.rhs[n8], n8, 0);
    load_meta(f.meta);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int left = k_tiles; left > 1; --left) multiply_tile<true>(sums, f);
    multiply_tile<false>(sums, f);
  }

 private:
  using LhsLoader = OperandLoader<Lhs, kThreads>;
  using RhsLoader = OperandLoader<Rhs, kThreads>;
  using StagedMeta = sm80::StagedMeta<kElementBytes>;
  static constexpr int kMetaLoads = StagedMeta::kLoads;
  struct Fragments {
    uint32_t lhs[kSteps][kFragmentsM][4];
    uint32_t rhs[kFragmentsN][4];
    uint2 meta[kMetaLoads];  // of both steps
  };
  static_assert(kSteps == 2);

  enum CopyOf { kCopyLhs, kCopyRhs, kCopyMeta };

  /// A third of what fills a stage; after the last the stage is complete. Groups are counted in
  /// wait_for_stage: there is one a K tile, even where nothing is left to copy.
  template <CopyOf kOf>
  CUTLASS_DEVICE void copy() {
    if (to_copy_ > 0) {
      const uint32_t stage = ring_ + write_ * kStageBytes;
      if constexpr (kOf == kCopyLhs) lhs_.copy(stage);
      if constexpr (kOf == kCopyRhs) rhs_.copy(stage + Lhs::kBytes);
      if constexpr (kOf == kCopyMeta) {
        meta_.copy(stage + Lhs::kBytes + Rhs::kBytes);
        --to_copy_;
        write_ = write_ + 1 == params_.stages ? 0 : write_ + 1;
      }
    }
    if constexpr (kOf == kCopyMeta) commit_copies();
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

  template <bool kMore>
  CUTLASS_DEVICE void multiply_tile(Sums& sums, Fragments& f) {
    load_lhs(f.lhs[1], 1);
    CUTLASS_PRAGMA_UNROLL
    for (int n8 = 0; n8 < kFragmentsN; ++n8) {
      multiply_column<0>(sums, f, n8);
      load_rhs(f.rhs[n8], n8, 1);
    }
    wait_for_stage();
    read_ = read_ + 1 == params_.stages ? 0 : read_ + 1;
    uint2 next[kMetaLoads];
    if constexpr (kMore) {
      load_lhs(f.lhs[0], 0);
      load_meta(next);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int n8 = 0; n8 < kFragmentsN; ++n8) {
      multiply_column<1>(sums, f, n8);
      if constexpr (kMore) {
        load_rhs(f.rhs[n8], n8, 0);
        if (n8 == 0) copy<kCopyLhs>();
        if (n8 == kFragmentsN / 4) copy<kCopyRhs>();
        if (n8 == kFragmentsN / 2) copy<kCopyMeta>();
      }
    }
    if constexpr (kMore) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kMetaLoads; ++i) f.meta[i] = next[i];
    }
  }

  /// All rows of the warp by eight columns.
  template <int kStep>
  CUTLASS_DEVICE void multiply_column(Sums& sums, const Fragments& f, int n8) const {
    if constexpr (kFloat8) {
      CUTLASS_PRAGMA_UNROLL
      for (int m16 = 0; m16 < kFragmentsM; ++m16) {
        const uint32_t meta = kStep == 0 ? f.meta[m16].x : f.meta[m16].y;
        float product[4];
        multiply_sparse8(product, f.lhs[kStep][m16], f.rhs[n8], meta);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) sums[m16][n8][i] += product[i];
      }
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int pair = 0; pair < kFragmentsM / 2; ++pair) {
        const uint32_t meta = kStep == 0 ? f.meta[pair].x : f.meta[pair].y;
        multiply_sparse<kFormat, 0>(sums[2 * pair][n8], f.lhs[kStep][2 * pair], f.rhs[n8], meta);
        multiply_sparse<kFormat, 1>(sums[2 * pair + 1][n8], f.lhs[kStep][2 * pair + 1], f.rhs[n8],
                                    meta);
      }
    }
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
  CUTLASS_DEVICE void load_meta(uint2 (&to)[kMetaLoads]) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kMetaLoads; ++i)
      to[i] = load_pair(read_stage() + Lhs::kBytes + Rhs::kBytes + meta_place_ +
                        i * StagedMeta::kLoadStep);
  }

  const Params& params_;
  uint32_t ring_;
  LhsPlace<Lhs> lhs_place_;
  RhsPlace<Rhs> rhs_place_;
  int meta_place_;
  LhsLoader lhs_;
  RhsLoader rhs_;
  Meta meta_;
  int to_copy_ = 0;           // K tiles of the part
  int write_ = 0, read_ = 0;  // stages
};

}  // namespace sparse24::gemm::sm80
