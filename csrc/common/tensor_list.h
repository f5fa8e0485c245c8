// tensor_list.h: many tensors in one launch. The list travels in the kernel's parameters, so
// nothing is allocated or copied, and a graph captures it by value.
//
// Tiles of all tensors are numbered through; a block finds its tensor by bisecting the numbers of
// their first tiles. A list with room for one tensor has nothing to find: its kernel reads fixed
// parameters, which saves a small tensor's launch some 0.3 microseconds
// (bench/results/packing.csv).
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace sparse24 {

constexpr int kTensorsPerLaunch = 32;
constexpr int kKernelParameterBytes = 4096;

/// The first step of a bisection among `capacity` tensors: the largest power of two below that, so
/// that the steps add up to every index, whatever the capacity is.
SP24_HD constexpr int first_step(int capacity) {
  int step = 1;
  while (2 * step < capacity) step *= 2;
  return capacity == 1 ? 0 : step;
}

template <typename Tensor, int kCapacity = kTensorsPerLaunch>
struct TensorList {
  int count = 0;
  uint32_t first_tile[kCapacity + 1] = {};  // and one past the last: the number of tiles
  Tensor tensor[kCapacity];

  uint32_t tiles() const { return first_tile[count]; }
  bool full() const { return count == kCapacity; }

  void add(const Tensor& added, uint32_t added_tiles) {
    tensor[count] = added;
    first_tile[count + 1] = first_tile[count] + added_tiles;
    ++count;
  }

  /// The tensor that a tile belongs to.
  SP24_HD int find(uint32_t tile) const {
    constexpr int kFirstStep = first_step(kCapacity);
    int found = 0;
    SP24_UNROLL
    for (int step = kFirstStep; step > 0; step /= 2) {
      if (found + step < count && first_tile[found + step] <= tile) found += step;
    }
    return found;
  }

  /// A tile's number among those of its tensor.
  SP24_HD uint32_t within(uint32_t tile, int index) const {
    return kCapacity == 1 ? tile : tile - first_tile[index];
  }

  /// The first tensor alone.
  TensorList<Tensor, 1> single() const {
    TensorList<Tensor, 1> list;
    list.add(tensor[0], first_tile[1]);
    return list;
  }
};

}  // namespace sparse24
