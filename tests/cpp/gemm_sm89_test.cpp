// The maps of csrc/gemm/sm80 for operands of 8 bits, replayed without a GPU: tiles of a product, by
// emulated copies, ldmatrix and mma.sp m16n8k64, are those of the decompressed operand; nothing that
// lanes do at a time meets in a bank; E is what CUTLASS' reordering hands to the same lanes.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"
#include "gemm/sm80/staged.h"
#include "mma_sp8.h"
#include "random.h"
#include "shared_banks.h"
#include "testing.h"

using namespace sparse24;
using namespace sparse24::gemm::sm80;
using testing::Elements;
using testing::PackedOperand;
using testing::Random;

namespace {

constexpr DType kFormat = DType::kFloat8E4M3;
constexpr int kTileM = 128, kTileN = 128, kTileK = gemm::sm80::kTileKOf<1>;
constexpr int kWarpN = gemm::sm80::kWarpNOf<1>, kFragmentsN = gemm::sm80::kFragmentsNOf<1>;
using Lhs = Staged<Orientation::kKMajor, kTileM, kTileK / 2, 1>;
using Rhs = Staged<Orientation::kKMajor, kTileN, kTileK, 1>;
using Meta = MetaWords<1>;

/// Bytes stand for elements: their codes.
using Memory = std::vector<uint8_t>;
using Matrices = testing::Registers;  // [lane][matrix][byte]

/// A K-major operand of `rows` x `length` in memory, as a loader leaves a K tile of it in a stage: zeros outside.
template <typename Operand>
Memory staged(const std::vector<uint8_t>& values, int rows, int length, int row0, int k_tile) {
  Memory memory(Operand::kBytes, 0xFF);
  for (int line = 0; line < Operand::kLines; ++line)
    for (int unit = 0; unit < Operand::kUnits; ++unit)
      for (int i = 0; i < kUnitBytes; ++i) {
        const int row = row0 + line, k = k_tile * Operand::kLength + unit * kUnitBytes + i;
        uint8_t& to = memory[unit_offset<Operand::kUnits>(line, unit) + i];
        CHECK_EQ(int{to}, 0xFF);  // NaN, which no operand has: no unit lies on another
        to = row < rows && k < length ? values[static_cast<size_t>(row) * length + k] : 0;
      }
  return memory;
}

/// Where the words of rows from `row` on begin.
int64_t meta_start(int rows, int row, int k_tile) {
  const int blocks_m = static_cast<int>(round_up(rows, kMetaBlock) / kMetaBlock);
  return meta8_block_start(0, k_tile, blocks_m) + meta_source<1>(row, blocks_m);
}

/// ldmatrix.x4: lane 8j + i gives the address of the 16 bytes of line i of matrix j; lane 4g + q gets bytes 4q to
/// 4q + 3 of line g.
template <typename Address>
Matrices load_matrices(const Memory& memory, const Address& address) {
  Matrices to;
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix)
      std::memcpy(to[lane][matrix].data(), &memory[address(matrix * 8 + lane / 4) + lane % 4 * 4],
                  4);
  return to;
}

/// A product of small integers: sums are exact.
struct Problem {
  int m, n, k;
  PackedOperand lhs;
  Elements rhs;  // [n, k]
  std::vector<float> exact;

  Problem(int m, int n, int k) : m(m), n(n), k(k), exact(static_cast<size_t>(m) * n) {
    Random random(m + n + k);
    const auto draw = [&] { return static_cast<float>(random.below(9) - 4); };
    lhs = testing::make_packed(m, k, k, kFormat, Orientation::kKMajor, random, draw);
    rhs = Elements(static_cast<size_t>(n) * k, kFormat);
    for (size_t i = 0; i < rhs.size(); ++i) rhs.set(i, draw());
    for (int row = 0; row < m; ++row)
      for (const auto& kept : lhs.rows[row])
        for (int column = 0; column < n; ++column)
          exact[static_cast<size_t>(row) * n + column] +=
              kept.value * rhs.get(static_cast<size_t>(column) * k + kept.k);
  }
};

using Tile = std::vector<std::array<float, kTileN>>;

