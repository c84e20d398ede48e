// The Python module pygpt._C: build information and the CPU capability. Importing it registers the operators.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef __GLIBC__
#include <malloc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <vector>
#endif

#include "cpu/capability.h"
#include "cpu/tensor.h"

namespace {

#ifdef __GLIBC__

// Whether address space that is never touched costs nobody anything.
bool space_is_free() {
  for (const auto resource : {RLIMIT_AS, RLIMIT_DATA}) {
    rlimit limit;
    if (getrlimit(resource, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return false;
  }
  int overcommit = 2;  // the system counts what is asked for, not what is used
  std::ifstream("/proc/sys/vm/overcommit_memory") >> overcommit;
  return overcommit != 2;
}

// The memory that the heap will grow into, half of what the machine has, is to come in huge pages, where the system takes such
// advice: a step's tensors, and the weights that generation reads, have more small pages than the processor remembers where
// they are. Nothing of it is touched, so a process does not have what it does not use.
void ask_for_huge_pages_to_come() {
  constexpr size_t kPart = (size_t(1) << 30) - (1 << 16);  // less than M_MMAP_THRESHOLD below
  constexpr size_t kMost = size_t(64) << 30;
  if (!space_is_free()) return;
  const size_t memory = size_t(std::max(sysconf(_SC_PHYS_PAGES), 0L)) * size_t(sysconf(_SC_PAGESIZE));
  std::vector<void*> parts;
  for (size_t bytes = kPart; bytes <= std::min(memory / 2, kMost); bytes += kPart)
    if (void* part = std::malloc(kPart)) parts.push_back(part);
  for (void* part : parts) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(part);
    const uintptr_t first = (start + pygpt::kHugePage - 1) / pygpt::kHugePage * pygpt::kHugePage;
    madvise(reinterpret_cast<void*>(first), start + kPart - first, MADV_HUGEPAGE);
  }
  for (void* part : parts) std::free(part);
}

#endif

// By default glibc gives every freed block of over 32 MiB back to the kernel, and a training step then spends its time on
// page faults of tensors that it allocates afresh. Returns whether this C library has the settings.
bool tune_allocator() {
#ifdef __GLIBC__
  if (pygpt::keeps_freed_memory) return true;
  pygpt::keeps_freed_memory = mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, -1);
  if (pygpt::keeps_freed_memory) ask_for_huge_pages_to_come();
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
  m.def("has_tiles", &pygpt::has_tiles, "Whether products of bfloat16 go through AMX tiles: processor, and level in use.");
  m.def("tune_allocator", &tune_allocator, "Keep freed memory in this process, in huge pages; see pygpt.tune_allocator.");
}
