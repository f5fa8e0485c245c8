// formats.cpp: the table of common/format.h as data.
#include "sparse24/formats.h"

#include "common/format.h"

namespace sparse24 {

namespace {

template <typename F>
FormatInfo row() {
  return {F::kDType,     F::Storage::kName, F::kBytes,  F::kPerVector, F::kMetaTileK,
          F::kTokenStep, F::kMnMajor,       F::kScaled, F::kWide};
}

template <typename... T>
std::vector<FormatInfo> rows_of(TypeList<T...>) {
  return {row<FormatOf<T>>()...};
}

}  // namespace

std::vector<FormatInfo> packed_formats() { return rows_of(PackedTypes{}); }

}  // namespace sparse24
