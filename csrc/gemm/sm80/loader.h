// loader.h: K tiles of both operands and of E, from memory to a stage of shared memory.
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

/// An operand in memory: `length` stored elements along k, `extent` along m or n.
struct Source {
  const void* values = nullptr;
  int64_t ld = 0;
  int extent = 0, length = 0;
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

  /// Lines along k: the thread's first is row `row` of the operand, others are `row_step` apart, up
  /// to row `end`.
  CUTLASS_DEVICE void begin_along_k(const Source& source, int thread, int64_t row, int row_step,
                                    int64_t end, int k_tile) {
    const int unit = thread % Operand::kUnits, k = k_tile * Operand::kLength + unit * kUnitElements;
    to_ = unit_offset<Operand::kUnits>(line_of(thread), unit);
    from_ = static_cast<const char*>(source.values) + (row * source.ld + k) * kElementBytes;
    copy_step_ = row_step * source.ld * kElementBytes;
    k_step_ = Operand::kLength * kElementBytes;
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
    copy_step_ = kLineStep * source.ld * kElementBytes;
    k_step_ = Operand::kLength * source.ld * kElementBytes;
    k_left_ = source.length - k;
    inside_ = bytes_of(source.extent - column);
  }

  /// The next K tile, to the operand's place in a stage.
  CUTLASS_DEVICE void copy(uint32_t stage) {
    const int bytes = Operand::kKMajor ? bytes_of(k_left_) : inside_;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      const bool is_inside = Operand::kKMajor ? i < inside_ : i * kLineStep < k_left_;
      copy_async(stage + to_ + i * kLineStep * Operand::kLineBytes, from_ + i * copy_step_,
                 is_inside ? bytes : 0);
    }
    from_ += k_step_;
    k_left_ -= Operand::kLength;
  }

 private:
  /// Of a unit that `elements` are left of.
  CUTLASS_DEVICE static int bytes_of(int elements) {
    return max(0, min(elements, kUnitElements)) * kElementBytes;
  }

  const char* from_;
  int64_t copy_step_, k_step_;
  int to_;
  int k_left_;  // elements or lines along k, from this thread's first on
  int inside_;  // lines along k: how many of them are; else: bytes of the unit
};

/// E in memory: blocks along m first, then along k (common/metadata.h). A thread copies one unit
/// of a K tile, or none.
struct MetaSource {
  const uint8_t* blocks = nullptr;
  int blocks_m = 0;
};

template <int kTileM, int kElementBytes>
class MetaLoader {
  using Meta = StagedMeta<kElementBytes>;

 public:
  static constexpr int kCopyingThreads = kTileM / Meta::kRows * Meta::kUnits;
  static constexpr int kBytes = kCopyingThreads * kUnitBytes;

  CUTLASS_DEVICE void begin(const MetaSource& source, int thread, int m0, int width, int k_tile) {
    const int group = thread / Meta::kUnits % (kTileM / Meta::kRows), unit = thread % Meta::kUnits;
    const int64_t row = source_row(m0, group * Meta::kRows, width);
    k_step_ = int64_t{source.blocks_m} * Meta::kBlockBytes;
    from_ =
        source.blocks + k_tile * k_step_ + meta_source<kElementBytes>(row, unit, source.blocks_m);
    to_ = Meta::unit_offset(group, unit);
    copies_ = thread < kCopyingThreads;
  }
  CUTLASS_DEVICE void copy(uint32_t stage) {
    if (copies_) copy_async(stage + to_, from_, kUnitBytes);
    from_ += k_step_;
  }

 private:
  const uint8_t* from_;
  int64_t k_step_;
  int to_;
  bool copies_;
};

}  // namespace sparse24::gemm::sm80
