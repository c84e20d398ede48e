// One small kernel for each wrapper of csrc/cuda/ptx.h, called from tests/test_cuda_ptx.py, which has the references.
// Compiles for the emulated device and with nvcc alike; all pointers are of the device. Fragments go in and out as the
// registers of 32 threads, so that their layout is worked out there and not here.

#include <cstdio>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/shared.h"

namespace {

using namespace pygpt::cuda;

constexpr int kLanes = 32;
constexpr int kTurns = 4;    // groups of copies
constexpr int kThreads = 64; // that copy, 16 bytes each in a turn

// Thread i gives the address of row rows[i] of (rows, 8) matrices.
template <bool kTransposed>
__global__ void ldmatrix_kernel(const uint16_t* matrices, const int* rows, uint32_t* out) {
  uint16_t* shared = SharedMemory().take<uint16_t>(kLanes * 8);
  for (int i = 0; i < 8; ++i) shared[threadIdx.x * 8 + i] = matrices[threadIdx.x * 8 + i];
  __syncwarp();
  const uint16_t* row = shared + rows[threadIdx.x] * 8;
  uint32_t registers[4];
  if constexpr (kTransposed) {
    ptx::ldmatrix_x4_transposed(registers, row);
  } else {
    ptx::ldmatrix_x4(registers, row);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = registers[i];
}

template <class T>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t rows[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    rows[i] = a[threadIdx.x * 4 + i];
    sums[i] = c[threadIdx.x * 4 + i];
  }
  ptx::mma_m16n8k16(T{}, sums, rows, b[threadIdx.x * 2], b[threadIdx.x * 2 + 1]);
  for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = sums[i];
}

// Copies turn after turn, a group each; a turn's data are read right after the wait that covers it, by the thread that
// copied them alone. No thread copies in a turn that `valid` gives as 2 or more: its group is empty, and counts.
__global__ void copy_kernel(const uint4* from, const int* valid, uint4* out) {
  uint4* shared = SharedMemory().take<uint4>(kTurns * kThreads);
  const int thread = threadIdx.x;
  for (int turn = 0; turn < kTurns; ++turn) {
    const int at = turn * kThreads + thread;
    shared[at] = make_uint4(7, 7, 7, 7);
    if (valid[at] < 2) ptx::cp_async_16(shared + at, from + at, valid[at] == 1);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<3>();
  out[thread] = shared[thread];
  ptx::cp_async_wait<2>();
  out[kThreads + thread] = shared[kThreads + thread];
  ptx::cp_async_wait<1>();
  out[2 * kThreads + thread] = shared[2 * kThreads + thread];
  ptx::cp_async_wait<0>();
  out[3 * kThreads + thread] = shared[3 * kThreads + thread];
}

template <class T>
__global__ void pack_kernel(const float* low, const float* high, uint32_t* out, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) out[i] = ptx::pack(T{}, low[i], high[i]);
}

__global__ void exp2_kernel(const float* x, float* y, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) y[i] = ptx::exp2_approx(x[i]);
}

// 0: it ran. Whether it went well on a GPU is known once the caller has synchronised.
template <class... Parameters>
int run(void (*kernel)(Parameters...), int threads, size_t shared, std::type_identity_t<Parameters>... arguments) {
  try {
    launch({nullptr, 1, "conformance"}, kernel, 1, threads, shared, arguments...);
    return 0;
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int ldmatrix(int transposed, const uint16_t* matrices, const int* rows, uint32_t* out) {
  return run(transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, kLanes, kLanes * 16, matrices, rows, out);
}

EXPORT int mma(int bf16, const uint32_t* a, const uint32_t* b, float* c) {
  return run(bf16 ? mma_kernel<__nv_bfloat16> : mma_kernel<__half>, kLanes, 0, a, b, c);
}

EXPORT int copy(const uint4* from, const int* valid, uint4* out) {
  return run(copy_kernel, kThreads, kTurns * kThreads * sizeof(uint4), from, valid, out);
}

EXPORT int pack(int bf16, const float* low, const float* high, uint32_t* out, int count) {
  return run(bf16 ? pack_kernel<__nv_bfloat16> : pack_kernel<__half>, kThreads, 0, low, high, out, count);
}

EXPORT int exp2_of(const float* x, float* y, int count) { return run(exp2_kernel, kThreads, 0, x, y, count); }

#ifdef PYGPT_CUDA_EMULATION
EXPORT void emulation_set_seed(uint64_t seed) { emulation::set_seed(seed); }
#endif
