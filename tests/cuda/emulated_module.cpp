// The Python module `_emulated` of the tests: convkit's operators with the CUDA kernels run by the emulator on the
// memory of CPU tensors, and kernels with planted errors.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/emulation/emulation.h"
#include "torch/tensors.h"

namespace py = pybind11;

namespace convkit::cuda::planted {
bool run(const std::string& name, const void* x, void* y, int n);
}

PYBIND11_MODULE(_emulated, m) {
  namespace emulation = convkit::emulation;
  m.def("planted", [](const std::string& name, uintptr_t x, int64_t x_bytes, uintptr_t y, int64_t y_bytes, int n) {
    emulation::take_back();
    emulation::lend(reinterpret_cast<void*>(x), x_bytes, false, "x");
    emulation::lend(reinterpret_cast<void*>(y), y_bytes, true, "y");
    bool known = convkit::cuda::planted::run(name, reinterpret_cast<void*>(x), reinterpret_cast<void*>(y), n);
    emulation::take_back();
    if (!known) throw std::invalid_argument("no planted kernel is called " + name);
  });
  // While they are installed, the operators of CPU tensors run here; what was registered before comes back afterwards.
  static std::unique_ptr<torch::Library> installed;
  m.def("install", [] {
    installed = std::make_unique<torch::Library>(torch::Library::IMPL, "convkit", c10::DispatchKey::CPU, __FILE__, __LINE__);
    convkit::register_conv(*installed);
    convkit::register_channels(*installed);
    convkit::register_max_pool(*installed);
  });
  m.def("uninstall", [] { installed.reset(); });
  m.def("set_most_workspace_bytes", [](int64_t bytes) { emulation::most_workspace_bytes() = bytes; });
  m.def(
      "set_device",
      [](int major, int minor, int multiprocessors, int64_t shared_bytes_per_block, int largest_cluster) {
        emulation::device().major = major, emulation::device().minor = minor;
        emulation::device().multiprocessors = multiprocessors;
        emulation::device().shared_bytes_per_block = shared_bytes_per_block;
        emulation::device().largest_cluster = largest_cluster;
      },
      py::arg("major"), py::arg("minor"), py::arg("multiprocessors"), py::arg("shared_bytes_per_block"), py::arg("largest_cluster") = 1);
  m.def("counters", [] {
    emulation::Counters c = emulation::counters();
    return py::make_tuple(c.launches, c.blocks, c.accesses);
  });
}
