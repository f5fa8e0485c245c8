// cutlass_products.cu: CUTLASS 2.x's sparse product for sm_80 as published 2:4 training has it, fp16.
//
//   lhs   [m, k/2] kept values, row- or column-major; meta [m, k/16] in CUTLASS' order for sm_80
//   rhs   [k, n] dense, row- or column-major
//   out   [m, n] row-major; m % 32 == 0, k % 64 == 0, n % 8 == 0, all 16-byte aligned
//
// Tile 128x128x64, warps of 64x64, three stages, fp32 sums: what PyTorch chose for 8.x, and refuses
// to run elsewhere. `python -m bench.peers.cutlass_products` makes a library of this file alone.
#include <cutlass/gemm/device/gemm_sparse.h>

namespace {

namespace layout = cutlass::layout;
using Element = cutlass::half_t;

struct Problem {
  const void *lhs, *meta, *rhs;
  void* out;
  int m, n, k, lhs_ld, rhs_ld;
  cudaStream_t stream;
};

template <typename LayoutLhs, typename LayoutRhs>
int run(const Problem& p) {
  using Gemm = cutlass::gemm::device::SparseGemm<
      Element, LayoutLhs, Element, LayoutRhs, Element, layout::RowMajor, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 64>,
      cutlass::gemm::GemmShape<64, 64, 64>, cutlass::gemm::GemmShape<16, 8, 32>,
      cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3>;
  // The arguments are not const there; the kernel reads lhs, rhs and meta alone.
  auto* lhs = static_cast<Element*>(const_cast<void*>(p.lhs));
  auto* rhs = static_cast<Element*>(const_cast<void*>(p.rhs));
  auto* meta = static_cast<typename Gemm::ElementE*>(const_cast<void*>(p.meta));
  auto* out = static_cast<Element*>(p.out);
  const int meta_cols = p.k / Gemm::kSparse / Gemm::kElementsPerElementE;
  typename Gemm::Arguments arguments({p.m, p.n, p.k}, {lhs, LayoutLhs(p.lhs_ld)},
                                     {rhs, LayoutRhs(p.rhs_ld)}, {out, layout::RowMajor(p.n)},
                                     {out, layout::RowMajor(p.n)},
                                     {meta, Gemm::LayoutE::packed({p.m, meta_cols})}, {1.0f, 0.0f});
  cutlass::Status status = Gemm::can_implement(arguments);
  Gemm gemm;
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, p.stream);
  if (status == cutlass::Status::kSuccess) status = gemm.run(p.stream);
  return static_cast<int>(status);
}

}  // namespace

/// 0, or a cutlass::Status. An ld is the leading dimension in elements.
extern "C" int cutlass_sparse_product(const void* lhs, const void* meta, const void* rhs, void* out,
                                      int m, int n, int k, int lhs_ld, int lhs_row_major,
                                      int rhs_ld, int rhs_row_major, void* stream) {
  const Problem p{lhs, meta, rhs, out, m, n, k, lhs_ld, rhs_ld, static_cast<cudaStream_t>(stream)};
  if (lhs_row_major && rhs_row_major) return run<layout::RowMajor, layout::RowMajor>(p);
  if (lhs_row_major) return run<layout::RowMajor, layout::ColumnMajor>(p);
  if (rhs_row_major) return run<layout::ColumnMajor, layout::RowMajor>(p);
  return run<layout::ColumnMajor, layout::ColumnMajor>(p);
}
