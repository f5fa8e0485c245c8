// metadata_order.h: our order of E against that of CUTLASS' own compressor, which packs a dense
// matrix that already is 2:4.
#pragma once

#include <cutlass/gemm/collective/builders/sm90_sparse_config.inl>
#include <cutlass/transform/device/transform_universal_adapter.hpp>
#include <cutlass/transform/kernel/sparse_gemm_compressor.hpp>
#include <vector>

#include "gemm_problems.h"

namespace gpu_testing {

template <typename Element, DType kFormat>
void check_metadata_order(int m, int k) {
  using KTile = cute::conditional_t<sizeof(Element) == 1, cute::_128, cute::_64>;
  using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, Element>, cute::GMMA::Major::K,
                                               cute::sparse_elem<8, uint8_t>, KTile>;
  using Shape = cute::Shape<int, int, int, int>;
  using Kernel = cutlass::transform::kernel::StructuredSparseCompressor<
      Shape, Element, cutlass::layout::RowMajor, Config, cutlass::arch::Sm90>;
  using Compressor = cutlass::transform::device::TransformUniversalAdapter<Kernel>;
  ++cases;
  Random random(m + k);
  const PackedOperand ours =
      testing::make_packed(m, k, k, kFormat, Orientation::kKMajor, random,
                           [&] { return 1.0f + static_cast<float>(random.below(8)); });
  Elements dense(static_cast<size_t>(m) * k, kFormat);
  for (int row = 0; row < m; ++row)
    for (const auto& kept : ours.rows[row])
      dense.set(static_cast<size_t>(row) * k + kept.k, kept.value);
  const Buffer device_dense(dense), packed(ours.values), E(std::vector<uint8_t>(ours.E.size(), 0));
  SP24_CHECK_CUDA(cudaMemset(packed.get(), 0, packed.bytes()));
  typename Compressor::Arguments arguments{};
  arguments.problem_shape = Shape{m, 1, k, 1};
  cute::get<0>(arguments.transform.dA) = k;
  arguments.transform.ptr_A = device_dense.get();
  arguments.transform.ptr_ACompress = packed.get();
  arguments.transform.ptr_E = E.get();
  Compressor compressor;
  if (compressor.initialize(arguments) != cutlass::Status::kSuccess ||
      compressor.run() != cutlass::Status::kSuccess) {
    return fail("CUTLASS' compressor did not run");
  }
  SP24_CHECK_CUDA(cudaDeviceSynchronize());
  const std::string what =
      concat(" of ", m, "x", k, " ", name_of(kFormat), " differs from CUTLASS'");
  if (E.read<uint8_t>() != ours.E) fail("E", what);
  if (packed.read<uint8_t>() != ours.values.bytes()) fail("packed", what);
}

}  // namespace gpu_testing
