// quantize.cpp: matrices in e4m3 on the CPU.
#include "cpu/cpu.h"
#include "cpu/float8_output.h"

namespace sparse24::cpu {

void quantize(const QuantizeArgs& args) {
  with_type(args.x.dtype, [&](auto zero) {
    const Strided<const decltype(zero)> x = typed<decltype(zero)>(args.x);
    write_float8(args.to, args.x.rows, args.x.cols,
                 [=](int64_t r, int64_t c) { return to_float(x(r, c)); });
  });
}

}  // namespace sparse24::cpu
