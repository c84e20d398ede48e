// One small kernel for each wrapper of csrc/cuda/ptx_sm90.h, called from tests/test_cuda_hopper.py, which has the references.
// Compiles for the emulated device and with nvcc for sm_90a alike; all pointers are of the device.

#include <cstdio>

#include "cuda/launch.h"
#include "cuda/ptx_sm90.h"
#include "cuda/shared.h"

namespace {

using namespace pygpt::cuda;

constexpr int kTile = 64 * 64;  // elements of a tile of 64 rows

// Loads a box, and writes down the shared memory just as it lies there.
__global__ void tma_kernel(const __grid_constant__ TensorMap map, uint16_t* out, int elements, int x, int y, int z, int w) {
  SharedMemory shared;
  uint16_t* tile = shared.take<uint16_t>(elements, 1024);
  uint64_t* barrier = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier, elements * 2);
    ptx::tma_load(tile, &map, barrier, x, y, z, w);
  }
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < elements; i += blockDim.x) out[i] = tile[i];
}

// A ring of two stages: thread 0 loads tile after tile, the warps of the other warpgroup write them down.
__global__ void __launch_bounds__(256, 1) ring_kernel(const __grid_constant__ TensorMap map, uint16_t* out, int tiles) {
  SharedMemory shared;
  uint16_t* stages = shared.take<uint16_t>(2 * kTile, 1024);
  uint64_t* full = shared.take<uint64_t>(2);
  uint64_t* empty = shared.take<uint64_t>(2);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 128);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_give_back<24>();
    if (threadIdx.x > 0) return;
    for (int i = 0; i < tiles; ++i) {
      ptx::mbarrier_wait(empty + i % 2, (i / 2 + 1) % 2);
      ptx::mbarrier_arrive_expect(full + i % 2, kTile * 2);
      ptx::tma_load(stages + i % 2 * kTile, &map, full + i % 2, 0, 0, 64 * i, 0);
    }
  } else {
    ptx::registers_take<240>();
    for (int i = 0; i < tiles; ++i) {
      ptx::mbarrier_wait(full + i % 2, i / 2 % 2);
      for (int j = threadIdx.x - 128; j < kTile; j += 128) out[i * kTile + j] = stages[i % 2 * kTile + j];
      ptx::mbarrier_arrive(empty + i % 2);
    }
  }
}

template <int N>
__device__ void write_down(const float (&d)[N][4], float* out) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * (N * 8) + n * 8 + column + i % 2] = d[n][i];
  }
}

// out (64, N) = a (64, K) b^T (N, K), K = 64 or 128, in two groups; then twice that by accumulating the first group again.
template <class T, int N>
__global__ void rows_kernel(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* out, int K) {
  SharedMemory shared;
  T* a = shared.take<T>(2 * kTile, 1024);
  T* b = shared.take<T>(2 * N * 64, 1024);
  uint64_t* barrier = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier, (64 + N) * K * 2);
    for (int part = 0; part < K / 64; ++part) {
      ptx::tma_load(a + part * kTile, &a_map, barrier, part * 64, 0, 0, 0);
      ptx::tma_load(b + part * N * 64, &b_map, barrier, part * 64, 0, 0, 0);
    }
  }
  ptx::mbarrier_wait(barrier, 0);
  float d[N / 8][4], twice[N / 8][4];
  ptx::wgmma_fence();
  for (int k = 0; k < K; k += 16)
    ptx::wgmma_by_rows(T{}, d, ptx::wgmma_operand(a + k / 64 * kTile + k % 64),
                       ptx::wgmma_operand(b + k / 64 * N * 64 + k % 64), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_fence();
  for (int k = 0; k < 2 * K; k += 16)
    ptx::wgmma_by_rows(T{}, twice, ptx::wgmma_operand(a + k % K / 64 * kTile + k % 64),
                       ptx::wgmma_operand(b + k % K / 64 * N * 64 + k % 64), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>(d);
  write_down(d, out);
  ptx::wgmma_wait<0>(twice);
  write_down(twice, out + 64 * N);
}

// out (64, N) += a (64, 64), in registers, times b (64, N).
template <class T, int N>
__global__ void columns_kernel(const T* a, const __grid_constant__ TensorMap b_map, float* out) {
  SharedMemory shared;
  T* b = shared.take<T>(N * 64, 1024);
  uint64_t* barrier = shared.take<uint64_t>(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier, N * 64 * 2);
    for (int part = 0; part < N / 64; ++part) ptx::tma_load(b + part * kTile, &b_map, barrier, part * 64, 0, 0, 0);
  }
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  uint32_t fragments[4][4];
  float d[N / 8][4];
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      fragments[step][i] = *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * 64 + step * 16 + i / 2 * 8 + column);
  }
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = out[(row + i / 2 * 8) * N + n * 8 + column + i % 2];
  }
  ptx::mbarrier_wait(barrier, 0);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    ptx::wgmma_by_columns(T{}, d, fragments[step], ptx::wgmma_operand(b + step * 16 * 64, kTile * 2));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(d);
  write_down(d, out);
}