/// The sums of one tile by all its warps.
Tile multiply_tile(const Problem& p, int m0, int n0) {
  Tile tile(kTileM);
  for (int k_tile = 0; k_tile * kTileK < p.k; ++k_tile) {
    const Memory lhs = staged<Lhs>(p.lhs.values.bytes(), p.m, p.k / 2, m0, k_tile),
                 rhs = staged<Rhs>(p.rhs.bytes(), p.n, p.k, n0, k_tile);
    for (int warp_m = 0; warp_m < kTileM / kWarpM; ++warp_m)
      for (int warp_n = 0; warp_n < kTileN / kWarpN; ++warp_n)
        for (int m16 = 0; m16 < kFragmentsM; ++m16)
          for (int n8 = 0; n8 < kFragmentsN; ++n8) {
            float sums[16][8] = {};
            for (int step = 0; step < kSteps; ++step) {
              const Matrices a = load_matrices(
                  lhs, [&](int lane) { return LhsPlace<Lhs>(warp_m, lane).offset(m16, step); });
              const Matrices b = load_matrices(
                  rhs, [&](int lane) { return RhsPlace<Rhs>(warp_n, lane).offset(n8, step); });
              std::array<uint32_t, 32> words;
              const int64_t rows =
                  meta_start(p.m, m0 + warp_m * kWarpM + m16 * Meta::kLoadRows, k_tile);
              for (int lane = 0; lane < 32; ++lane)
                std::memcpy(&words[lane], &p.lhs.E[rows + Meta::lane_offset(lane) + step * 4], 4);
              testing::multiply_sparse8(sums, a, b, words);
            }
            for (int m = 0; m < 16; ++m)
              for (int n = 0; n < 8; ++n)
                tile[warp_m * kWarpM + m16 * 16 + m][warp_n * kWarpN + n8 * 8 + n] += sums[m][n];
          }
  }
  return tile;
}

void check_product(const Problem& p) {
  for (int m0 = 0; m0 < p.m; m0 += kTileM)
    for (int n0 = 0; n0 < p.n; n0 += kTileN) {
      const Tile tile = multiply_tile(p, m0, n0);
      for (int m = m0; m < std::min(p.m, m0 + kTileM); ++m)
        for (int n = n0; n < std::min(p.n, n0 + kTileN); ++n)
          CHECK_EQ(tile[m - m0][n - n0], p.exact[static_cast<size_t>(m) * p.n + n]);
    }
}

}  // namespace

TEST(tiles_of_a_product_are_those_of_the_decompressed_operand) {
  check_product({kTileM, kTileN, kTileK});
  check_product({200, 136, 416});  // edges of tiles, of blocks of E and of a K tile
}

TEST(nothing_that_lanes_do_at_a_time_meets_in_a_bank) {
  testing::check_operand_banks<Lhs, LhsPlace<Lhs>>(kFragmentsM);
  testing::check_operand_banks<Rhs, RhsPlace<Rhs>>(kFragmentsN);
}

TEST(lanes_load_E_side_by_side) { testing::check_meta_loads<1>(); }

TEST(an_rtx_4090_holds_four_stages) { CHECK_EQ(stages_in(99 * 1024, kStageBytes<Lhs, Rhs>), 4); }

TEST(lines_of_a_thread_are_a_constant_apart) {
  testing::check_lines_of_a_thread<Lhs>();
  testing::check_lines_of_a_thread<Rhs>();
}

// CUTLASS' reordering for 8-bit operands, restated as in gemm_sm80_test.cpp, of 32-bit words, each the positions of
// 32 k of a row: within 16 rows, row r goes to r % 8 * 2 + r / 8. Its instructions take words 0 and 1, and 2 and 3 of a
// row; ours 0 and 2, and 1 and 3.
TEST(lanes_read_the_words_that_CUTLASS_hands_them) {
  constexpr int kRows = 16, kWords = 4;
  std::vector<int> reordered(kRows * kWords);
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kWords; ++j) {
      int row = m % 8 * 2 + m / 8, column = j;
      if (row % 2 == 0 && column % 2 == 1) {
        ++row, --column;
      } else if (row % 2 == 1 && column % 2 == 0) {
        --row, ++column;
      }
      reordered[(column / 2 * kRows + row) * 2 + column % 2] = m * kWords + j;
    }
  std::vector<int> ours(kRows * kWords);  // by where they are in E
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kWords; ++j) ours[m * kMeta8RowBytes / 4 + j] = m * kWords + j;
  for (int step = 0; step < kSteps; ++step)
    for (int lane = 0; lane < 32; ++lane) {
      const int theirs = reordered[step * 32 + lane],
                mine = ours[Meta::lane_offset(lane) / 4 + step];
      CHECK_EQ(mine / kWords, theirs / kWords);
      CHECK_EQ(theirs % kWords, 2 * step + lane % 4 / 2);
      CHECK_EQ(mine % kWords, step + 2 * (lane % 4 / 2));
    }
}

TEST_MAIN()
