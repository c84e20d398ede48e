// Lets Python tests run the CUDA operators on CPU tensors: operators pygpt_emulated::*, the same host and kernel files.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "runtime.h"

// Compiled with -Dpygpt=pygpt_emulated, which renames the operators' library and its namespace. torch 2.10's macro for a
// library takes the name as it is written, that for a fragment of one as it is defined.
#include <torch/csrc/stable/library.h>
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY STABLE_TORCH_LIBRARY_FRAGMENT
#include "schema.cpp"

// What a CPU build of torch has no answer to. Linked with -Bsymbolic, so that these are the ones used.
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

extern "C" __attribute__((visibility("default"))) void emulation_set_seed(uint64_t seed) { emulation::set_seed(seed); }
extern "C" __attribute__((visibility("default"))) uint64_t emulation_wgmma_count() { return emulation::wgmma_count(); }
