// The maps of csrc/gemm/sm80 from lanes to elements, replayed without a GPU: a warp's products by
// emulated ldmatrix and mma.sp are those of the operands; nothing that lanes do at a time meets in
// a bank; E is what CUTLASS' reordering for sm_80 hands to the same lanes.
#include <array>
#include <cstdint>
#include <cstring>
#include <set>
#include <vector>

#include "common/metadata.h"
#include "elements.h"
#include "gemm/sm80/staged.h"
#include "random.h"
#include "shared_banks.h"
#include "testing.h"

using namespace sparse24;
using namespace sparse24::gemm::sm80;
using testing::PackedOperand;
using testing::Random;

namespace {

constexpr int kTileM = 256, kTileN = 128, kTileK = gemm::sm80::kTileKOf<2>;
constexpr int kWarpN = gemm::sm80::kWarpNOf<2>, kFragmentsN = gemm::sm80::kFragmentsNOf<2>;
using Meta = MetaWords<2>;
constexpr Orientation kKMajor = Orientation::kKMajor, kMnMajor = Orientation::kMnMajor;
template <Orientation kOrientation>
using Lhs = Staged<kOrientation, kTileM, kTileK / 2>;
template <Orientation kOrientation>
using Rhs = Staged<kOrientation, kTileN, kTileK>;

/// 16-bit integers stand for elements.
using Memory = std::vector<int16_t>;
using Matrices = std::array<std::array<std::array<int, 2>, 4>, 32>;  // [lane][matrix][of a pair]

/// An operand of values value(mn, k), as a loader leaves it in a stage.
template <typename Operand, typename Value>
Memory staged(const Value& value) {
  Memory memory(Operand::kBytes / 2, -999);
  for (int line = 0; line < Operand::kLines; ++line)
    for (int unit = 0; unit < Operand::kUnits; ++unit)
      for (int i = 0; i < kUnitElements; ++i) {
        const int along = unit * kUnitElements + i;
        int16_t& to = memory[unit_offset<Operand::kUnits>(line, unit) / 2 + i];
        CHECK_EQ(to, -999);  // no unit lies on another
        to = static_cast<int16_t>(Operand::kKMajor ? value(line, along) : value(along, line));
      }
  return memory;
}

/// ldmatrix.x4: lane 8j + i gives the address of line i of matrix j; lane 4g + q gets elements 2q
/// and 2q + 1 of line g, or of column g where it transposes.
template <typename Address>
Matrices load_matrices(const Memory& memory, bool transpose, const Address& address) {
  Matrices to;
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < 2; ++i) {
        const int g = lane / 4, along = lane % 4 * 2 + i;
        const int line = transpose ? along : g, column = transpose ? g : along;
        to[lane][matrix][i] = memory[address(matrix * 8 + line) / 2 + column];
      }
  return to;
}

/// mma.sp m16n8k32 by the PTX manual: fragments of lhs (16 x 16 kept values), rhs (32 x 8), words
/// of positions of the two lanes of each four that the selector names.
void multiply_sparse(int (&sums)[16][8], const Matrices& lhs, const Matrices& rhs,
                     const std::array<uint32_t, 32>& meta, int selector) {
  int dense_lhs[16][32] = {}, dense_rhs[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int i = 0; i < 2; ++i) {
        dense_rhs[matrix * 8 + 2 * q + i][g] = rhs[lane][matrix][i];
        const int row = g + matrix % 2 * 8, packed = matrix / 2 * 8 + 2 * q + i;
        const int group = packed / 2, half = group / 4;  // of k 0-15 or 16-31
        const uint32_t word = meta[g * 4 + selector * 2 + half];
        const uint32_t nibble = word >> (matrix % 2 * 16 + group % 4 * 4) & 0xF;
        const int position = i == 0 ? meta_first(nibble) : meta_second(nibble);
        dense_lhs[row][group * 4 + position] = lhs[lane][matrix][i];
      }
  }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 32; ++k) sums[m][n] += dense_lhs[m][k] * dense_rhs[k][n];
}

