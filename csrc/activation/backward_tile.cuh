// backward_tile.cuh: the backward of one tile, from its operands' copy into shared memory to that
// of its results out of it, for the dense kernel and for the one that packs too.
//
// One buffer of shared memory an operand: d_h, gate, up come in; h, d_gate, d_up leave from their
// places.
#pragma once

#include "activation/backward_patch.cuh"
#include "activation/tile_pass.cuh"

namespace sparse24 {

template <typename Operand>
struct TileBackward {
  Operand d_h, gate, up, d_gate, d_up, h;  // plain: no up, no d_up
  TileWalk walk;
  bool with_h;
  int lines = 8;  // at least those of a patch: see backward_patch
};

template <typename Tile, bool kGated>
constexpr int kBackwardBytes = (kGated ? 3 : 2) * Tile::kBytes;

/// Shared memory that a block may have on each of the GPUs: least on sm_86 and sm_89.
constexpr int kBlockMemory = 99 * 1024;

/// Can all operands be moved in tiles?
inline bool backward_tiles_fit(const ActivationBackwardArgs& args, const BackwardLayouts& layouts) {
  return tiles_fit(args.d_h, layouts.d_h) && tiles_fit(args.gate_up, layouts.gate_up) &&
         tiles_fit(args.d_gate_up, layouts.d_gate_up) &&
         (args.h.data == nullptr || tiles_fit(args.h, layouts.h));
}

template <typename Tile, typename Operand>
TileBackward<Operand> tile_backward(const ActivationBackwardArgs& args,
                                    const BackwardLayouts& layouts) {
  static_assert(kBackwardBytes<Tile, true> + 1024 < kBlockMemory, "beside what kernels have");
  const int64_t d_ff = args.d_h.cols, up = args.gated ? d_ff : 0;
  const bool with_h = args.h.data != nullptr;
  const Operand d_h = tile_operand<Tile, Operand>(args.d_h, layouts.d_h, 0, d_ff);
  return {d_h,
          tile_operand<Tile, Operand>(args.gate_up, layouts.gate_up, 0, d_ff),
          tile_operand<Tile, Operand>(args.gate_up, layouts.gate_up, up, d_ff),
          tile_operand<Tile, Operand>(args.d_gate_up, layouts.d_gate_up, 0, d_ff),
          tile_operand<Tile, Operand>(args.d_gate_up, layouts.d_gate_up, up, d_ff),
          with_h ? tile_operand<Tile, Operand>(args.h, layouts.h, 0, d_ff) : d_h,
          tile_walk<Tile>(args.d_h.rows, d_ff, layouts.d_gate_up),
          with_h};
}

/// Starts the copies of all operands: for one thread of the engine, or all.
template <typename Tile, bool kGated, typename Operand>
__device__ __forceinline__ void load_operands(const TileBackward<Operand>& p, char* staged,
                                              uint64_t* arrived, int token, int feature) {
  begin_loads<Operand>(arrived, kBackwardBytes<Tile, kGated>);
  load_tile<Tile>(staged, p.d_h, arrived, token, feature);
  load_tile<Tile>(staged + Tile::kBytes, p.gate, arrived, token, feature);
  if (kGated) load_tile<Tile>(staged + 2 * Tile::kBytes, p.up, arrived, token, feature);
}

/// This thread's patches of what has arrived, held by columns (`by_columns`) or rows: those that
/// lie otherwise are turned.
template <typename Tile, bool kGated, typename Operand, typename T>
__device__ __forceinline__ void read_operands(const TileBackward<Operand>& p, const char* staged,
                                              bool by_columns, SquarePatch<T>& d_h,
                                              SquarePatch<T>& gate, SquarePatch<T>& up) {
  const typename Tile::Place place{};
  d_h = Tile::read(staged, place, p.d_h.column_major);
  gate = Tile::read(staged + Tile::kBytes, place, p.gate.column_major);
  if (kGated) up = Tile::read(staged + 2 * Tile::kBytes, place, p.gate.column_major);
  if (p.d_h.column_major != by_columns) turn(d_h);
  if (p.gate.column_major != by_columns) {
    turn(gate);
    if (kGated) turn(up);
  }
}

/// Puts this thread's results, held by columns or rows, where store_results takes them. All threads
/// must have read their operands.
template <typename Tile, bool kGated, typename Operand, typename T>
__device__ __forceinline__ void stage_results(const TileBackward<Operand>& p, char* staged,
                                              bool by_columns, SquarePatch<T> h,
                                              SquarePatch<T> d_gate, SquarePatch<T> d_up) {
  const typename Tile::Place place{};
  if (p.with_h) {
    if (p.h.column_major != by_columns) turn(h);
    Tile::write(staged, place, p.h.column_major, h);
  }
  const bool differs = p.d_gate.column_major != by_columns;
  if (differs) turn(d_gate);
  Tile::write(staged + Tile::kBytes, place, p.d_gate.column_major, d_gate);
  if (kGated) {
    if (differs) turn(d_up);
    Tile::write(staged + 2 * Tile::kBytes, place, p.d_gate.column_major, d_up);
  }
}

/// Starts the copies of all results: for one thread of the engine, or all; they call finish_stores
/// before the block ends.
template <typename Tile, bool kGated, typename Operand>
__device__ __forceinline__ void store_results(const TileBackward<Operand>& p, const char* staged,
                                              int token, int feature) {
  store_tile<Tile>(p.d_gate, staged + Tile::kBytes, token, feature);
  if (kGated) store_tile<Tile>(p.d_up, staged + 2 * Tile::kBytes, token, feature);
  if (p.with_h) store_tile<Tile>(p.h, staged, token, feature);
}

}  // namespace sparse24
