// Stands in for CUDA's header of this name when kernels are compiled for the emulated device: only what they use.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <tuple>

#include "../runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }


#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_SITE) { ::emulation::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  if (mask != 0xffffffffu) ::emulation::fail("%s:%d: a mask of part of a warp is not emulated", file, line);
  ::emulation::warp_barrier({file, line});
}

namespace emulation {
inline unsigned lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}
template <class T>
T shuffle_any(unsigned mask, T value, int source, Site at) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffffu) fail("%s:%d: a mask of part of a warp is not emulated", at.file, at.line);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = shuffle(bits, source, at);
  memcpy(&value, &bits, 4);
  return value;
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, EMULATION_SITE) {
  return ::emulation::shuffle_any(mask, value, source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, EMULATION_SITE) {
  return ::emulation::shuffle_any(mask, value, static_cast<int>(::emulation::lane()) ^ lanes, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, EMULATION_SITE) {
  const int lane = static_cast<int>(::emulation::lane());
  return ::emulation::shuffle_any(mask, value, lane >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned, bool predicate, EMULATION_SITE) {
  return ::emulation::ballot(predicate, {file, line});
}
inline bool __any_sync(unsigned, bool predicate, EMULATION_SITE) {
  return ::emulation::ballot(predicate, {file, line}) != 0;
}
inline bool __all_sync(unsigned, bool predicate, EMULATION_SITE) {
  return ::emulation::ballot(predicate, {file, line}) == 0xffffffffu;
}

// Threads of a block never run at the same time, so that plain arithmetic would do; the builtins tell ThreadSanitizer.
template <class T>
T atomicAdd(T* at, T value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

inline float __int_as_float(int bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline void __threadfence() {}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
using std::fabs;
using std::fmax;

// --- host ------------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38, cudaDevAttrComputeCapabilityMajor = 75 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few multiprocessors and a small cache, so that small inputs make every block take more than one turn.
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : attribute == cudaDevAttrL2CacheSize ? 200'000 : 9;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

// Runs the kernel before it returns. A mistake that the emulation finds is thrown, with its own message.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {arguments...}};
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  if (empty || grid.x > 0x7fffffffu || grid.y > 0xffff || grid.z > 0xffff || block.x * block.y * block.z > 1024 ||
      config->dynamicSmemBytes > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  ::emulation::run_grid(
      {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes,
      [](void* argument) {
        const Call& call = *static_cast<Call*>(argument);
        std::apply(call.kernel, call.arguments);
      },
      &call);
  return cudaSuccess;
}
