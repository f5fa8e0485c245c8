// device.cpp: what was built, what the machine has, and the packed formats: device.h, formats.h.
#include "bindings/arguments.h"

namespace sparse24::bindings {

void bind_device(py::module_& module) {
  module.def("version", [] { return std::string(version()); });
  module.def("set_cpu_threads", &set_cpu_threads);
  module.def("device_info", [](int device) {
    const DeviceInfo info = device_info(device);
    py::dict result;
    result["cuda_built"] = info.cuda_built;
    result["cuda_archs"] = info.cuda_archs;
    result["gemm_archs"] = info.gemm_archs;
    result["device_count"] = info.device_count;
    result["capability_major"] = info.capability_major;
    result["capability_minor"] = info.capability_minor;
    result["multiprocessors"] = info.multiprocessors;
    result["memory_bandwidth"] = info.memory_bandwidth;
    result["reason"] = info.reason;
    return result;
  });

  // packed_formats() -> [(dtype, name, bytes, per_vector, meta_tile_k, token_step, mn_major,
  // scaled, wide)], the rows of common/format.h.
  module.def("packed_formats", [] {
    py::list rows;
    for (const FormatInfo& f : packed_formats()) {
      rows.append(py::make_tuple(static_cast<int>(f.dtype), f.name, f.bytes, f.per_vector,
                                 f.meta_tile_k, f.token_step, f.mn_major, f.scaled,
                                 static_cast<int>(f.wide)));
    }
    return rows;
  });
}

}  // namespace sparse24::bindings
