// The Python module pygpt._C: build information and the CPU capability. Importing it registers the operators.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PYGPT_VERSION;
  m.attr("built_with_torch") = PYGPT_TORCH_VERSION;
#ifdef __VERSION__
  m.attr("compiler") = __VERSION__;
#endif
  m.def("cpu_capability", &pygpt::capability_name, "Instruction set the CPU kernels use.");
  m.def("available_cpu_capabilities", &pygpt::available_capabilities, "Instruction sets of this machine, lowest first.");
  m.def("set_cpu_capability", &pygpt::set_capability, pybind11::arg("name"), "Lower the instruction set, or raise it again.");
  pygpt::capability();  // a bad PYGPT_CPU_CAPABILITY is an error here, at import, not in the first kernel
}
