// python_api.cpp: the Python module sparse24._C, the only file with pybind11.
//
// It knows no torch: tensors arrive as addresses, extents, strides (in elements) and codes, so one
// build serves every torch version. All arguments are positional; flags are ints, because pybind11
// takes a Python bool as int at once but an int as bool only in a second try.
//
//   dtype     0 float32, 1 bfloat16, 2 float16,         (sparse24::DType)
//             3 float8_e4m3fn, 4 float8_e5m2
//   backend   0 cpu, 1 cuda                             (sparse24::Backend)
//   stream    cudaStream_t as an integer                0 on the CPU
//   address   0 is a null pointer
//
// Callers keep the tensors alive until the call returns, on the GPU until its stream has run it.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "sparse24/sparse24.h"

namespace py = pybind11;

namespace sparse24 {
namespace {

using Address = uintptr_t;

/// Of the signatures below. Raised with each change of one, here and in sparse24/_library.py: an
/// editable installation whose Python files are newer than its binding then says so instead of
/// failing at some call.
constexpr int kInterface = 3;

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

DType dtype_of(int code) { return checked_enum(code, DType::kFloat8E5M2, "dtype"); }
GemmPass pass_of(int code) { return checked_enum(code, GemmPass::kGatedForward, "pass"); }
Activation activation_of(int code) {
  return checked_enum(code, Activation::kIdentity, "activation");
}

Context context_of(int backend, int device, Address stream) {
  return {checked_enum(backend, Backend::kCuda, "backend"), device, pointer<void>(stream)};
}

Matrix matrix(Address data, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
              int64_t col_stride) {
  return {pointer<void>(data), dtype, rows, cols, row_stride, col_stride};
}
ConstMatrix const_matrix(Address data, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
                         int64_t col_stride) {
  return {pointer<void>(data), dtype, rows, cols, row_stride, col_stride};
}

/// Reads the fields of one tuple of a multi-tensor call, in order.
class Fields {
 public:
  Fields(py::handle item, py::ssize_t count) : item_(py::reinterpret_borrow<py::tuple>(item)) {
    if (!py::isinstance<py::tuple>(item) || PyTuple_GET_SIZE(item.ptr()) != count) {
      throw Error("every item must be a tuple of " + std::to_string(count) + " fields");
    }
  }
  template <typename T>
  T next() {
    return py::cast<T>(py::handle(PyTuple_GET_ITEM(item_.ptr(), index_++)));
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

PackArgs read_pack(Fields& item) {
  PackArgs args;
  args.w.data = item.next_pointer<const void>();
  args.w.dtype = item.next_dtype();
  args.w.rows = item.next<int64_t>();
  args.w.cols = item.next<int64_t>();
  args.w.row_stride = item.next<int64_t>();
  args.w.col_stride = item.next<int64_t>();
  args.mask = item.next_pointer<uint16_t>();
  args.out_dtype = item.next_dtype();
  args.packed = item.next_pointer<void>();
  args.E = item.next_pointer<uint8_t>();
  args.packed_t = item.next_pointer<void>();
  args.E_t = item.next_pointer<uint8_t>();
  return args;
}

MaskedDecayArgs read_masked_decay(Fields& item) {
  MaskedDecayArgs args;
  args.grad.data = item.next_pointer<void>();
  args.grad.dtype = item.next_dtype();
  args.grad.rows = args.w.rows = item.next<int64_t>();
  args.grad.cols = args.w.cols = item.next<int64_t>();
  args.grad.row_stride = item.next<int64_t>();
  args.grad.col_stride = item.next<int64_t>();
  args.w.data = item.next_pointer<const void>();
  args.w.dtype = item.next_dtype();
  args.w.row_stride = item.next<int64_t>();
  args.w.col_stride = item.next<int64_t>();
  args.mask = item.next_pointer<const uint16_t>();
  args.decay = item.next<float>();
  args.grad_scale = item.next_pointer<const float>();
  return args;
}

MaskedDecayTerm read_decay_term(Fields& item) {
  MaskedDecayTerm term;
  term.factor = item.next_pointer<const float>();
  for (const void*& weight : term.weight) weight = item.next_pointer<const void>();
  term.row_stride = item.next<int64_t>();
  term.col_stride = item.next<int64_t>();
  for (const uint16_t*& mask : term.mask) mask = item.next_pointer<const uint16_t>();
  term.first_rows = item.next<int64_t>();
  return term;
}

MaskFlipsArgs read_mask_flips(Fields& item) {
  MaskFlipsArgs args;
  args.mask_a = item.next_pointer<const uint16_t>();
  args.mask_b = item.next_pointer<const uint16_t>();
  args.blocks = item.next<int64_t>();
  args.flips = item.next_pointer<int64_t>();
  return args;
}

void bind_device(py::module_& module) {
  module.def("version", [] { return std::string(version()); });
  module.def("set_cpu_threads", &set_cpu_threads);
  module.def("device_info", [](int device) {
    const DeviceInfo info = device_info(device);
    py::dict result;
    result["cuda_built"] = info.cuda_built;
    result["gemm_archs"] = info.gemm_archs;
    result["device_count"] = info.device_count;
    result["capability_major"] = info.capability_major;
    result["capability_minor"] = info.capability_minor;
    result["multiprocessors"] = info.multiprocessors;
    result["memory_bandwidth"] = info.memory_bandwidth;
    result["reason"] = info.reason;
    return result;
  });
}

// packed_formats() -> [(dtype, name, bytes, per_vector, meta_tile_k, token_step, mn_major,
// scaled)], the rows of common/format.h.
void bind_formats(py::module_& module) {
  module.def("packed_formats", [] {
    py::list rows;
    for (const FormatInfo& f : packed_formats()) {
      rows.append(py::make_tuple(static_cast<int>(f.dtype), f.name, f.bytes, f.per_vector,
                                 f.meta_tile_k, f.token_step, f.mn_major, f.scaled));
    }
    return rows;
  });
}

void bind_compress(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def("metadata_bytes", &metadata_bytes);
  module.def("padded_tokens", &padded_tokens);
  def_multi<PackArgs>(module, "search_mask", 12, read_pack, search_mask);
  def_multi<PackArgs>(module, "pack_by_mask", 12, read_pack, pack_by_mask);
  def_multi<PackArgs>(module, "search_and_pack", 12, read_pack, search_and_pack);

  module.def(
      "mvue_compress",
      [](Address dy, int dtype, int64_t tokens, int64_t features, int64_t row_stride,
         int64_t col_stride, Address seed, Address packed, Address E, Address tile_sums,
         int backend, int device, Address stream) {
        MvueArgs args;
        args.dy = const_matrix(dy, dtype_of(dtype), tokens, features, row_stride, col_stride);
        args.seed = pointer<const int64_t>(seed);
        args.packed = pointer<void>(packed);
        args.E = pointer<uint8_t>(E);
        args.tile_sums = pointer<float>(tile_sums);
        mvue_compress(args, context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "decompress",
      [](Address packed, Address E, int transposed, Address out, int out_dtype, int64_t rows,
         int64_t cols, int64_t row_stride, int64_t col_stride, int backend, int device,
         Address stream) {
        DecompressArgs args;
        args.packed = pointer<const void>(packed);
        args.E = pointer<const uint8_t>(E);
        args.transposed = transposed != 0;
        args.out = matrix(out, dtype_of(out_dtype), rows, cols, row_stride, col_stride);
        decompress(args, context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "unpack_mask",
      [](Address mask, Address out, int64_t rows, int64_t cols, int backend, int device,
         Address stream) {
        unpack_mask(pointer<const uint16_t>(mask), pointer<uint8_t>(out), rows, cols,
                    context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "count_bad_blocks",
      [](Address mask, int64_t blocks, Address bad, int backend, int device, Address stream) {
        count_bad_blocks(pointer<const uint16_t>(mask), blocks, pointer<int64_t>(bad),
                         context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "count_bad_metadata",
      [](Address E, int64_t m, int64_t k, Address bad, int backend, int device, Address stream) {
        count_bad_metadata(pointer<const uint8_t>(E), m, k, pointer<int64_t>(bad),
                           context_of(backend, device, stream));
      },
      Unlocked());
}

/// A GEMM without addresses, for questions about one. Pointers count as 16-byte aligned.
SparseGemmArgs gemm_problem(int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype) {
  SparseGemmArgs args;
  args.pass = pass_of(pass);
  args.m = m;
  args.n = n;
  args.k = k;
  args.dtype = dtype_of(dtype);
  args.out_dtype = dtype_of(out_dtype);
  return args;
}

/// For questions that depend on extents alone: leading dimensions of contiguous operands.
void set_contiguous(SparseGemmArgs& args) {
  const bool weight_grad = args.pass == GemmPass::kGradWeight;
  args.rhs_ld = weight_grad ? args.n : args.k;
  args.out_ld = weight_grad ? args.n : args.m;
  args.h_ld = args.m;
}

void bind_gemm(py::module_& module) {
  module.def("sparse_gemm",
             [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, Address packed,
                Address E, Address rhs, int64_t rhs_ld, Address out, int64_t out_ld, Address bias,
                int accumulate, Address workspace, int64_t config, int backend, int device,
                Address stream, const py::object& decay, const py::object& activation) {
               SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
               args.packed = pointer<const void>(packed);
               args.E = pointer<const uint8_t>(E);
               args.rhs = pointer<const void>(rhs);
               args.rhs_ld = rhs_ld;
               args.out = pointer<void>(out);
               args.out_ld = out_ld;
               args.bias = pointer<const void>(bias);
               args.accumulate = accumulate != 0;
               args.workspace = pointer<void>(workspace);
               args.config = config;
               if (!decay.is_none()) {
                 Fields item(decay, 8);
                 args.decay = read_decay_term(item);
               }
               if (!activation.is_none()) {
                 Fields item(activation, 3);
                 args.h = item.next_pointer<void>();
                 args.h_ld = item.next<int64_t>();
                 args.activation = activation_of(item.next<int>());
               }
               const Context context = context_of(backend, device, stream);
               const py::gil_scoped_release unlocked;
               sparse_gemm(args, context);
             });

  module.def("sparse_gemm_unsupported",
             [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t rhs_ld,
                int64_t out_ld, int backend, int device) {
               SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
               args.rhs_ld = rhs_ld;
               args.out_ld = out_ld;
               args.h_ld = out_ld;  // half of it in a gated product: whole units, too
               return sparse_gemm_unsupported(args, context_of(backend, device, 0));
             });

  // Questions about a product of contiguous operands; config as for sparse_gemm.
  module.def("sparse_gemm_workspace_bytes",
             [](int pass, int64_t m, int64_t n, int64_t k, int dtype, int out_dtype, int64_t config,
                int backend, int device) {
               SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
               set_contiguous(args);
               args.config = config;
               return sparse_gemm_workspace_bytes(args, context_of(backend, device, 0));
             });

  module.def("sparse_gemm_config", [](int pass, int64_t m, int64_t n, int64_t k, int dtype,
                                      int out_dtype, int64_t config, int backend, int device) {
    SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
    set_contiguous(args);
    args.config = config;
    return sparse_gemm_config(args, context_of(backend, device, 0));
  });

  module.def("sparse_gemm_configs", [](int pass, int64_t m, int64_t n, int64_t k, int dtype,
                                       int out_dtype, int backend, int device) {
    SparseGemmArgs args = gemm_problem(pass, m, n, k, dtype, out_dtype);
    set_contiguous(args);
    const std::vector<int64_t> codes = sparse_gemm_configs(args, context_of(backend, device, 0));
    py::list result;
    for (int64_t code : codes) result.append(code);
    return result;
  });
}

void bind_activation(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "activation_forward",
      [](int kind, int gated, Address gu, int dtype, int64_t gu_rows, int64_t gu_cols,
         int64_t gu_row_stride, int64_t gu_col_stride, Address h, int64_t h_row_stride,
         int64_t h_col_stride, int backend, int device, Address stream) {
        const DType type = dtype_of(dtype);
        ActivationArgs args;
        args.kind = activation_of(kind);
        args.gated = gated != 0;
        args.gate_up = const_matrix(gu, type, gu_rows, gu_cols, gu_row_stride, gu_col_stride);
        args.h = matrix(h, type, gu_rows, args.gated ? gu_cols / 2 : gu_cols, h_row_stride,
                        h_col_stride);
        activation_forward(args, context_of(backend, device, stream));
      },
      Unlocked());

  module.def(
      "activation_backward",
      [](int kind, int gated, Address dh, int dtype, int64_t dh_rows, int64_t dh_cols,
         int64_t dh_row_stride, int64_t dh_col_stride, Address gu, int64_t gu_row_stride,
         int64_t gu_col_stride, Address dgu, int64_t dgu_row_stride, int64_t dgu_col_stride,
         Address h, int64_t h_row_stride, int64_t h_col_stride, Address seed, Address packed,
         Address E, Address tile_sums, int backend, int device, Address stream) {
        const DType type = dtype_of(dtype);
        const int64_t gu_cols = gated != 0 ? 2 * dh_cols : dh_cols;
        ActivationBackwardArgs args;
        args.kind = activation_of(kind);
        args.gated = gated != 0;
        args.d_h = const_matrix(dh, type, dh_rows, dh_cols, dh_row_stride, dh_col_stride);
        args.gate_up = const_matrix(gu, type, dh_rows, gu_cols, gu_row_stride, gu_col_stride);
        args.d_gate_up = matrix(dgu, type, dh_rows, gu_cols, dgu_row_stride, dgu_col_stride);
        args.h = matrix(h, type, dh_rows, dh_cols, h_row_stride, h_col_stride);
        args.seed = pointer<const int64_t>(seed);
        args.packed = pointer<void>(packed);
        args.E = pointer<uint8_t>(E);
        args.tile_sums = pointer<float>(tile_sums);
        activation_backward(args, context_of(backend, device, stream));
      },
      Unlocked());
}

void bind_recipe(py::module_& module) {
  def_multi<MaskedDecayArgs>(module, "masked_decay", 13, read_masked_decay, masked_decay);
  def_multi<MaskFlipsArgs>(module, "mask_flips", 4, read_mask_flips, mask_flips);
  module.def(
      "mask_gap",
      [](Address w, int dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
         Address gap, int backend, int device, Address stream) {
        mask_gap(const_matrix(w, dtype_of(dtype), rows, cols, row_stride, col_stride),
                 pointer<float>(gap), context_of(backend, device, stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

/// sparse24::Error becomes the package's own exception, looked up when it is first needed.
void translate_errors(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const Error& error) {
    const py::object type = py::module_::import("sparse24.errors").attr("Sparse24Error");
    py::set_error(type, error.what());
  }
}

}  // namespace
}  // namespace sparse24

PYBIND11_MODULE(_C, module) {
  module.doc() = "libsparse24 for Python: addresses and extents in, no torch. Use sparse24.ops.";
  py::register_local_exception_translator(sparse24::translate_errors);
  module.attr("interface") = sparse24::kInterface;
  sparse24::bind_device(module);
  sparse24::bind_formats(module);
  sparse24::bind_compress(module);
  sparse24::bind_gemm(module);
  sparse24::bind_activation(module);
  sparse24::bind_recipe(module);
}
