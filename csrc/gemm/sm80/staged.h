// staged.h: where things lie in shared memory, and which lane reads what of it. Plain integers,
// replayed on the CPU (tests/cpp/gemm_sm80_test.cpp).
//
// Operands  a K tile of 128 bytes of rhs' rows: 64 elements in 16 bits, 128 in 8 bits; values of lhs
//           are half as many along k. They wait as they lie in memory, in lines along k (K-major)
//           or along m or n (MN-major, 16 bits alone). A line is of 16-byte units; units of a line
//           are exchanged by the line's number, so that eight of them above one another, which
//           ldmatrix reads at a time, lie in eight different groups of four banks.
// mma.sp    m16n8k32: lhs 16 (m) x 16 (packed k) as four 8 x 8 matrices, rhs 8 (n) x 32 (k) as
//           four. Lane 4g + q holds, of each, elements 2q and 2q + 1 along k of line g of m or n.
//           That is what ldmatrix delivers where lines run along k, and ldmatrix.trans where they
//           run along m or n.
// E         an instruction takes the positions of 16 (m) x 32 (k): 16 words of 32 bits, of two
//           lanes of each four. Which two is its selector. By the PTX manual (metadata of m16n8k32 with
//           16-bit types) lane 4g + q, q = 0 or 1 with selector 0, q = 2 or 3 with selector 1,
//           gives
//             bits  0-15   row g,     k 16 (q % 2) ... 16 (q % 2) + 15
//             bits 16-31   row g + 8, the same k
//           four bits a group of four along k, the lowest k lowest. A block of our E (64 x 64,
//           common/metadata.h) has bytes 2 (m / 8 % 2) + k % 16 / 8 of the word at
//             m / 16 * 128 + k / 16 % 2 * 64 + m % 8 * 8 + k / 32 * 4,
//           which is such a word: with m / 16 = q / 2 for two instructions' rows at a time, a
//           lane's words for k 0-31 and 32-63 are neighbours, eight bytes at
//             (m0 / 16 + q / 2) * 128 + q % 2 * 64 + g * 8.
//           So a word serves two instructions. Both of wgmma's lanes that CUTLASS'
//           reorder for sm_80 pairs are the same: E needs no order of its own for this
//           architecture.
// 8 bits    mma.sp m16n8k64: the same bytes in the same lanes, four elements where there were two.
//           All four lanes of each four give positions: lane 4g + q those of row g + 8 (q % 2),
//           k 32 (q / 2) ... 32 (q / 2) + 31, four bits a group of four, the lowest k lowest. A row
//           of our E has four such words beside one another, of 128 k. A sum may take its k in any
//           order: the first instruction takes k 0-31 and 64-95, the second 32-63 and 96-127, so
//           that a lane's two words are neighbours, eight bytes at
//             row * 16 + q / 2 * 8.
//           They are the words that CUTLASS' reordering hands to the same lanes, too.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/metadata.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm::sm80 {

template <int kElementBytes>
constexpr int kTileKOf = 128 / kElementBytes;  // of dense elements: what a block of E has

constexpr int kUnitBytes = 16;    // what a lane copies and what ldmatrix reads of a line
constexpr int kUnitElements = 8;  // in 16 bits
constexpr int kSteps = 2;         // instructions along a K tile

// Of the tile, for one warp. In 8 bits products need registers beside the sums (mainloop.h).
constexpr int kWarpM = 64;
template <int kElementBytes>
constexpr int kWarpNOf = kElementBytes == 2 ? 64 : 32;
constexpr int kFragmentsM = kWarpM / 16;  // instructions of a warp along m
template <int kElementBytes>
constexpr int kFragmentsNOf = kWarpNOf<kElementBytes> / 8;  // and n

