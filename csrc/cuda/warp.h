// Reductions over the 32 threads of a warp. The order is fixed and every thread gets the same bits.
#pragma once

#include <cuda_runtime.h>

namespace pygpt::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Sum over groups of `Width` neighbouring threads (a power of two).
template <int Width = kWarp>
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = Width / 2; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

template <int Width = kWarp>
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = Width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, step));
  return x;
}

}  // namespace pygpt::cuda
