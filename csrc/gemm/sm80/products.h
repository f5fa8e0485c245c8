// products.h: from rows of kernels.def to the products that their kernels compute: a kernel is of
// operands; all passes, outputs and sums that have such are its.
#pragma once

#include "gemm/arch.h"

namespace sparse24::gemm::sm80 {

struct Row {
  Orientation lhs, rhs;
  DType format;
  int tile_m, tile_n, tile_k;
  Launcher* launcher;  // null in a build without its kernels
};

template <int kRows>
struct Table {
  static constexpr int kMost = 8 * kRows;
  KernelEntry kernels[kMost]{};
  Launcher* launchers[kMost]{};
  int count = 0;

  constexpr void add(const Row& row, GemmPass pass, GemmEpilogue epilogue, DType out,
                     Accumulation sums) {
    kernels[count] = {pass,       epilogue,   row.format, out, sums,
                      row.tile_m, row.tile_n, row.tile_k, 1,   1};
    launchers[count] = row.launcher;
    ++count;
  }
};

constexpr GemmEpilogue kActivated[] = {GemmEpilogue::kActivation, GemmEpilogue::kGate};

template <int kRows>
constexpr void add_products_of_16_bits(Table<kRows>& table, const Row& row, GemmPass pass) {
  if (is_of_activation(pass))  // with the one output that Hopper has
    return table.add(row, pass, GemmEpilogue::kPlain, row.format, Accumulation::kFast);
  for (const DType out : {row.format, DType::kFloat32})
    table.add(row, pass, GemmEpilogue::kPlain, out, Accumulation::kFast);
  if (pass != GemmPass::kForward) return;
  for (const GemmEpilogue epilogue : kActivated)
    table.add(row, pass, epilogue, row.format, Accumulation::kFast);
}

/// Those of Hopper. Sums are promoted in any case (mainloop.h), and kernel_pass of config.cpp has the
/// passes that are products like others.
template <int kRows>
constexpr void add_products_of_8_bits(Table<kRows>& table, const Row& row, GemmPass pass) {
  if (pass == GemmPass::kGradWeightOfInput) {
    for (const DType out : {DType::kBFloat16, DType::kFloat32})
      table.add(row, pass, GemmEpilogue::kPlain, out, Accumulation::kPromoted);
    return;
  }
  if (pass != GemmPass::kForward && pass != GemmPass::kGradWeight) return;
  for (const Accumulation sums : {Accumulation::kFast, Accumulation::kPromoted})
    table.add(row, pass, GemmEpilogue::kPlain, DType::kBFloat16, sums);
  if (pass == GemmPass::kGradWeight) {
    table.add(row, pass, GemmEpilogue::kPlain, DType::kFloat32, Accumulation::kPromoted);
    return;
  }
  for (const GemmEpilogue epilogue : kActivated)
    table.add(row, pass, epilogue, DType::kBFloat16, Accumulation::kFast);
}

template <int kRows>
constexpr void add_products(Table<kRows>& table, const Row& row, GemmPass pass) {
  if (lhs_orientation(pass, row.format) != row.lhs || rhs_orientation(pass, row.format) != row.rhs)
    return;
  is_float8(row.format) ? add_products_of_8_bits(table, row, pass)
                        : add_products_of_16_bits(table, row, pass);
}

/// Codes of configs count products, so later ones follow the older ones.
template <int kRows>
constexpr Table<kRows> products_of(const Row (&rows)[kRows]) {
  Table<kRows> table;
  for (const Row& row : rows) {
    for (const GemmPass pass : {GemmPass::kForward, GemmPass::kGradInput, GemmPass::kGradWeight})
      add_products(table, row, pass);
    if (!is_float8(row.format)) add_products(table, row, GemmPass::kGradWeightOfInput);
  }
  for (const Row& row : rows)
    for (const GemmPass pass : {GemmPass::kForwardOfInput, GemmPass::kGradInputOfOutput})
      add_products(table, row, pass);
  for (const Row& row : rows)
    if (is_float8(row.format)) add_products(table, row, GemmPass::kGradWeightOfInput);
  return table;
}

/// Estimates for an A100 (mainloop.h): only their proportion counts, when stream-K is weighed
/// against whole tiles.
inline TileCost cost_of(const KernelEntry& kernel) {
  const int k_bytes = kernel.tile_k * (is_float8(kernel.format) ? 1 : 2);
  return {double(kernel.tile_m) * kernel.tile_n * k_bytes / 4096, 3000};
}

}  // namespace sparse24::gemm::sm80
