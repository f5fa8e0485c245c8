// recipe.cpp: masked decay, flip counts and gaps on the CPU.
#include <atomic>

#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "mask/patterns.h"

namespace sparse24::cpu {
namespace {

template <typename Grad, typename Weight>
void masked_decay_tile(const MaskedDecayArgs& args, float decay, const Tile& tile) {
  const Strided<Grad> grad = typed<Grad>(args.grad);
  const Strided<const Weight> w = typed<Weight>(args.w);
  const int64_t block_cols = args.grad.cols / 4;
  const auto decay_element = [&](int64_t r, int64_t c) {
    const uint16_t mask = args.mask[(r / 4) * block_cols + c / 4];
    if (mask >> (4 * (r % 4) + c % 4) & 1) return;
    const float pull = decay * to_float(w(r, c));
    grad(r, c) = from_float<Grad>(to_float(grad(r, c)) + pull);
  };
  if (grad.is_column_major()) {
    for (int64_t c = tile.col_begin; c < tile.col_end; ++c)
      for (int64_t r = tile.row_begin; r < tile.row_end; ++r) decay_element(r, c);
  } else {
    for (int64_t r = tile.row_begin; r < tile.row_end; ++r)
      for (int64_t c = tile.col_begin; c < tile.col_end; ++c) decay_element(r, c);
  }
}

}  // namespace

void masked_decay(const MaskedDecayArgs* tensors, int count) {
  for (int index = 0; index < count; ++index) {
    const MaskedDecayArgs& args = tensors[index];
    const float decay = args.grad_scale == nullptr ? args.decay : args.decay * *args.grad_scale;
    const int64_t rows = args.grad.rows, cols = args.grad.cols, tile_cols = tiles_along(cols);
    with_type(args.grad.dtype, [&](auto grad) {
      using Grad = decltype(grad);
      with_type(args.w.dtype, [&](auto w) {
        using W = decltype(w);
        parallel_for(tiles_along(rows) * tile_cols, kTile * kTile, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t)
            masked_decay_tile<Grad, W>(args, decay,
                                       tile_at(t / tile_cols, t % tile_cols, rows, cols));
        });
      });
    });
  }
}

void mask_flips(const MaskFlipsArgs* tensors, int count) {
  for (int index = 0; index < count; ++index) {
    const MaskFlipsArgs& args = tensors[index];
    std::atomic<int64_t> total{0};
    parallel_for(args.blocks, 4, [&](int64_t begin, int64_t end) {
      int64_t flips = 0;
      for (int64_t b = begin; b < end; ++b)
        flips += __builtin_popcount(static_cast<unsigned>(args.mask_a[b] ^ args.mask_b[b]));
      total += flips;
    });
    *args.flips = total;
  }
}

void mask_gap(const ConstMatrix& w, float* gap) {
  const int64_t block_cols = w.cols / 4;
  with_type(w.dtype, [&](auto zero) {
    const auto values = typed<decltype(zero)>(w);
    // A block goes through all 90 patterns: about 50 times the work of reading it.
    parallel_for(w.rows / 4, block_cols * 16 * 50, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        for (int64_t c = 0; c < block_cols; ++c) {
          float block[4][4];
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) block[i][j] = to_float(values(4 * b + i, 4 * c + j));
          gap[b * block_cols + c] = block_gap(block, kPatternTable);
        }
    });
  });
}

}  // namespace sparse24::cpu
