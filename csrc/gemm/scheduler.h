// scheduler.h: which parts of which tiles a block computes, and in which order.
//
// Strips     Clusters of tiles are walked in strips: `width` of them side by side along one extent
//            of the output, line after line along the other. The clusters that run at a time then
//            cover a block of the output about as high as wide, so that operands come from L2 and
//            not, many times over, from memory. The last strip may be narrower: nothing is padded.
// Stream-K   Where whole tiles do not fill the last wave, clusters share those (stream_k.h).
#pragma once

#include "cutlass/fast_math.h"
#include "gemm/stream_k.h"

namespace sparse24::gemm {

/// A part of a tile: K tiles k_begin to k_end of it.
struct Part {
  int m_tile = 0, n_tile = 0;
  int k_begin = 0, k_end = 0;
  int cut_tile = -1;  // among the cut ones; -1: a whole tile
  int slot = -1;      // of its sums, where another cluster owns the tile
  bool valid = false;
  CUTLASS_DEVICE int k_tiles() const { return k_end - k_begin; }
};

template <int kClusterM, int kClusterN>
class Scheduler {
 public:
  struct Params {
    cutlass::FastDivmod strip;              // by the clusters of a whole strip
    cutlass::FastDivmod width, last_width;  // of a strip, in clusters
    int full_strips = 0;
    bool strips_along_m = true;
    int grid_clusters = 0;
    int whole_clusters = 0;  // clusters of tiles done as a whole; the rest are cut
    int k_tiles = 0;
    StreamK cut;
  };

  static Params to_params(int m, int n, int k, int tile_m, int tile_n, int tile_k, int width,
                          bool strips_along_m, bool stream_k, int multiprocessors) {
    const auto count = [](int extent, int unit) { return (extent + unit - 1) / unit; };
    const int m_clusters = count(m, tile_m * kClusterM), n_clusters = count(n, tile_n * kClusterN);
    const int across = strips_along_m ? n_clusters : m_clusters;
    const int along = strips_along_m ? m_clusters : n_clusters;
    width = width < across ? width : across;
    Params params;
    params.strip = cutlass::FastDivmod(width * along);
    params.width = cutlass::FastDivmod(width);
    params.last_width = cutlass::FastDivmod(across % width == 0 ? width : across % width);
    params.full_strips = across / width;
    params.strips_along_m = strips_along_m;
    const int clusters = m_clusters * n_clusters;
    const int resident = multiprocessors / (kClusterM * kClusterN);
    params.k_tiles = count(k, tile_k);
    params.grid_clusters = resident < clusters ? resident : clusters;
    params.whole_clusters = clusters;
    if (stream_k && clusters % resident != 0) {
      params.cut = StreamK::of(clusters % resident, resident, params.k_tiles);
      params.whole_clusters = clusters - params.cut.tiles;
      params.grid_clusters = params.whole_clusters > 0 ? resident : params.cut.clusters;
    }
    return params;
  }

  static dim3 grid(const Params& params) {
    return dim3(params.grid_clusters * kClusterM, kClusterN, 1);
  }

  CUTLASS_DEVICE explicit Scheduler(const Params& params) : params_(params), whole_(cluster()) {}

  CUTLASS_DEVICE Part next() {
    if (whole_ < params_.whole_clusters) {
      Part part = place(whole_);
      part.k_end = params_.k_tiles;
      whole_ += params_.grid_clusters;
      return part;
    }
    const StreamK& cut = params_.cut;
    const int role = cut.clusters - 1 - cluster();  // the owners, who wait for others, start last
    if (role < 0) return {};
    if (role < cut.in_lanes()) {
      if (cut_done_ > 0) return {};
      cut_done_ = 1;
      return place(cut.lane_part(role / cut.tiles, role % cut.tiles));
    }
    const int helper = role - cut.in_lanes();
    const int begin = cut.share_begin(helper) + cut_done_, end = cut.share_begin(helper + 1);
    if (begin >= end) return {};
    const StreamK::Part part = cut.helper_part(helper, begin, end);
    cut_done_ += part.k_end - part.k_begin;
    return place(part);
  }

  /// Calls visit(slot) for the sums of other clusters that the owner of a tile adds, in order.
  template <typename Visit>
  CUTLASS_DEVICE void for_each_slot(const Part& part, Visit&& visit) const {
    if (part.cut_tile >= 0) params_.cut.for_each_slot(part.cut_tile, visit);
  }

 private:
  CUTLASS_DEVICE Part place(const StreamK::Part& cut) const {
    Part part = place(params_.whole_clusters + cut.tile);
    part.k_begin = cut.k_begin;
    part.k_end = cut.k_end;
    part.cut_tile = cut.tile;
    part.slot = cut.slot;
    part.valid = cut.k_begin < cut.k_end;  // short K loops leave nothing to the last lanes
    return part;
  }

  CUTLASS_DEVICE Part place(int cluster) const {
    int strip, in_strip, line, column;
    params_.strip(strip, in_strip, cluster);
    if (strip < params_.full_strips) {
      params_.width(line, column, in_strip);
    } else {
      params_.last_width(line, column, in_strip);
    }
    column += strip * params_.width.divisor;
    Part part;
    part.m_tile =
        (params_.strips_along_m ? line : column) * kClusterM + int(blockIdx.x) % kClusterM;
    part.n_tile = (params_.strips_along_m ? column : line) * kClusterN + int(blockIdx.y);
    part.valid = true;
    return part;
  }

  /// This cluster's number in the grid.
  CUTLASS_DEVICE static int cluster() { return int(blockIdx.x) / kClusterM; }

  // All that lives while a tile is multiplied and stored, where registers are few; the rest is
  // worked out anew for each part.
  const Params& params_;
  int whole_;         // the next whole tile of this cluster
  int cut_done_ = 0;  // of its cut tiles: K tiles of a helper; 1 once a lane has been given
};

}  // namespace sparse24::gemm
