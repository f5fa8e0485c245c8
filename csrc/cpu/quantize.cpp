// quantize.cpp: matrices in e4m3 on the CPU.
#include "common/float8_scale.h"
#include "cpu/cpu.h"
#include "cpu/float8_output.h"

namespace sparse24::cpu {

void quantize(const QuantizeArgs& args) {
  with_type(args.x.dtype, [&](auto zero) {
    const Strided<const decltype(zero)> x = typed<decltype(zero)>(args.x);
    const auto value = [=](int64_t r, int64_t c) { return to_float(x(r, c)); };
    Float8Output to = args.to;
    if (args.own_scale != nullptr) {
      *args.own_scale = scale_of(amax_of(args.x.rows, args.x.cols, value));
      to.scale = args.own_scale;
    }
    write_float8(to, args.x.rows, args.x.cols, value);
  });
}

}  // namespace sparse24::cpu
