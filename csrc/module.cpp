// The Python module pygpt._C: build information and the CPU capability. Importing it registers the operators.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "cpu/capability.h"
#include "cpu/tensor.h"

namespace {

// By default glibc gives every freed block of over 32 MiB back to the kernel, and a training step then spends its time on
// page faults of tensors that it allocates afresh. Returns whether this C library has the settings.
bool tune_allocator() {
#ifdef __GLIBC__
  pygpt::keeps_freed_memory = mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, -1);
  return pygpt::keeps_freed_memory;
#else
  return false;
#endif
}

// Whether MKL, torch's library for float32 products on x86, leaves half of this processor unused and oneDNN does not.
bool prefers_onednn() {
#if PYGPT_X86_LEVELS
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PYGPT_VERSION;
  m.attr("built_with_torch") = PYGPT_TORCH_VERSION;
#ifdef __VERSION__
  m.attr("compiler") = __VERSION__;
#endif
  m.def("cpu_capability", &pygpt::capability_name, "Instruction set the CPU kernels use.");
  m.def("available_cpu_capabilities", &pygpt::available_capabilities, "Instruction sets of this machine, lowest first.");
  m.def("set_cpu_capability", &pygpt::set_capability, pybind11::arg("name"), "Lower the instruction set, or raise it again; \"\": as at first.");
  m.def("prefers_onednn", &prefers_onednn, "Whether float32 products are faster through oneDNN than through MKL here.");
  m.def("multiplies_bf16", &pygpt::multiplies_bf16, "Whether products of bfloat16 are faster than those of float32 here.");
  m.def("multiplies_by_vectors", &pygpt::multiplies_by_vectors, "Whether products go through our vectors: level in use.");
  m.def("has_tiles", &pygpt::has_tiles, "Whether products of bfloat16 go through AMX tiles: processor, and level in use.");
  m.def("tune_allocator", &tune_allocator, "Keep freed memory in this process; see pygpt.tune_allocator.");
}