/// Byte of a unit in a staged operand of lines of kUnits units.
template <int kUnits>
SP24_HD constexpr int unit_offset(int line, int unit) {
  static_assert(kUnits == 4 || kUnits % 8 == 0, "eight lines above one another must not conflict");
  const int exchanged = kUnits == 4 ? unit ^ (line / 2 % 4) : unit ^ (line % 8);
  return (line * kUnits + exchanged) * kUnitBytes;
}

/// An operand of kExtent rows of m or n and kLength stored elements along k.
template <Orientation kOrientation, int kExtent_, int kLength_, int kElementBytes_ = 2>
struct Staged {
  static constexpr int kExtent = kExtent_, kLength = kLength_, kElementBytes = kElementBytes_;
  static constexpr bool kKMajor = kOrientation == Orientation::kKMajor;
  static_assert(kKMajor || kElementBytes == 2, "ldmatrix transposes elements of 16 bits");
  static constexpr int kUnitElements = kUnitBytes / kElementBytes;
  static constexpr int kLines = kKMajor ? kExtent : kLength;
  static constexpr int kUnits = (kKMajor ? kLength : kExtent) / kUnitElements;  // of a line
  static constexpr int kLineBytes = kUnits * kUnitBytes;
  static constexpr int kBytes = kLines * kLineBytes;
};

/// A K tile of both. E is not staged (below).
template <typename Lhs, typename Rhs>
constexpr int kStageBytes = Lhs::kBytes + Rhs::kBytes;

// On an A100 they are 128 of its 163 KB; the rest is L1, through which E comes.
constexpr int kMostStages = 4;
SP24_HD constexpr int stages_in(int shared_bytes, int stage_bytes) {
  const int stages = shared_bytes / stage_bytes;
  return stages < kMostStages ? stages : kMostStages;
}

/// Units of a K-major line of lhs from the nearer half of an instruction's k to the farther one, and
/// from one step to the next; of rhs twice as many. In 8 bits the steps take turns (above).
template <int kElementBytes>
constexpr int kFarUnits = kElementBytes == 2 ? 1 : 2;
template <int kElementBytes>
constexpr int kStepUnits = kElementBytes == 2 ? 2 : 1;

/// Where a lane of a warp reads lhs: instruction m16 of the warp's rows, step along k. A lane gives
/// the address of a line of one matrix: those of rows 0-7 and 8-15, then the same further along k.
template <typename Operand>
class LhsPlace {
 public:
  SP24_HD LhsPlace(int warp_m, int lane) {
    const int matrix = lane / 8, line = lane % 8, far_m = matrix % 2, far_k = matrix / 2;
    base_ = Operand::kKMajor
                ? unit_offset<Operand::kUnits>(warp_m * kWarpM + far_m * 8 + line,
                                               far_k * kFarUnits<Operand::kElementBytes>)
                : unit_offset<Operand::kUnits>(far_k * 8 + line, warp_m * (kWarpM / 8) + far_m);
  }
  /// Steps of a whole number of lines are sums; those within eight units are exchanged likewise.
  SP24_HD int offset(int m16, int step) const {
    constexpr int kStep = kStepUnits<Operand::kElementBytes> * kUnitBytes;
    return Operand::kKMajor ? (base_ ^ step * kStep) + m16 * 16 * Operand::kLineBytes
                            : (base_ ^ m16 * 2 * kUnitBytes) + step * 16 * Operand::kLineBytes;
  }

 private:
  int base_;
};

/// Where it reads rhs: instruction n8 of the warp's columns. Four matrices one after the other
/// along k.
template <typename Operand>
class RhsPlace {
 public:
  SP24_HD RhsPlace(int warp_n, int lane) {
    constexpr int kBytes = Operand::kElementBytes;
    const int matrix = lane / 8, line = lane % 8;
    base_ = Operand::kKMajor
                ? unit_offset<Operand::kUnits>(warp_n * kWarpNOf<kBytes> + line,
                                               matrix / 2 * 2 * kFarUnits<kBytes> + matrix % 2)
                : unit_offset<Operand::kUnits>(matrix * 8 + line, warp_n * kFragmentsNOf<kBytes>);
  }
  SP24_HD int offset(int n8, int step) const {
    constexpr int kStep = 2 * kStepUnits<Operand::kElementBytes> * kUnitBytes;
    return Operand::kKMajor ? (base_ ^ step * kStep) + n8 * 8 * Operand::kLineBytes
                            : (base_ ^ n8 * kUnitBytes) + step * 32 * Operand::kLineBytes;
  }

