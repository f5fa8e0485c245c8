// activation.cpp: activations on the CPU, elementwise in fp32 over tiles that suit both layouts.
#include <vector>

#include "activation/functions.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"

namespace sparse24::cpu {
namespace {

/// Calls element(row, col) for all of [rows, cols], tile by tile; inside a tile column by column
/// where `column_major`, else row by row.
template <typename Element>
void for_each_element(int64_t rows, int64_t cols, bool column_major, const Element& element) {
  const int64_t tile_cols = tiles_along(cols);
  parallel_for(tiles_along(rows) * tile_cols, kTile * kTile, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_at(t / tile_cols, t % tile_cols, rows, cols);
      if (column_major) {
        for (int64_t c = tile.col_begin; c < tile.col_end; ++c)
          for (int64_t r = tile.row_begin; r < tile.row_end; ++r) element(r, c);
      } else {
        for (int64_t r = tile.row_begin; r < tile.row_end; ++r)
          for (int64_t c = tile.col_begin; c < tile.col_end; ++c) element(r, c);
      }
    }
  });
}

struct Forward {
  const ActivationArgs& args;

  template <Activation kKind>
  void operator()() const {
    with_type(args.gate_up.dtype, [this](auto zero) { run<kKind, decltype(zero)>(); });
  }

  template <Activation kKind, typename T>
  void run() const {
    const Strided<const T> in = typed<T>(args.gate_up);
    const Strided<T> h = typed<T>(args.h);
    const int64_t rows = args.h.rows, cols = args.h.cols;
    if (args.gated) {
      for_each_element(rows, cols, in.is_column_major(), [=](int64_t r, int64_t c) {
        const float gate = to_float(in(r, c)), up = to_float(in(r, c + cols));
        h(r, c) = from_float<T>(activate<kKind>(gate).value * up);
      });
    } else {
      for_each_element(rows, cols, in.is_column_major(), [=](int64_t r, int64_t c) {
        h(r, c) = from_float<T>(activate<kKind>(to_float(in(r, c))).value);
      });
    }
  }
};

struct Backward {
  const ActivationBackwardArgs& args;

  template <Activation kKind>
  void operator()() const {
    with_type(args.gate_up.dtype, [this](auto zero) { run<kKind, decltype(zero)>(); });
  }

  template <Activation kKind, typename T>
  void run() const {
    const Strided<const T> d_h = typed<T>(args.d_h), in = typed<T>(args.gate_up);
    const Strided<T> d_in = typed<T>(args.d_gate_up), h = typed<T>(args.h);
    const int64_t rows = args.d_h.rows, cols = args.d_h.cols;
    const bool want_h = h.data != nullptr;
    if (args.gated) {
      for_each_element(rows, cols, in.is_column_major(), [=](int64_t r, int64_t c) {
        const float gate = to_float(in(r, c)), up = to_float(in(r, c + cols));
        const GatedBackward back = gated_backward<kKind>(to_float(d_h(r, c)), gate, up);
        d_in(r, c) = from_float<T>(back.d_gate);
        d_in(r, c + cols) = from_float<T>(back.d_up);
        if (want_h) h(r, c) = from_float<T>(back.h);
      });
    } else {
      for_each_element(rows, cols, in.is_column_major(), [=](int64_t r, int64_t c) {
        const ValueAndSlope act = activate<kKind>(to_float(in(r, c)));
        d_in(r, c) = from_float<T>(to_float(d_h(r, c)) * act.slope);
        if (want_h) h(r, c) = from_float<T>(act.value);
      });
    }
  }
};

/// A result from which other outputs are made: where the caller wants it, or in memory of its own.
class Result {
 public:
  Result(const Matrix& wanted, DType dtype, int64_t rows, int64_t cols) : matrix_(wanted) {
    if (wanted.data != nullptr) return;
    own_.resize(static_cast<size_t>(rows * cols * bytes_of(dtype)));
    matrix_ = {own_.data(), dtype, rows, cols, cols, 1};
  }
  const Matrix& matrix() const { return matrix_; }

 private:
  std::vector<uint8_t> own_;
  Matrix matrix_;
};

/// The other outputs of the pass that made `x`. Args: of forward or backward.
template <typename Args>
MvueArgs packing_of(const Matrix& x, const Args& args) {
  MvueArgs mvue;
  mvue.dy = as_const(x);
  mvue.seed = args.seed;
  mvue.packed = args.packed;
  mvue.E = args.E;
  mvue.packed_dtype = args.packed_dtype;
  mvue.scale = args.scale;
  mvue.float8 = args.float8;
  return mvue;
}

void write_others(const MvueArgs& mvue) {
  if (mvue.packed != nullptr) return mvue_pack(mvue);
  quantize({mvue.dy, mvue.float8});
}

}  // namespace

void activation_forward(const ActivationArgs& args) { with_activation(args.kind, Forward{args}); }

void activation_forward_outputs(const ActivationArgs& args) {
  const Result h(args.h, args.gate_up.dtype, args.h.rows, args.h.cols);
  ActivationArgs made = args;
  made.h = h.matrix();
  with_activation(args.kind, Forward{made});
  write_others(packing_of(made.h, args));
}

void activation_backward(const ActivationBackwardArgs& args) {
  const Result d_gate_up(args.d_gate_up, args.d_h.dtype, args.gate_up.rows, args.gate_up.cols);
  ActivationBackwardArgs made = args;
  made.d_gate_up = d_gate_up.matrix();
  with_activation(args.kind, Backward{made});
  MvueArgs others = packing_of(made.d_gate_up, args);
  others.tile_sums = args.tile_sums;
  write_others(others);
}

}  // namespace sparse24::cpu
