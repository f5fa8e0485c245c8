// arguments.h: from Python's arguments to those of the public C++ API, and the list of what is
// bound.
//
// It knows no torch: tensors arrive as addresses, extents, strides (in elements) and codes, so one
// build serves every torch version. All arguments are positional; flags are ints, because pybind11
// takes a Python bool as int at once but an int as bool only in a second try. What belongs together
// travels as a tuple, so that no function takes more than 12.
//
//   dtype     0 float32, 1 bfloat16, 2 float16,         (sparse24::DType)
//             3 float8_e4m3fn, 4 float8_e5m2
//   backend   0 cpu, 1 cuda                             (sparse24::Backend)
//   stream    cudaStream_t as an integer                0 on the CPU
//   address   0 is a null pointer
//   matrix    (address, dtype, rows, cols, row_stride, col_stride)
//   float8    (x8, x8_ld, x8_t, x8_t_ld, scale, amax, counters), all addresses may be 0; None: none
//   mvue      (seed, packed, packed_dtype, E, scale); None: not packed
//
// Callers keep the tensors alive until the call returns, on the GPU until its stream has run it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sparse24/sparse24.h"

namespace sparse24::bindings {

namespace py = pybind11;

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

template <typename Enum>
Enum checked_enum(int code, Enum last, const char* name) {
  if (code < 0 || code > static_cast<int>(last)) {
    throw Error(std::string(name) + " code must be between 0 and " +
                std::to_string(static_cast<int>(last)) + ", got " + std::to_string(code));
  }
  return static_cast<Enum>(code);
}

inline DType dtype_of(int code) { return checked_enum(code, kLastDType, "dtype"); }
inline Activation activation_of(int code) {
  return checked_enum(code, kLastActivation, "activation");
}

inline Context context_of(int backend, int device, Address stream) {
  return {checked_enum(backend, Backend::kCuda, "backend"), device, pointer<void>(stream)};
}

/// Reads the fields of a tuple, in order.
class Fields {
 public:
  Fields(py::handle item, py::ssize_t count) : item_(py::reinterpret_borrow<py::tuple>(item)) {
    if (!py::isinstance<py::tuple>(item) || PyTuple_GET_SIZE(item.ptr()) != count) {
      throw Error("expected a tuple of " + std::to_string(count) + " fields");
    }
  }
  py::handle next_item() { return PyTuple_GET_ITEM(item_.ptr(), index_++); }
  template <typename T>
  T next() {
    return py::cast<T>(next_item());
  }
  template <typename T>
  T* next_pointer() {
    return pointer<T>(next<Address>());
  }
  DType next_dtype() { return dtype_of(next<int>()); }

 private:
  py::tuple item_;
  py::ssize_t index_ = 0;
};

inline Matrix read_matrix(const py::handle& item) {
  Fields fields(item, 6);
  Matrix m;
  m.data = fields.next_pointer<void>();
  m.dtype = fields.next_dtype();
  m.rows = fields.next<int64_t>();
  m.cols = fields.next<int64_t>();
  m.row_stride = fields.next<int64_t>();
  m.col_stride = fields.next<int64_t>();
  return m;
}
inline ConstMatrix read_const_matrix(const py::handle& item) { return as_const(read_matrix(item)); }

inline Float8Output read_float8(const py::handle& item) {
  Float8Output to;
  if (item.is_none()) return to;
  Fields fields(item, 7);
  to.x8 = fields.next_pointer<void>();
  to.x8_ld = fields.next<int64_t>();
  to.x8_t = fields.next_pointer<void>();
  to.x8_t_ld = fields.next<int64_t>();
  to.scale = fields.next_pointer<const float>();
  to.amax = fields.next_pointer<float>();
  to.counters = fields.next_pointer<int64_t>();
  return to;
}

/// Args: of mvue_pack or of an activation pass.
template <typename Args>
void read_mvue(const py::handle& item, Args& args) {
  if (item.is_none()) return;
  Fields fields(item, 5);
  args.seed = fields.next_pointer<const int64_t>();
  args.packed = fields.next_pointer<void>();
  args.packed_dtype = fields.next_dtype();
  args.E = fields.next_pointer<uint8_t>();
  args.scale = fields.next_pointer<const float>();
}

template <typename Args, typename Read>
std::vector<Args> read_items(const py::sequence& items, py::ssize_t fields, const Read& read) {
  std::vector<Args> args;
  args.reserve(items.size());
  for (py::handle item : items) {
    Fields reader(item, fields);
    args.push_back(read(reader));
  }
  return args;
}

/// Binds a multi-tensor function of the public API: read the tuples, then work without the GIL.
template <typename Args, typename Read>
void def_multi(py::module_& module, const char* name, py::ssize_t fields, Read read,
               void (*function)(const Args*, int, const Context&)) {
  module.def(name, [=](const py::sequence& items, int backend, int device, Address stream) {
    const std::vector<Args> args = read_items<Args>(items, fields, read);
    const Context context = context_of(backend, device, stream);
    const py::gil_scoped_release unlocked;
    function(args.data(), static_cast<int>(args.size()), context);
  });
}

// One file an area, which binds the functions of one public header or two.
void bind_activation(py::module_& module);
void bind_pack(py::module_& module);
void bind_device(py::module_& module);
void bind_gemm(py::module_& module);
void bind_recipe(py::module_& module);

}  // namespace sparse24::bindings
