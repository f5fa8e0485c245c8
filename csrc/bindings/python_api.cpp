// python_api.cpp: the Python module sparse24._C. This folder alone knows pybind11; arguments.h says
// what passes through.
//
// The files of this folder are one translation unit: each by itself would spend most of its time in
// the headers of pybind11, and all of them together four times as long.
#include "bindings/activation.cpp"
#include "bindings/device.cpp"
#include "bindings/gemm.cpp"
#include "bindings/pack.cpp"
#include "bindings/recipe.cpp"

namespace sparse24::bindings {
namespace {

/// Of the signatures in this folder. Raised with each change of one, here and in
/// sparse24/_library.py: an editable installation whose Python files are newer than its binding
/// then says so instead of failing at some call.
constexpr int kInterface = 10;

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
}  // namespace sparse24::bindings

PYBIND11_MODULE(_C, module) {
  namespace bindings = sparse24::bindings;
  module.doc() = "libsparse24 for Python: addresses and extents in, no torch. Use sparse24.ops.";
  pybind11::register_local_exception_translator(bindings::translate_errors);
  module.attr("interface") = bindings::kInterface;
  bindings::bind_device(module);
  bindings::bind_pack(module);
  bindings::bind_gemm(module);
  bindings::bind_activation(module);
  bindings::bind_recipe(module);
}
