// The shares of stream-K, walked through without a GPU: all work is done once, and all sums are
// handed over.
#include "gemm/stream_k.h"

#include <algorithm>
#include <cstdint>
#include <set>
#include <vector>

#include "testing.h"

using namespace sparse24::gemm;

namespace {

/// All parts of a cluster, as the kernel walks them.
std::vector<StreamK::Part> parts_of(const StreamK& cut, int cluster) {
  if (cluster < cut.in_lanes()) return {cut.lane_part(cluster / cut.tiles, cluster % cut.tiles)};
  std::vector<StreamK::Part> parts;
  const int helper = cluster - cut.in_lanes(), end = cut.share_begin(helper + 1);
  for (int unit = cut.share_begin(helper); unit < end;) {
    parts.push_back(cut.helper_part(helper, unit, end));
    unit += parts.back().k_end - parts.back().k_begin;
  }
  return parts;
}

template <typename Check>
void for_many_shapes(Check check) {
  for (int clusters : {1, 2, 3, 7, 57, 66}) {
    for (int tiles = 1; tiles < std::max(clusters, 2); ++tiles) {
      for (int k_tiles : {1, 2, 3, 5, 12, 16, 28, 63, 64, 100, 256, 1000, 20000}) {
        check(StreamK::of(tiles, clusters, k_tiles), clusters);
      }
    }
  }
}

}  // namespace

TEST(each_k_tile_of_each_tile_is_done_once) {
  for_many_shapes([](const StreamK& cut, int) {
    std::vector<std::vector<uint8_t>> done(cut.tiles, std::vector<uint8_t>(cut.k_tiles));
    for (int cluster = 0; cluster < cut.clusters; ++cluster) {
      for (const StreamK::Part& part : parts_of(cut, cluster)) {
        for (int k = part.k_begin; k < part.k_end; ++k) ++done[part.tile][k];
      }
    }
    for (const auto& tile : done) CHECK(std::count(tile.begin(), tile.end(), 1) == cut.k_tiles);
  });
}

TEST(the_owner_of_a_tile_adds_just_what_others_give) {
  for_many_shapes([](const StreamK& cut, int clusters) {
    std::vector<std::vector<int>> given(cut.tiles);
    std::vector<int> owners(cut.tiles);
    std::set<int> slots;
    for (int cluster = 0; cluster < cut.clusters; ++cluster) {
      for (const StreamK::Part& part : parts_of(cut, cluster)) {
        CHECK(part.k_begin < part.k_end);
        if (part.slot < 0) {
          ++owners[part.tile];
          CHECK_EQ(part.k_begin, 0);
          continue;
        }
        CHECK(part.slot < clusters);
        CHECK(slots.insert(part.slot).second);
        given[part.tile].push_back(part.slot);
      }
    }
    for (int tile = 0; tile < cut.tiles; ++tile) {
      CHECK_EQ(owners[tile], 1);
      std::vector<int> added;
      cut.for_each_slot(tile, [&](int slot) { added.push_back(slot); });
      std::sort(added.begin(), added.end());
      std::sort(given[tile].begin(), given[tile].end());
      CHECK(added == given[tile]);
    }
  });
}

TEST(owners_have_a_lead_in_which_others_give_their_sums) {
  for_many_shapes([](const StreamK& cut, int) {
    if (!cut.is_cut()) return;
    const StreamK::Part owner = cut.lane_part(0, 0);
    for (int cluster = cut.tiles; cluster < cut.clusters; ++cluster) {
      for (const StreamK::Part& part : parts_of(cut, cluster)) {
        CHECK(part.k_end - part.k_begin + std::min(cut.k_tiles / 4, 8) <= owner.k_end);
      }
    }
  });
}

TEST(whole_tiles_take_their_k_and_each_further_lane_its_addition) {
  CHECK_EQ(StreamK::of(5, 5, 100).time(), 100);
  const StreamK two = StreamK::of(5, 10, 100);
  CHECK_EQ(two.lanes, 2);
  CHECK_EQ(two.time(), 54 + 8);  // the owner does 8 more than the other lane, and adds its sums
}

TEST(no_cluster_does_much_more_than_its_share) {
  for_many_shapes([](const StreamK& cut, int) {
    for (int cluster = 0; cluster < cut.clusters; ++cluster) {
      int work = 0;
      for (const StreamK::Part& part : parts_of(cut, cluster)) work += part.k_end - part.k_begin;
      CHECK(work <= cut.lead + cut.lane_k);
    }
    CHECK(cut.time() <= cut.k_tiles);  // or whole tiles would be quicker
  });
}

TEST(lanes_are_at_the_same_k_in_all_tiles) {
  const StreamK cut = StreamK::of(26, 66, 256);
  CHECK(cut.lanes == 2 && cut.rest > 0);
  for (int lane = 0; lane < cut.lanes; ++lane) {
    for (int tile = 0; tile < cut.tiles; ++tile) {
      CHECK_EQ(cut.lane_part(lane, tile).k_begin, cut.lane_part(lane, 0).k_begin);
    }
  }
}

/// What gemm_gpu_test.cu runs on 132 multiprocessors, by its sizes.
TEST(the_test_on_a_gpu_has_shares_of_each_kind) {
  const StreamK helpers = StreamK::of(44, 66, 94);  // kTilesOfHelpers, k = 6016
  CHECK(helpers.lanes == 1 && helpers.rest > 0);
  const StreamK behind_a_wave = StreamK::of(70 - 66, 66, 33);  // kTilesOfTwoWaves, k = 2064
  CHECK(behind_a_wave.lanes >= 2);
  CHECK(StreamK::of(2, 66, 65).lanes >= 3);  // 264 x 136 x 4112
}

TEST(few_helpers_are_left_out) {
  // Two clusters of 66 over 32 tiles would each go through 16 of them.
  const StreamK cut = StreamK::of(32, 66, 64);
  CHECK_EQ(cut.clusters, 64);
  CHECK_EQ(cut.rest, 0);
}

TEST_MAIN()
