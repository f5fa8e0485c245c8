// metadata_words.h: which words of E a multiplying thread hands to each wgmma of a K tile.
//
// E waits in shared memory as it lies in memory (common/metadata.h): a stage has the blocks of the
// tile's rows, one after the other. A wgmma takes one 32-bit word of each thread.
//
// 16 bits  a 64 (m) x 64 (k) block is 512 bytes: 128 threads x two words, one for each wgmma of k
//          32. Thread t of a warpgroup reads the 8 bytes at warp*128 + (t%2)*64 + (t%32/4)*8. The
//          halves of a word are of rows r and r + 8.
// 8 bits   a 64 x 128 block is 1024 bytes, 16 a row, and a wgmma is of k 64: thread t reads, for
//          the kb-th, the 4 bytes at row*16 + kb*8 + (t/2%2)*4, row = warp*16 + (t%2)*8 + t%32/4.
// Gated    rows come in turns of eight from gate and up (gated_rows.h), and a stage has a block of
//          gate, then one of up. Rows r and r + 8 are of a feature of gate and the same of up: with
//          16 bits halves of two words, with 8 bits the words of even and of odd threads.
#pragma once

#include <cstdint>

#include "cutlass/cutlass.h"

namespace sparse24::gemm::sm90 {

template <int kElementBytes, bool kGated>
class MetadataWords;

template <bool kGated>
class MetadataWords<2, kGated> {
 public:
  /// `thread` is of the two multiplying warpgroups.
  CUTLASS_DEVICE MetadataWords(const void* shared, int thread) {
    const int lane = thread % 32, warp = thread / 32;
    // Gated: this warp's eight rows of gate are half of a group of sixteen, and so are those of up.
    const int sixteen = kGated ? warp / 2 : warp;
    from_ = static_cast<const char*>(shared) + sixteen * 128 + lane % 2 * 64 + lane / 4 * 8;
    halves_ = warp % 2 ? 0x7632u : 0x5410u;
  }

  template <typename Words>
  CUTLASS_DEVICE void load(int stage_bytes, Words& words) const {
    const char* from = from_ + stage_bytes;
    uint2 pair = *reinterpret_cast<const uint2*>(from);
    if constexpr (kGated) {
      const uint2 up = *reinterpret_cast<const uint2*>(from + 512);
      pair.x = __byte_perm(pair.x, up.x, halves_);
      pair.y = __byte_perm(pair.y, up.y, halves_);
    }
    words(0, 0, 0) = pair.x;
    words(0, 0, 1) = pair.y;
  }

 private:
  const char* from_;
  uint32_t halves_;
};

template <bool kGated>
class MetadataWords<1, kGated> {
 public:
  CUTLASS_DEVICE MetadataWords(const void* shared, int thread) {
    const int lane = thread % 32, warp = thread / 32;
    const int row =
        kGated ? lane % 2 * 64 + warp * 8 + lane / 4 : warp * 16 + lane % 2 * 8 + lane / 4;
    from_ = static_cast<const char*>(shared) + row * 16 + lane / 2 % 2 * 4;
  }

  template <typename Words>
  CUTLASS_DEVICE void load(int stage_bytes, Words& words) const {
    const char* from = from_ + stage_bytes;
    words(0, 0, 0) = *reinterpret_cast<const uint32_t*>(from);
    words(0, 0, 1) = *reinterpret_cast<const uint32_t*>(from + 8);
  }

 private:
  const char* from_;
};

}  // namespace sparse24::gemm::sm90
