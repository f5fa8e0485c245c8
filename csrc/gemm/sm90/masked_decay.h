// masked_decay.h: masked decay in the epilogue of a weight gradient, added to accumulators in
// registers.
//
//   sum(m, n) += factor * (1 - mask(r, c)) * weight(r, c)
//   (r, c) = (m, n), or (n, m) where dW^T is computed (kMContiguous)
//
// Product and sum are rounded as masked_decay rounds them: a fp32 gradient has the same bits as
// after that pass.
//
// Bytes     an element of dW: the weight, and 1/8 of its mask; nothing is written.
// Batches   weight and mask are read into registers, a quarter of the tile at a time (fp32: an
//           eighth; 32 columns where m is contiguous, so that a batch lies in one weight).
#pragma once

#include <cstdint>

#include "cutlass/arch/memory.h"
#include "cutlass/cutlass.h"
#include "gemm/sm90/warpgroup.h"
#include "sparse24/gemm.h"

namespace sparse24::gemm::sm90 {

template <typename Output, int kTileN, bool kMContiguous>
class MaskedDecayAdder {
 public:
  /// `row` and `column` are the first of this thread in the tile (warpgroup.h).
  CUTLASS_DEVICE MaskedDecayAdder(const MaskedDecayTerm& term, int row, int column, int m_rows,
                                  int n_columns)
      : term_(term),
        factor_(*term.factor),
        row_(row),
        column_(column),
        m_rows_(m_rows),
        n_columns_(n_columns) {}

  template <typename Accumulators>
  CUTLASS_DEVICE void add_to(Accumulators& sums) const {
    if ((kMContiguous ? term_.row_stride : term_.col_stride) == 1) {
      add<true>(sums);
    } else {
      add<false>(sums);
    }
  }

 private:
  static constexpr int kOctets = kTileN / 8;  // of columns: a thread has a pair of each, twice
  static constexpr int kBatch = kMContiguous ? 4 : kOctets / (sizeof(Output) == 4 ? 8 : 4);
  static_assert(kOctets % kBatch == 0 && (!kMContiguous || 64 % (kBatch * 8) == 0));

  struct alignas(2 * sizeof(Output)) Pair {
    Output column[2];
  };

  /// Where a thread's part of a batch begins, in one of the weights.
  struct Place {
    const Output* weight;
    const uint16_t* mask;
    int shift;           // of the bits in a mask
    int m_left, n_left;  // up to the ends of the weight
  };

  CUTLASS_DEVICE Place place(int n) const {
    const int r = kMContiguous ? n : row_, c = kMContiguous ? row_ : n;
    const int rows = kMContiguous ? n_columns_ : m_rows_;
    const int first_rows = int(term_.first_rows), second = r >= first_rows;
    const uint32_t row = r - (second ? first_rows : 0), col = c;
    const int rows_left = (second ? rows - first_rows : first_rows) - int(row);
    const int cols = kMContiguous ? m_rows_ : n_columns_;
    const void* weight = second ? term_.weight[1] : term_.weight[0];
    const uint16_t* mask = second ? term_.mask[1] : term_.mask[0];
    return {static_cast<const Output*>(weight) + row * term_.row_stride + col * term_.col_stride,
            mask + int64_t{row / 4} * (cols / 4) + col / 4, int(row % 4 * 4 + col % 4),
            kMContiguous ? cols - c : rows_left, kMContiguous ? rows_left : cols - c};
  }

  /// Extents are multiples of 4 and a thread's columns begin at an even one: the mask's bits of
  /// both are in one block, inside or outside together. Eight rows or columns further on the shift
  /// is the same. kPairs: the weights of both columns are neighbours; else those of rows are.
  template <bool kPairs, typename Accumulators>
  CUTLASS_DEVICE void add(Accumulators& sums) const {
    using cutlass::arch::global_load;  // predicated, and kept in order
    // From one line of neighbours to the next: of pairs along m, else along n.
    const int64_t line = kPairs == kMContiguous ? term_.col_stride : term_.row_stride;
    const int64_t along_m = kPairs ? line : 1, along_n = kPairs ? 1 : line;
    const int mask_width = (kMContiguous ? m_rows_ : n_columns_) / 4;
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kOctets; first += kBatch) {
      const Place at = place(computed_here(column_ + first * 8));
      Pair pairs[kBatch][2];
      uint16_t kept[kBatch][2];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        const int n = j * 8;
        CUTLASS_PRAGMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const bool inside = half * 8 < at.m_left && n < at.n_left;
          pairs[j][half] = {};
          kept[j][half] = 0xFFFF;
          const uint16_t* mask = kMContiguous ? at.mask + n / 4 * mask_width + half * 2
                                              : at.mask + half * 2 * mask_width + n / 4;
          global_load<uint16_t, 2>(kept[j][half], mask, inside);
          const Output* weight = at.weight + half * 8 * along_m;
          if constexpr (kPairs) {
            global_load<Pair, sizeof(Pair)>(pairs[j][half], weight + n, inside);
          } else {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 2; ++i) {
              global_load<Output, sizeof(Output)>(pairs[j][half].column[i],
                                                  weight + (n + i) * along_n, inside);
            }
          }
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < kBatch; ++j) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& sum = sums((first + j) * 4 + i);
          const float pull = __fmul_rn(factor_, static_cast<float>(pairs[j][i / 2].column[i % 2]));
          const float pulled = __fadd_rn(sum, pull);
          const int bit = at.shift + i % 2 * (kMContiguous ? 4 : 1);
          if ((kept[j][i / 2] >> bit & 1) == 0) sum = pulled;
        }
      }
    }
  }

  const MaskedDecayTerm& term_;
  float factor_;
  int row_, column_, m_rows_, n_columns_;
};

}  // namespace sparse24::gemm::sm90
