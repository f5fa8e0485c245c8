// checks.h: the rules that arguments of the public API must keep, whichever backend runs.
//
// Python has checked most of it already, with more helpful messages. These checks keep every caller
// from reading or writing outside of its memory.
#pragma once

#include <cstdint>

#include "common/check.h"
#include "common/convert.h"
#include "common/format.h"
#include "sparse24/quantize.h"
#include "sparse24/types.h"

namespace sparse24::api {

template <typename Pointer>
bool is_empty(const MatrixView<Pointer>& view) {
  return view.rows == 0 || view.cols == 0;
}

template <typename Pointer>
bool is_row_major(const MatrixView<Pointer>& view) {
  return (view.col_stride == 1 || view.cols <= 1) &&
         (view.row_stride >= view.cols || view.rows <= 1);
}

template <typename Pointer>
bool is_column_major(const MatrixView<Pointer>& view) {
  return (view.row_stride == 1 || view.rows <= 1) &&
         (view.col_stride >= view.rows || view.cols <= 1);
}

inline void check_pointer(const void* pointer, const char* name) {
  SP24_CHECK(pointer != nullptr, name, " must not be null");
}

inline void check_extent(int64_t extent, const char* name) {
  SP24_CHECK(extent >= 0, name, " must not be negative, got ", extent);
}

template <typename Pointer>
void check_extents(const MatrixView<Pointer>& view, const char* name) {
  SP24_CHECK(view.rows >= 0 && view.cols >= 0, name, " must have extents of at least 0, got [",
             view.rows, ", ", view.cols, "]");
  SP24_CHECK(!is_float8(view.dtype), name, " must be ", computed_names(Types16{}), ", got ",
             name_of(view.dtype),
             "; float8 values belong to packed operands and quantize's outputs");
}

/// A row- or column-major matrix in memory; call for non-empty ones.
template <typename Pointer>
void check_major(const MatrixView<Pointer>& view, const char* name) {
  check_pointer(view.data, name);
  SP24_CHECK(is_row_major(view) || is_column_major(view), name,
             " must be row- or column-major, got strides (", view.row_stride, ", ", view.col_stride,
             ") for extents [", view.rows, ", ", view.cols, "]; make it contiguous");
}

/// Checks as check_major, and gives extents of 1, where any stride is right, the stride that goes
/// with the layout: backends can then tell layouts by strides alone.
template <typename Pointer>
MatrixView<Pointer> as_major(MatrixView<Pointer> view, const char* name) {
  check_major(view, name);
  if (is_row_major(view)) {
    if (view.cols == 1) view.col_stride = 1;
    if (view.rows == 1) view.row_stride = view.cols;
  } else {
    if (view.rows == 1) view.row_stride = 1;
    if (view.cols == 1) view.col_stride = view.rows;
  }
  return view;
}

template <typename Pointer>
void check_blocks(const MatrixView<Pointer>& view, const char* name) {
  SP24_CHECK(view.rows % 4 == 0 && view.cols % 4 == 0, name,
             " must have extents that are multiples of 4, got [", view.rows, ", ", view.cols,
             "]; leave this layer dense");
}

inline void check_gpu_packed_dtype(DType dtype, const char* name) {
  SP24_CHECK(dtype != DType::kFloat32, name, " must be ", names_of(PackedTypes{}),
             " on a GPU, got float32; the sparse tensor "
             "cores multiply 16- and 8-bit values");
}

/// Rows of what quantize writes must not overlap.
inline void check_float8(const Float8Output& to, int64_t rows, int64_t cols) {
  if (to.x8 != nullptr)
    SP24_CHECK(to.x8_ld >= cols, "x8_ld must be at least cols, ", cols, ", got ", to.x8_ld);
  if (to.x8_t != nullptr)
    SP24_CHECK(to.x8_t_ld >= padded_tokens_for(DType::kFloat8E4M3, rows),
               "x8_t_ld must be at least rows padded to a multiple of 32, ",
               padded_tokens_for(DType::kFloat8E4M3, rows), ", got ", to.x8_t_ld);
  SP24_CHECK(to.counters == nullptr || to.x8 != nullptr || to.x8_t != nullptr,
             "counters count what is written: give x8 or x8_t too, or no counters");
}

inline bool writes_float8(const Float8Output& to) {
  return to.x8 != nullptr || to.x8_t != nullptr || to.amax != nullptr;
}

/// The rules on an MVUE-packed result: seed, packed and E are given together, in a format that
/// there is. Args: those of mvue_pack or of an activation pass.
template <typename Args>
void check_mvue(const Args& args, DType dtype, const Context& context, const char* name) {
  check_pointer(args.seed, "seed");
  check_pointer(args.packed, "packed");
  check_pointer(args.E, "E");
  const DType packed = args.packed_dtype.value_or(dtype);
  SP24_CHECK(packed == dtype || is_float8(packed), "packed_dtype must be that of ", name, ", ",
             name_of(dtype), ", or a float8 format, got ", name_of(packed));
  SP24_CHECK(args.scale == nullptr || is_float8(packed),
             "scale goes with a float8 packed_dtype, got ", name_of(packed));
  if (context.backend == Backend::kCuda) check_gpu_packed_dtype(dtype, name);
}

template <typename A, typename B>
void check_same_extents(const MatrixView<A>& a, const char* a_name, const MatrixView<B>& b,
                        const char* b_name) {
  SP24_CHECK(a.rows == b.rows && a.cols == b.cols, a_name, " and ", b_name,
             " must have the same extents, got [", a.rows, ", ", a.cols, "] and [", b.rows, ", ",
             b.cols, "]");
}

template <typename A, typename B>
void check_same_dtype(const MatrixView<A>& a, const char* a_name, const MatrixView<B>& b,
                      const char* b_name) {
  SP24_CHECK(a.dtype == b.dtype, a_name, " and ", b_name, " must have the same dtype, got ",
             name_of(a.dtype), " and ", name_of(b.dtype));
}

}  // namespace sparse24::api
