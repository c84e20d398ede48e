// Launching a kernel, and saying which op and shape it was when that fails. Host code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace pygpt::cuda {

// Where a launcher puts its work, and what an error message calls it.
struct Launch {
  cudaStream_t stream;
  int multiprocessors;
  std::string what;  // op and shape
};

inline void check(cudaError_t status, const Launch& at) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears an error that is not sticky
  throw std::runtime_error(at.what + ": CUDA error: " + cudaGetErrorString(status));
}

// cudaLaunchKernelEx rather than <<<>>>: the same source compiles under the emulation of tests/cuda_emulation.
template <class... Parameters>
void launch(const Launch& at, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          at);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = at.stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), at);
  check(cudaPeekAtLastError(), at);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks in one dimension of a grid. Too many stay too many: then the launch fails, where a cast would wrap around.
constexpr unsigned grid_size(int64_t blocks) { return static_cast<unsigned>(blocks < UINT32_MAX ? blocks : UINT32_MAX); }

}  // namespace pygpt::cuda
