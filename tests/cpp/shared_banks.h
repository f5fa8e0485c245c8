// shared_banks.h: how many lanes meet in a bank of shared memory, for tests of where things lie there.
#pragma once

#include <algorithm>
#include <array>
#include <set>

#include "gemm/sm80/staged.h"
#include "testing.h"

namespace testing {

/// At worst, of the lanes of a phase; lanes of the same word do not count.
template <typename Address>
int worst_conflict(int lanes, int bytes, const Address& address) {
  const int phase = 128 / bytes;
  int worst = 0;
  for (int first = 0; first < lanes; first += phase) {
    std::array<std::set<int>, 32> words;
    for (int lane = first; lane < first + phase; ++lane)
      for (int word = address(lane) / 4; word < (address(lane) + bytes) / 4; ++word)
        words[word % 32].insert(word);
    for (const auto& bank : words) worst = std::max(worst, static_cast<int>(bank.size()));
  }
  return worst;
}

/// Neither ldmatrix of an operand of `fragments` instructions a warp nor the copies into its stage.
template <typename Operand, typename Place>
void check_operand_banks(int fragments) {
  using namespace sparse24::gemm::sm80;
  for (int fragment = 0; fragment < fragments; ++fragment)
    for (int step = 0; step < kSteps; ++step)
      CHECK_EQ(worst_conflict(32, kUnitBytes,
                              [&](int lane) { return Place(1, lane).offset(fragment, step); }),
               1);
  // Copies of neighbouring threads: eight units at a time.
  for (int first = 0; first + 32 <= 256; first += 32)
    CHECK_EQ(worst_conflict(32, kUnitBytes,
                            [&](int lane) {
                              const int thread = first + lane;
                              return unit_offset<Operand::kUnits>(thread / Operand::kUnits,
                                                                  thread % Operand::kUnits);
                            }),
             1);
}

/// The lanes of a load of E share all of its bytes among them.
template <int kElementBytes>
void check_meta_loads() {
  using namespace sparse24::gemm::sm80;
  std::set<int> seen;
  for (int lane = 0; lane < 32; ++lane) {
    const int at = MetaWords<kElementBytes>::lane_offset(lane);
    CHECK(at >= 0 && at + 8 <= kMetaLoadBytes && at % 8 == 0 && seen.insert(at).second);
  }
  // A load's rows are side by side in a block.
  CHECK_EQ(meta_source<kElementBytes>(MetaWords<kElementBytes>::kLoadRows, 8), kMetaLoadBytes);
}

/// A thread's copies are lines a constant apart: the exchange of units must not change with them.
template <typename Operand>
void check_lines_of_a_thread() {
  using namespace sparse24::gemm::sm80;
  const int step = 256 / Operand::kUnits;
  for (int line = step; line < Operand::kLines; ++line)
    for (int unit = 0; unit < Operand::kUnits; ++unit)
      CHECK_EQ(unit_offset<Operand::kUnits>(line, unit),
               unit_offset<Operand::kUnits>(line - step, unit) + step * Operand::kLineBytes);
}

}  // namespace testing
