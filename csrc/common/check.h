// check.h: failed checks become sparse24::Error. A message gives argument, rule and value, and
// where it helps the remedy:
//   SP24_CHECK(k % 32 == 0, "k must be a multiple of 32, got ", k);
#pragma once

#include <sstream>
#include <string>

#include "sparse24/types.h"

namespace sparse24 {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace sparse24

#define SP24_CHECK(condition, ...)                                              \
  do {                                                                          \
    if (!(condition)) throw ::sparse24::Error(::sparse24::concat(__VA_ARGS__)); \
  } while (false)