template <Orientation kLhs, Orientation kRhs>
void check_warps() {
  Random random(1);
  const auto draw = [&] { return static_cast<float>(random.below(9) - 4); };
  const PackedOperand operand =
      testing::make_packed(kTileM, kTileK, kTileK, DType::kBFloat16, kKMajor, random, draw);
  std::vector<std::vector<int>> dense(kTileM, std::vector<int>(kTileK)),
      rhs_by_k(kTileK, std::vector<int>(kTileN));
  for (int m = 0; m < kTileM; ++m)
    for (const auto& kept : operand.rows[m]) dense[m][kept.k] = static_cast<int>(kept.value);
  for (auto& line : rhs_by_k)
    for (int& value : line) value = random.below(9) - 4;

  const Memory lhs = staged<Lhs<kLhs>>([&](int m, int k) {
    return static_cast<int>(operand.values.get(static_cast<size_t>(m) * (kTileK / 2) + k));
  });
  const Memory rhs = staged<Rhs<kRhs>>([&](int n, int k) { return rhs_by_k[k][n]; });

  for (int warp = 0; warp < kTileM / kWarpM * (kTileN / kWarpN); ++warp) {
    const int warp_m = warp % (kTileM / kWarpM), warp_n = warp / (kTileM / kWarpM);
    for (int m16 = 0; m16 < kFragmentsM; ++m16)
      for (int n8 = 0; n8 < kFragmentsN; ++n8) {
        int sums[16][8] = {};
        for (int step = 0; step < kSteps; ++step) {
          const Matrices a = load_matrices(lhs, kLhs == kMnMajor, [&](int lane) {
            return LhsPlace<Lhs<kLhs>>(warp_m, lane).offset(m16, step);
          });
          const Matrices b = load_matrices(rhs, kRhs == kMnMajor, [&](int lane) {
            return RhsPlace<Rhs<kRhs>>(warp_n, lane).offset(n8, step);
          });
          std::array<uint32_t, 32> words;
          for (int lane = 0; lane < 32; ++lane) {
            const int64_t rows =
                meta_source<2>(warp_m * kWarpM + m16 / 2 * Meta::kLoadRows, kTileM / kMetaBlock);
            std::memcpy(&words[lane], &operand.E[rows + Meta::lane_offset(lane) + step * 4], 4);
          }
          multiply_sparse(sums, a, b, words, m16 % 2);
        }
        for (int m = 0; m < 16; ++m)
          for (int n = 0; n < 8; ++n) {
            const int row = warp_m * kWarpM + m16 * 16 + m, col = warp_n * kWarpN + n8 * 8 + n;
            int expected = 0;
            for (int k = 0; k < kTileK; ++k) expected += dense[row][k] * rhs_by_k[k][col];
            CHECK_EQ(sums[m][n], expected);
          }
      }
  }
}

template <bool kMContiguous>
void check_chunk_banks() {
  constexpr int kStride = kChunkStride<kMContiguous>;
  static_assert(kChunkLines * kStride * 4 <= kChunkBytes);
  for (int half = 0; half < 2; ++half) {
    const int conflict =
        kMContiguous
            ? testing::worst_conflict(
                  32, 4, [&](int lane) { return 4 * ((lane % 4 * 2 + half) * kStride + lane / 4); })
            : testing::worst_conflict(32, 8, [&](int lane) {
                return 4 * (lane / 4 * kStride + half * 8 + lane % 4 * 2);
              });
    CHECK_EQ(conflict, 1);
  }
}

}  // namespace

TEST(a_warp_multiplies_what_is_staged) {
  check_warps<kKMajor, kKMajor>();
  check_warps<kMnMajor, kKMajor>();
  check_warps<kMnMajor, kMnMajor>();
  check_warps<kKMajor, kMnMajor>();
}

TEST(nothing_that_lanes_do_at_a_time_meets_in_a_bank) {
  testing::check_operand_banks<Lhs<kKMajor>, LhsPlace<Lhs<kKMajor>>>(kFragmentsM);
  testing::check_operand_banks<Lhs<kMnMajor>, LhsPlace<Lhs<kMnMajor>>>(kFragmentsM);
  testing::check_operand_banks<Rhs<kKMajor>, RhsPlace<Rhs<kKMajor>>>(kFragmentsN);
  testing::check_operand_banks<Rhs<kMnMajor>, RhsPlace<Rhs<kMnMajor>>>(kFragmentsN);
  check_chunk_banks<true>();
  check_chunk_banks<false>();
}

