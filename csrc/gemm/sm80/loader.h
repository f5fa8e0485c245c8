// loader.h: K tiles from memory: of both operands to a stage of shared memory, of E to registers.
//
// Work      all threads copy. A thread has one unit of 16 bytes of several lines of an operand, far
//           enough apart that all lie in the same exchanged column (staged.h): its addresses in
//           shared memory differ by constants.
// Edges     what lies outside of an operand is written as zeros and not read: cp.async's size. E is
//           read from the last block instead (staged.h).
#pragma once

#include "gemm/sm80/instructions.h"
#include "gemm/sm80/staged.h"

namespace sparse24::gemm::sm80 {

/// An operand in memory: `length` stored elements along k, `extent` along m or n. The steps are
/// worked out on the host: the loop adds them from constant memory, and has no registers to spare.
struct Source {
  const void* values = nullptr;
  int64_t ld = 0;
  int extent = 0, length = 0;
  int64_t line_step = 0, k_step = 0;  // bytes, of a thread: to its next line, to its next K tile
};

template <typename Operand, int kThreads>
class OperandLoader {
  static constexpr int kLineStep = kThreads / Operand::kUnits;
  static constexpr int kCopies = Operand::kLines / kLineStep;
  static constexpr int kElementBytes = Operand::kElementBytes;
  static constexpr int kUnitElements = Operand::kUnitElements;
  static_assert(kLineStep % 8 == 0 && Operand::kLines % kLineStep == 0);

 public:
  /// Lines of a tile from one copy of a thread to its next.
  static constexpr int kStep = kLineStep;
  CUTLASS_DEVICE static int line_of(int thread) { return thread / Operand::kUnits; }

  /// A thread's lines are `lines` apart in memory: kStep, but for operands of gate and up.
  static Source source_of(const void* values, int64_t ld, int extent, int length, int lines) {
    const int64_t line_bytes = ld * kElementBytes;
    return {values,
            ld,
            extent,
            length,
            lines * line_bytes,
            Operand::kLength * (Operand::kKMajor ? int64_t{kElementBytes} : line_bytes)};
  }

  /// Lines along k: the thread's first is row `row` of the operand, others are `row_step` apart, up
  /// to row `end`.
  CUTLASS_DEVICE void begin_along_k(const Source& source, int thread, int64_t row, int row_step,
                                    int64_t end, int k_tile) {
    const int unit = thread % Operand::kUnits, k = k_tile * Operand::kLength + unit * kUnitElements;
    to_ = unit_offset<Operand::kUnits>(line_of(thread), unit);
    from_ = static_cast<const char*>(source.values) + (row * source.ld + k) * kElementBytes;
    k_left_ = source.length - k;
    const int64_t rows_left = end - row;
    inside_ = rows_left <= 0 ? 0 : int(rows_left + row_step - 1) / row_step;
  }

  /// Lines along m or n, from `first` on.
  CUTLASS_DEVICE void begin_across_k(const Source& source, int thread, int first, int k_tile) {
    const int unit = thread % Operand::kUnits, k = k_tile * Operand::kLength + line_of(thread);
    const int column = first + unit * kUnitElements;
    to_ = unit_offset<Operand::kUnits>(line_of(thread), unit);
    from_ = static_cast<const char*>(source.values) + (k * source.ld + column) * kElementBytes;
    k_left_ = source.length - k;
    inside_ = bytes_of(source.extent - column);
  }

  /// The next K tile, to the operand's place in a stage.
  CUTLASS_DEVICE void copy(const Source& source, uint32_t stage) {
    const int bytes = Operand::kKMajor ? bytes_of(k_left_) : inside_;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const bool is_inside = Operand::kKMajor ? i < inside_ : i * kLineStep < k_left_;
      copy_async(stage + to_ + i * kLineStep * Operand::kLineBytes, from_ + i * source.line_step,
                 is_inside ? bytes : 0);
    }
    from_ += source.k_step;
    k_left_ -= Operand::kLength;
  }

 private:
  /// Of a unit that `elements` are left of.
  CUTLASS_DEVICE static int bytes_of(int elements) {
    return max(0, min(elements, kUnitElements)) * kElementBytes;
  }

  const char* from_;
  int to_;
  int k_left_;  // elements or lines along k, from this thread's first on
  int inside_;  // lines along k: how many of them are; else: bytes of the unit
};

/// E in memory: blocks along m first, then along k (common/metadata.h).
struct MetaSource {
  const uint8_t* blocks = nullptr;
  int blocks_m = 0;      // along m
  int upper_blocks = 0;  // those that the upper halves of warps read: all, or those of gate
  int to_lower = 0;      // bytes from the words of an upper half to those of the lower
};

/// A lane's words of E, one K tile after the other.
template <int kElementBytes>
class MetaReader {
  using Words = MetaWords<kElementBytes>;
  static constexpr int kLoads = kMetaLoads<kElementBytes>;

 public:
  using Tile = uint32_t[kLoads][kSteps];

  /// width > 0: of gate and of up, a multiple of kMetaBlock; the halves of a warp are a turn each.
  static MetaSource source_of(const uint8_t* E, int m, int width) {
    const int blocks_m = int(round_up(m, kMetaBlock) / kMetaBlock);
    if (width == 0)
      return {E, blocks_m, blocks_m, int(meta_source<kElementBytes>(kWarpM / 2, blocks_m))};
    static_assert(kTurn == kWarpM / 2);
    const int of_gate = width / kMetaBlock;
    return {E, blocks_m, of_gate, of_gate * Words::kBlockBytes};
  }

  /// From the warp's first row on.
  CUTLASS_DEVICE void begin(const MetaSource& source, int lane, int64_t row, int k_tile) {
    from_ = source.blocks + k_tile * k_step(source) +
            meta_source<kElementBytes>(row, source.upper_blocks) + Words::lane_offset(lane);
  }
  /// A step's words of the next K tile.
  template <int kStep>
  CUTLASS_DEVICE void read(const MetaSource& source, Tile& to) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kLoads; ++i) to[i][kStep] = load_constant(load_of(source, i) + kStep * 4);
  }
  /// All words of that K tile have been read. The one behind it, if there are more, comes to L2:
  /// half a K tile is 512 cycles on an A100, less than memory takes. Of 8 bits it is 1024 cycles.
  CUTLASS_DEVICE void advance(const MetaSource& source, bool more) {
    from_ += k_step(source);
    if constexpr (kElementBytes == 2) {
      if (!more) return;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kLoads; ++i) prefetch(load_of(source, i));
    }
  }

 private:
  CUTLASS_DEVICE const uint8_t* load_of(const MetaSource& source, int i) const {
    const int half = i / (kLoads / 2), load = i % (kLoads / 2);
    return from_ + half * source.to_lower + load * kMetaLoadBytes;
  }
  CUTLASS_DEVICE static int64_t k_step(const MetaSource& source) {
    return int64_t{source.blocks_m} * Words::kBlockBytes;
  }

  const uint8_t* from_;
};

}  // namespace sparse24::gemm::sm80
