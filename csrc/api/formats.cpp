// formats.cpp: the table of common/format.h as data.
#include "sparse24/formats.h"

#include "common/format.h"

namespace sparse24 {

std::vector<FormatInfo> packed_formats() {
  std::vector<FormatInfo> all;
  for (DType dtype : kPackedFormats) {
    with_packed_format(dtype, [&](auto format) {
      using F = decltype(format);
      all.push_back({dtype, name_of(dtype), F::kBytes, F::kPerVector, F::kMetaTileK, F::kTokenStep,
                     F::kMnMajor, F::kScaled});
    });
  }
  return all;
}

}  // namespace sparse24
