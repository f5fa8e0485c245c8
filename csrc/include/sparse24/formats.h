// formats.h: the packed formats that this library has, as data. For programs that keep a table of their own.
#pragma once

#include <vector>

#include "sparse24/types.h"

namespace sparse24 {

struct FormatInfo {
  DType dtype = DType::kBFloat16;
  const char* name = "";
  int bytes = 0;                  // of an element
  int per_vector = 0;             // elements of 16 bytes: what rows must be multiples of to be moved fast
  int meta_tile_k = 0;            // extent along k of a block of E; along m it is 64
  int token_step = 0;             // tokens are padded to a multiple of this where they are k
  bool mn_major = true;           // may a packed operand lie along m, [k/2, m]? Else [m, k/2] only
  bool scaled = false;            // are values x / scale?
  DType wide = DType::kBFloat16;  // of what is computed beside them, and of products; fp32 is the other choice
};

SP24_API std::vector<FormatInfo> packed_formats();

}  // namespace sparse24
