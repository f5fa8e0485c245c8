// stream_k.h: how clusters of blocks share the tiles of a last wave that they do not fill. Plain
// integers, tested on the CPU.
//
// The K loop of each tile is cut into parts, so that more clusters than tiles have work. All tiles
// are cut at the same places:
//
//   k of a tile   | lane 0: the owner's | lane 1 | ... | rest |
//
// A lane of a tile is all that one cluster has to do. Clusters left over are helpers: they walk the
// rests of all tiles, put end to end, in equal shares. So the clusters of a lane are at the same k
// at the same time, and helpers never far from each other: what they read comes from memory once,
// and to the others from L2. (Putting whole tiles end to end and cutting those into equal shares is
// simpler, but then every cluster is at another k: up to four times the bytes,
// docs/kernels/gemm.md.)
//
// Sums   the owner adds those of the other lanes, then the helpers', in this order: results do not
//        depend on timing. Each part that is not the owner's has a slot for its sums; there are
//        fewer slots than clusters.
// Unit   work and time are counted in K tiles.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24::gemm {

struct StreamK {
  int tiles = 0;                     // that are cut; 0: none
  int clusters = 0;                  // that have work
  int k_tiles = 0;                   // of a tile
  int lanes = 0;                     // of a tile, the owner's among them
  int lead = 0, lane_k = 0;          // a lane is lane_k, the owner's lead more
  int rest = 0;                      // of each tile, for helpers
  int share = 0, longer_shares = 0;  // of a helper; so many are one longer

  struct Part {
    int tile, k_begin, k_end;
    int slot;  // for its sums; -1: the owner's
  };

  // Measured on an H100 (docs/kernels/gemm.md).
  static constexpr int kLead = 8;   // until sums that were given can be added
  static constexpr int kAdd = 8;    // to add the sums of a part
  static constexpr int kGive = 16;  // what a helper loses where it goes on to another tile

  /// The quickest way to share `tiles` among `clusters`: fewer of them than clusters, and at least
  /// one.
  static StreamK of(int tiles, int clusters, int k_tiles) {
    StreamK best = with_lanes(tiles, tiles, k_tiles);
    for (int lanes = 2; lanes * tiles <= clusters && lanes <= k_tiles; ++lanes) {
      best.replace_by_quicker(with_lanes(tiles, lanes * tiles, k_tiles));
    }
    best.replace_by_quicker(with_lanes(tiles, clusters, k_tiles));
    return best;
  }

  bool is_cut() const { return lanes > 1 || rest > 0; }  // else as whole tiles

  /// When the last owner has added all sums.
  int time() const { return lead + lane_k + kAdd * (lanes - 1 + (rest > 0 ? 2 : 0)); }

  SP24_HD int in_lanes() const { return lanes * tiles; }  // clusters; the rest are helpers
  SP24_HD Part lane_part(int lane, int tile) const {
    return {tile, lane_begin(lane), lane_begin(lane + 1), lane == 0 ? -1 : lane_slot(lane, tile)};
  }

  /// A helper's work is [share_begin(helper), share_begin(helper + 1)) of the rests put end to end.
  SP24_HD int share_begin(int helper) const {
    return helper * share + (helper < longer_shares ? helper : longer_shares);
  }
  /// The first part of a helper's work from `begin` to `end`.
  SP24_HD Part helper_part(int helper, int begin, int end) const {
    const int tile = begin / rest, k_begin = k_tiles - rest + begin % rest;
    const int k_end = k_begin + (end - begin);
    return {tile, k_begin, k_end < k_tiles ? k_end : k_tiles, helper_slot(helper, tile)};
  }

  /// Calls visit(slot) for each of the sums that a tile's owner adds, in order.
  template <typename Visit>
  SP24_HD void for_each_slot(int tile, Visit&& visit) const {
    for (int lane = 1; lane < lanes && lane_begin(lane) < k_tiles; ++lane) {
      visit(lane_slot(lane, tile));
    }
    if (rest == 0) return;
    const int last = helper_of((tile + 1) * rest - 1);
    for (int helper = helper_of(tile * rest); helper <= last; ++helper) {
      visit(helper_slot(helper, tile));
    }
  }

 private:
  static StreamK with_lanes(int tiles, int clusters, int k_tiles) {
    StreamK cut;
    cut.tiles = tiles, cut.clusters = clusters, cut.k_tiles = k_tiles;
    cut.lanes = clusters / tiles;
    const int helpers = clusters - cut.in_lanes();
    cut.lead = k_tiles / 4 < kLead ? k_tiles / 4 : kLead;
    // Every cluster gets the same, but for the lead; on each tile helpers lose kGive.
    const int64_t work = int64_t{tiles} * (k_tiles - cut.lead + (helpers > 0 ? kGive : 0));
    cut.lane_k = static_cast<int>((work + clusters - 1) / clusters);
    const int64_t done = cut.lead + int64_t{cut.lanes} * cut.lane_k;
    if (helpers > 0 && done < k_tiles) {
      cut.rest = static_cast<int>(k_tiles - done);
      cut.share = tiles * cut.rest / helpers;
      cut.longer_shares = tiles * cut.rest % helpers;
    }
    return cut;
  }

  void replace_by_quicker(const StreamK& other) {
    if (other.time() < time()) *this = other;
  }

  SP24_HD int lane_begin(int lane) const {
    const int begin = lane == 0 ? 0 : lead + lane * lane_k;
    return begin < k_tiles ? begin : k_tiles;
  }
  SP24_HD int lane_slot(int lane, int tile) const { return (lane - 1) * tiles + tile; }
  /// Each part of the rests put end to end has a greater sum of tile and helper than the one
  /// before.
  SP24_HD int helper_slot(int helper, int tile) const {
    return (lanes - 1) * tiles + tile + helper;
  }
  /// Whose share this unit of the rests put end to end is.
  SP24_HD int helper_of(int unit) const {
    const int in_longer = longer_shares * (share + 1);
    return unit < in_longer ? unit / (share + 1) : longer_shares + (unit - in_longer) / share;
  }
};

}  // namespace sparse24::gemm