const Launch kAt{nullptr, 1, "conformance"};

TensorMap matrix(DType dtype, const void* data, int rows, int columns) {
  const uint64_t bytes = columns * 2;
  return tensor_map(dtype, const_cast<void*>(data), {uint64_t(columns), uint64_t(rows), 1, 1}, {bytes, bytes, bytes},
                    {64, uint32_t(rows), 1, 1}, kAt);
}

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::runtime_error& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int tma(const void* data, const uint64_t* sizes, const uint64_t* strides, const uint32_t* box, const int* at, void* out) {
  return guarded([&] {
    const int elements = static_cast<int>(box[0] * box[1] * box[2] * box[3]);
    const TensorMap map = tensor_map(DType::f16, const_cast<void*>(data), {sizes[0], sizes[1], sizes[2], sizes[3]},
                                     {strides[0], strides[1], strides[2]}, {box[0], box[1], box[2], box[3]}, kAt);
    launch(kAt, tma_kernel, 1, 64, elements * 2 + 16, map, static_cast<uint16_t*>(out), elements, at[0], at[1], at[2], at[3]);
  });
}

EXPORT int ring(const void* data, int tiles, void* out) {
  return guarded([&] {
    const TensorMap map = tensor_map(DType::f16, const_cast<void*>(data), {64, 1, uint64_t(tiles) * 64, 1}, {128, 128, 128},
                                     {64, 1, 64, 1}, kAt);
    launch(kAt, ring_kernel, 1, 256, 4 * kTile + 32, map, static_cast<uint16_t*>(out), tiles);
  });
}

EXPORT int by_rows(int bf16, int N, int K, const void* a, const void* b, float* out) {
  return guarded([&] {
    const DType dtype = bf16 ? DType::bf16 : DType::f16;
    const auto kernel = bf16 ? (N == 64 ? rows_kernel<__nv_bfloat16, 64> : rows_kernel<__nv_bfloat16, 128>)
                             : (N == 64 ? rows_kernel<__half, 64> : rows_kernel<__half, 128>);
    launch(kAt, kernel, 1, 128, (64 + N) * 256 + 16, matrix(dtype, a, 64, K), matrix(dtype, b, N, K), out, K);
  });
}

EXPORT int by_columns(int bf16, int N, const void* a, const void* b, float* out) {
  const auto run = [&]<class T>(T, DType dtype) {
    const auto kernel = N == 64 ? columns_kernel<T, 64> : columns_kernel<T, 128>;
    launch(kAt, kernel, 1, 128, N * 128 + 16, static_cast<const T*>(a), matrix(dtype, b, 64, N), out);
  };
  return guarded([&] { bf16 ? run(__nv_bfloat16{}, DType::bf16) : run(__half{}, DType::f16); });
}

#ifdef PYGPT_CUDA_EMULATION
EXPORT void emulation_set_seed(uint64_t seed) { emulation::set_seed(seed); }
#endif