 private:
  int base_;
};

// ---- E ----------------------------------------------------------------------------------------

/// E is not staged: a lane loads its words from memory, one for each step of a K tile and each
/// kLoadRows rows. Both steps' words are neighbours, and those of the warp's lanes share 256 bytes.
template <int kElementBytes>
struct MetaWords;

template <>
struct MetaWords<2> {
  static constexpr int kLoadRows = 32;  // two instructions
  static constexpr int kBlockBytes = kMetaBlockBytes;

  /// Byte of a lane's words from those of the first row on.
  SP24_HD static constexpr int lane_offset(int lane) {
    const int g = lane / 4, q = lane % 4;
    return q / 2 * 128 + q % 2 * 64 + g * 8;
  }
};

template <>
struct MetaWords<1> {
  static constexpr int kLoadRows = 16;  // one instruction
  static constexpr int kBlockBytes = kMeta8BlockBytes;

  SP24_HD static constexpr int lane_offset(int lane) {
    const int g = lane / 4, q = lane % 4;
    return (q % 2 * 8 + g) * kMeta8RowBytes + q / 2 * 8;
  }
};

template <int kElementBytes>
constexpr int kMetaLoads = kWarpM / MetaWords<kElementBytes>::kLoadRows;  // of a lane
constexpr int kMetaLoadBytes = 256;                                       // of a warp

/// Byte of the words of the rows from `row` on, a multiple of kLoadRows, in the blocks along m of
/// one K tile. Past the end of the operand it is one of the last block: positions beside zeros
/// count for nothing, but must be such as the packing kernels write.
template <int kElementBytes>
SP24_HD constexpr int64_t meta_source(int64_t row, int blocks_m) {
  constexpr int kBlockBytes = MetaWords<kElementBytes>::kBlockBytes;
  const int64_t block = row / kMetaBlock < blocks_m ? row / kMetaBlock : blocks_m - 1;
  return block * kBlockBytes + row % kMetaBlock * (kBlockBytes / kMetaBlock);
}

// ---- rows -------------------------------------------------------------------------------------

constexpr int kTurn = 32;  // rows of gate, then as many of up

/// The row of lhs that is row `row` of a tile that begins at `m0`. Where width > 0, rows come in
/// turns from gate and up, each `width` rows: a warp has 32 features of both.
SP24_HD constexpr int64_t source_row(int64_t m0, int row, int64_t width) {
  if (width == 0) return m0 + row;
  const int64_t feature = m0 / 2 + row / (2 * kTurn) * kTurn + row % kTurn;
  return row / kTurn % 2 * width + feature;
}
/// Whether it is one of `rows`. Tiles reach past the end, for gated ones past that of each half.
SP24_HD constexpr bool is_source_row(int64_t m0, int row, int64_t width, int64_t rows) {
  const int64_t source = source_row(m0, row, width);
  return width == 0 ? source < rows : source - row / kTurn % 2 * width < width;
}

// ---- sums -------------------------------------------------------------------------------------

// A warp stores its sums in chunks of eight lines. Lines run as those of out do, over all of the
// warp's rows or columns.
constexpr int kChunkLines = 8;

/// Values from one line of a chunk to the next: so far apart that the lanes of a phase write to
/// different banks. Along m a lane writes single values of two lines, 2q and 2q + 1; along n pairs
/// of line g.
template <bool kMContiguous>
constexpr int kChunkStride = kMContiguous ? 68 : 72;
constexpr int kChunkBytes = kChunkLines * 72 * 4;

}  // namespace sparse24::gemm::sm80
