// tile_copies.cuh: tiles of a matrix into shared memory and out of it, by what the GPU has for it.
//
//   EngineOperand   Hopper: the copy engine (common/tma.cuh); one thread orders whole boxes
//   ThreadOperand   others: all threads of the block copy vectors of 16 bytes, asynchronously on
//                   the way in
//
// A tile lies in shared memory as in the matrix, its lines one behind the other; both ways move the
// same bytes, neighbouring threads neighbouring vectors of a line. What a tile has outside of the
// matrix is read as zero, and not written. A kernel is written once, over the kind of operand:
//
//   if (!kRunsHere<Operand>) return
//   if (!kByEngine<Operand> || threadIdx.x == 0) { begin_loads, load_tile }
//   wait_for_loads
//   ... each thread: fence_results, and a barrier
//   if (!kByEngine<Operand> || threadIdx.x == 0) { store_tile, finish_stores }
#pragma once

#include <cstdint>

#include "activation/tile_place.h"
#include "common/layout.h"
#include "common/tma.cuh"
#include "common/vector.cuh"
#include "sparse24/types.h"

namespace sparse24 {

/// Lines of a matrix that `tiles_fit`, or of some of its columns.
struct MatrixLines {
  const char* first;
  int element_bytes;
  int64_t along, count, pitch;  // elements of a line, lines, bytes between them
  bool column_major;
};

/// `cols` columns from `first_col` on.
template <typename Pointer>
MatrixLines matrix_lines(const MatrixView<Pointer>& m, Layout layout, int64_t first_col,
                         int64_t cols) {
  const bool column_major = layout == Layout::kColumnMajor;
  const int64_t bytes = bytes_of(m.dtype), along = column_major ? m.rows : cols;
  const int64_t lines = column_major ? cols : m.rows;
  const int64_t stride = column_major ? m.col_stride : m.row_stride;
  // A single line has no next one, so its stride may be anything.
  const int64_t line_bytes = lines > 1 ? stride * bytes : (along * bytes + 15) / 16 * 16;
  const char* first =
      static_cast<const char*>(static_cast<const void*>(m.data)) + first_col * m.col_stride * bytes;
  return {first, static_cast<int>(bytes), along, lines, line_bytes, column_major};
}

/// Can lines be moved in tiles? They must not overlap, besides what vectors want.
template <typename Pointer>
bool tiles_fit(const MatrixView<Pointer>& m, Layout layout) {
  if (layout == Layout::kStrided) return false;
  const bool column_major = layout == Layout::kColumnMajor;
  const int64_t stride = column_major ? m.col_stride : m.row_stride;
  return stride >= (column_major ? m.rows : m.cols) || (column_major ? m.cols : m.rows) == 1;
}

// ---- by the copy engine -----------------------------------------------------------------------

struct EngineOperand {
  TensorMap map;
  bool column_major;

  template <typename Tile>
  static EngineOperand of(const MatrixLines& lines) {
    return {make_tensor_map(lines.first, lines.element_bytes, lines.along, lines.count, lines.pitch,
                            lines.column_major ? Tile::kTokens : Tile::kFeatures,
                            lines.column_major ? Tile::kFeatures : Tile::kTokens),
            lines.column_major};
  }
};

template <typename Tile>
__device__ __forceinline__ void load_tile(char* to, const EngineOperand& operand, uint64_t* barrier,
                                          int token, int feature) {
  load_box(to, operand.map, barrier, operand.column_major ? token : feature,
           operand.column_major ? feature : token);
}
template <typename Tile>
__device__ __forceinline__ void store_tile(const EngineOperand& operand, const char* from,
                                           int token, int feature) {
  store_box(operand.map, from, operand.column_major ? token : feature,
            operand.column_major ? feature : token);
}

// ---- by all threads ---------------------------------------------------------------------------

struct ThreadOperand {
  char* first;
  int64_t pitch;
  int lines, vectors;  // of 16 bytes, of a line
  bool column_major;

  template <typename Tile>
  static ThreadOperand of(const MatrixLines& lines) {
    return {const_cast<char*>(lines.first), lines.pitch, static_cast<int>(lines.count),
            static_cast<int>(lines.along * lines.element_bytes / 16), lines.column_major};
  }
};

/// This thread's i-th vector of a tile: where it is in shared memory and in the matrix.
template <typename Tile>
struct VectorPlace {
  int staged;  // bytes from the beginning of the tile
  char* at;
  bool inside;

  __device__ __forceinline__ VectorPlace(const ThreadOperand& operand, int token, int feature,
                                         int i) {
    constexpr int kAcross = Tile::kFeatures / Tile::kSide, kDown = Tile::kTokens / Tile::kSide;
    const int per_line = operand.column_major ? kDown : kAcross;
    const TileVector of_tile = tile_vector(threadIdx.x, Tile::kThreads, i, per_line);
    const int line = (operand.column_major ? feature : token) + of_tile.line;
    const int vector = (operand.column_major ? token : feature) / Tile::kSide + of_tile.along;
    staged = of_tile.staged;
    inside = line < operand.lines && vector < operand.vectors;
    at = operand.first + (inside ? line * operand.pitch + 16 * int64_t{vector} : 0);
  }
};

template <typename Tile>
__device__ __forceinline__ void load_tile(char* to, const ThreadOperand& operand, uint64_t*,
                                          int token, int feature) {
  SP24_UNROLL
  for (int i = 0; i < Tile::kSide; ++i) {
    const VectorPlace<Tile> place(operand, token, feature, i);
    copy16_async(to + place.staged, place.at, place.inside);
  }
}
template <typename Tile>
__device__ __forceinline__ void store_tile(const ThreadOperand& operand, const char* from,
                                           int token, int feature) {
  SP24_UNROLL
  for (int i = 0; i < Tile::kSide; ++i) {
    const VectorPlace<Tile> place(operand, token, feature, i);
    if (place.inside) store16(place.at, *reinterpret_cast<const uint4*>(from + place.staged));
  }
}

// ---- both -------------------------------------------------------------------------------------

template <typename Operand>
constexpr bool kByEngine = false;
template <>
inline constexpr bool kByEngine<EngineOperand> = true;

/// Does the GPU that is compiled for move tiles this way? Kernels for other ways are left empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename Operand>
constexpr bool kRunsHere = !kByEngine<Operand>;
#else
template <typename Operand>
constexpr bool kRunsHere = true;
#endif

template <typename Operand>
__device__ __forceinline__ void begin_loads(uint64_t* barrier, uint32_t bytes) {
  if constexpr (kByEngine<Operand>) start_barrier(barrier), announce_bytes(barrier, bytes);
}
/// All threads: returns when what was loaded is there for each of them.
template <typename Operand>
__device__ __forceinline__ void wait_for_loads(uint64_t* barrier) {
  if constexpr (!kByEngine<Operand>) wait_for_copies();
  __syncthreads();  // the barrier is there, or all threads' copies are
  if constexpr (kByEngine<Operand>) wait_for_bytes(barrier);
}
/// All threads, between what they wrote to shared memory and the barrier before it is stored.
template <typename Operand>
__device__ __forceinline__ void fence_results() {
  if constexpr (kByEngine<Operand>) fence_for_copies();
}
/// Before the block ends, those that stored.
template <typename Operand>
__device__ __forceinline__ void finish_stores() {
  if constexpr (kByEngine<Operand>) wait_for_stores();
}

}  // namespace sparse24
