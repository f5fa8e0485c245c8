// gated_rows.h: how the rows of gate and up come to lie side by side in a tile.
//
// One product computes gate_up = x [gate | up]^T, and its epilogue h = act(gate) * up: a thread
// that has a feature of gate in registers needs the same of up. So the copy engine takes rows of
// the two halves of the weight in turns of eight: in a wgmma accumulator, a thread then has a
// feature of gate in row r and of up in row r + 8. The packed weight itself stays in the order that
// it has anyway.
//
//   shared rows   gate 0-7 | up 0-7 | gate 8-15 | up 8-15 | ...
//   E             a block of 64 rows of gate, then one of up: mainloop.h pairs their halves
//
// Both halves have whole blocks of E: d_ff is a multiple of 64.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"

namespace sparse24::gemm::sm90 {

/// CUTLASS' sparse collective with other layouts of the sparse operand and of E, and nothing else.
template <typename Stock, typename Layouts>
struct WithLayouts;
template <typename Policy, typename Tile, typename Element, typename Old, typename... Rest,
          typename Layouts>
struct WithLayouts<cutlass::gemm::collective::CollectiveMma<Policy, Tile, Element, Old, Rest...>,
                   Layouts> {
  using type = cutlass::gemm::collective::CollectiveMma<Policy, Tile, Element, Layouts, Rest...>;
};

/// Rows of `packed` [2 d_ff, k/2], in turns: (8 rows, 2 halves, d_ff / 8).
inline auto gated_packed_layout(int d_ff, int k) {
  using namespace cute;
  return make_layout(make_shape(make_shape(_8{}, _2{}, int32_t(d_ff / 8)),
                                make_shape(_2{}, int32_t(k / 2)), int32_t(1)),
                     make_stride(make_stride(int64_t(k), int64_t(k) * d_ff, int64_t(k) * 8),
                                 make_stride(_1{}, _2{}), int64_t(0)));
}

/// E of the same, block by block in turns, from CUTLASS' layout of it.
template <typename LayoutE>
auto gated_meta_layout(const LayoutE& whole) {
  using namespace cute;
  const int32_t blocks = get<0, 1>(whole.shape()) / 2;  // of a half
  const auto block = get<0, 1>(whole.stride());
  return make_layout(make_shape(make_shape(get<0, 0>(whole.shape()), make_shape(_2{}, blocks)),
                                get<1>(whole.shape()), get<2>(whole.shape())),
                     make_stride(make_stride(get<0, 0>(whole.stride()),
                                             make_stride(int64_t(blocks) * int64_t(block), block)),
                                 get<1>(whole.stride()), get<2>(whole.stride())));
}

/// The collective that loads rows in turns where kGated, and CUTLASS' own otherwise.
template <typename Stock, bool kGated>
struct InTurns {
  using type = Stock;
};
template <typename Stock>
struct InTurns<Stock, true> {
  using Layouts = cute::tuple<decltype(gated_packed_layout(0, 0)),
                              decltype(gated_meta_layout(typename Stock::LayoutE{}))>;
  using type = typename WithLayouts<Stock, Layouts>::type;
};

}  // namespace sparse24::gemm::sm90
