// predicated.h: conditional arithmetic without a select.
//
// A GPU selects, compares and does logic in a pipe of half the width of the one that adds and
// multiplies. Where a kernel is bound by the former, `if (p) x += y` as one predicated addition
// relieves it; the compiler would add and select.
#pragma once

#include <cstdint>

#include "common/bits.h"
#include "common/host_device.h"

namespace sparse24 {

/// if (p) x += y
SP24_HD void add_if(bool p, float& x, float y) {
#if defined(__CUDA_ARCH__)
  asm("{\n .reg .pred q;\n setp.ne.u32 q, %1, 0;\n @q add.rn.f32 %0, %0, %2;\n}"
      : "+f"(x)
      : "r"(static_cast<uint32_t>(p)), "f"(y));
#else
  if (p) x += y;
#endif
}

/// if (p) x = y, for y that is not NaN
SP24_HD void assign_if(bool p, float& x, float y) {
#if defined(__CUDA_ARCH__)
  asm("{\n .reg .pred q;\n setp.ne.u32 q, %1, 0;\n @q add.rn.f32 %0, %2, 0f80000000;\n}"  // y + -0
                                                                                          // is y
      : "+f"(x)
      : "r"(static_cast<uint32_t>(p)), "f"(y));
#else
  if (p) x = y;
#endif
}

/// if (p) x takes the magnitude y >= 0 and keeps its sign
SP24_HD void set_magnitude_if(bool p, float& x, float y) {
#if defined(__CUDA_ARCH__)
  uint32_t bits = float_bits(x);
  asm("{\n .reg .pred q;\n setp.ne.u32 q, %1, 0;\n @q lop3.b32 %0, %0, 0x80000000, %2, 0xEA;\n}"  // (x & sign) | y
      : "+r"(bits)
      : "r"(static_cast<uint32_t>(p)), "r"(float_bits(y)));
  x = bits_float(bits);
#else
  if (p) x = bits_float((float_bits(x) & 0x80000000u) | float_bits(y));
#endif
}

}  // namespace sparse24