TEST(lanes_load_E_side_by_side) { testing::check_meta_loads<2>(); }

TEST(an_rtx_3090_holds_three_stages) {
  constexpr int kBytes = kStageBytes<Lhs<kKMajor>, Rhs<kKMajor>>;
  static_assert(kBytes == kStageBytes<Lhs<kMnMajor>, Rhs<kMnMajor>>);
  static_assert(kBytes == kStageBytes<Lhs<kKMajor>, Rhs<kMnMajor>>);
  CHECK_EQ(stages_in(99 * 1024, kBytes), 3);
  CHECK_EQ(stages_in(163 * 1024, kBytes), 4);
}

TEST(lines_of_a_thread_are_a_constant_apart) {
  testing::check_lines_of_a_thread<Lhs<kKMajor>>();
  testing::check_lines_of_a_thread<Lhs<kMnMajor>>();
  testing::check_lines_of_a_thread<Rhs<kKMajor>>();
  testing::check_lines_of_a_thread<Rhs<kMnMajor>>();
}

// CUTLASS' reordering for sm_80, restated from what its documentation and host_reorder.h do to a
// matrix of 16-bit words, each the positions of 16 k of a row: within 32 rows, row r goes to
// r % 8 * 4 + r / 8; then 2 x 2 blocks are mirrored; two columns of the result lie side by side. A
// lane of mma.sp reads the 32-bit word of its own number of each eight rows' 128 bits.
TEST(lanes_read_the_words_that_CUTLASS_hands_them) {
  constexpr int kRows = 64, kWords = kTileK / 16;
  // Word (m, j) is known by its number.
  std::vector<int> reordered(kRows * kWords);
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kWords; ++j) {
      int row = m / 32 * 32 + m % 8 * 4 + m % 32 / 8, column = j;
      if (row % 2 == 0 && column % 2 == 1) {
        ++row, --column;
      } else if (row % 2 == 1 && column % 2 == 0) {
        --row, ++column;
      }
      reordered[(column / 2 * kRows + row) * 2 + column % 2] = m * kWords + j;
    }
  // Ours: the words of a block, by where their bytes are.
  std::vector<int> ours(kMetaBlockBytes / 2);
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kWords; ++j) {
      const int byte = meta_block_offset(m, j * 16);
      CHECK(byte % 2 == 0 && meta_block_offset(m, j * 16 + 8) == byte + 1);
      ours[byte / 2] = m * kWords + j;
    }
  for (int pair = 0; pair < 2; ++pair)  // of instructions: 32 rows
    for (int step = 0; step < kSteps; ++step)
      for (int lane = 0; lane < 32; ++lane) {
        // 32 lanes, a 32-bit word each: rows 4g ... 4g + 3 of two columns.
        const int theirs = (step * kRows + pair * 32) * 2 + lane * 2;
        const int q = lane % 4, g = lane / 4;
        const int mine = ((pair * 2 + q / 2) * 128 + q % 2 * 64 + g * 8 + step * 4) / 2;
        CHECK_EQ(ours[mine], reordered[theirs]);
        CHECK_EQ(ours[mine + 1], reordered[theirs + 1]);
      }
}

TEST(rows_of_gate_and_up_come_in_turns) {
  constexpr int kWidth = 192;  // 2 x 192 rows: a tile and a half
  std::set<int64_t> seen;
  for (int m0 = 0; m0 < 2 * kWidth; m0 += kTileM)
    for (int row = 0; row < kTileM; ++row) {
      const int64_t source = source_row(m0, row, kWidth);
      if (!is_source_row(m0, row, kWidth, 2 * kWidth)) continue;
      CHECK(source >= 0 && source < 2 * kWidth && seen.insert(source).second);
      if (row % (2 * kTurn) < kTurn) {
        CHECK(source < kWidth);  // gate; the same feature of up is kTurn rows on
        CHECK_EQ(source_row(m0, row + kTurn, kWidth), source + kWidth);
      }
    }
  CHECK_EQ(seen.size(), size_t{2 * kWidth});
  for (int row = 0; row < kTileM; ++row) {
    CHECK_EQ(source_row(512, row, 0), 512 + row);
    CHECK_EQ(is_source_row(512, row, 0, 600), row < 88);
  }
}

TEST_MAIN()
