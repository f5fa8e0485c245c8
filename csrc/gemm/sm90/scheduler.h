// scheduler.h: which parts of which tiles a block computes, and in which order.
//
// Strips     Clusters of tiles are walked in strips: `width` of them side by side along one extent
//            of the output, line after line along the other. The clusters that run at a time then
//            cover a block of the output about as high as wide, so that operands come from L2 and
//            not, many times over, from memory. The last strip may be narrower: nothing is padded.
// Stream-K   Where whole tiles do not fill the last wave, the tiles of the last one to two waves
//            are put end to end, and their K loops cut into equal shares. A share is a part at most
//            of its first tile, whole tiles, and a part at most of its last. Who has the head of a
//            tile (k = 0) owns it: it comes to it last, when the others have written their sums of
//            it to the workspace long ago, and adds those in order. So results do not depend on
//            timing.
#pragma once

#include "cutlass/fast_math.h"

namespace sparse24::gemm::sm90 {

/// A part of a tile: K tiles k_begin to k_end of it.
struct Part {
  int m_tile = 0, n_tile = 0;
  int k_begin = 0, k_end = 0;
  int peers = 0;  // clusters after this one that have written sums of this tile
  bool valid = false;
  CUTLASS_DEVICE int k_tiles() const { return k_end - k_begin; }
  CUTLASS_DEVICE bool owns_tile() const { return k_begin == 0; }
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
    int clusters = 0;
    cutlass::FastDivmod k_tiles;
    int share = 0, longer_shares = 0;  // of the cut ones, in K tiles; so many are one longer
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
    params.clusters = params.whole_clusters = m_clusters * n_clusters;
    const int resident = multiprocessors / (kClusterM * kClusterN);
    params.k_tiles = cutlass::FastDivmod(count(k, tile_k));
    if (stream_k && params.clusters % resident != 0) {
      const int whole_waves = params.clusters / resident;
      params.whole_clusters = whole_waves > 1 ? (whole_waves - 1) * resident : 0;
      params.grid_clusters = resident;
      const int units = (params.clusters - params.whole_clusters) * count(k, tile_k);
      params.share = units / resident;
      params.longer_shares = units % resident;
    } else {
      params.grid_clusters = resident < params.clusters ? resident : params.clusters;
    }
    return params;
  }

  static dim3 grid(const Params& params) {
    return dim3(params.grid_clusters * kClusterM, kClusterN, 1);
  }

  CUTLASS_DEVICE explicit Scheduler(const Params& params)
      : params_(params), me_(int(blockIdx.x) / kClusterM), whole_(me_) {
    if (params.whole_clusters < params.clusters) {
      unit_ = share_begin(me_);
      last_unit_ = share_begin(me_ + 1);
    }
  }

  CUTLASS_DEVICE Part next() {
    if (whole_ < params_.whole_clusters) {
      Part part = place(whole_);
      part.k_end = params_.k_tiles.divisor;
      whole_ += params_.grid_clusters;
      return part;
    }
    if (unit_ >= last_unit_) return {};
    const int k_tiles = params_.k_tiles.divisor;
    int tile, k_begin;
    params_.k_tiles(tile, k_begin, unit_);
    Part part = place(params_.whole_clusters + tile);
    const int tile_end = (tile + 1) * k_tiles;
    const int end = tile_end < last_unit_ ? tile_end : last_unit_;
    part.k_begin = k_begin;
    part.k_end = k_begin + end - unit_;
    if (k_begin == 0) {
      while (share_begin(me_ + 1 + part.peers) < tile_end) ++part.peers;
    }
    unit_ = end;
    return part;
  }

 private:
  CUTLASS_DEVICE int share_begin(int cluster) const {
    const int longer = cluster < params_.longer_shares ? cluster : params_.longer_shares;
    return cluster * params_.share + longer;
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

  const Params& params_;
  int me_, whole_;
  int unit_ = 0, last_unit_ = 0;  // what is left of this cluster's share
};

}  // namespace sparse24::gemm::sm90
