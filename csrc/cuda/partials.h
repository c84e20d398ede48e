// The second step of a deterministic sum over rows: blocks have written partial sums (partials, columns), which are now
// added in order. 32 columns a block, each summed by 8 threads and then over those 8.
#pragma once

#include "cuda/shared.h"
#include "cuda/types.h"
#include "cuda/warp.h"

namespace pygpt::cuda {

constexpr int kPartialThreads = 256;
constexpr size_t kPartialShared = kPartialThreads * sizeof(float);

// Column blockIdx.x * 32 + threadIdx.x; right in the threads of threadIdx.y = 0. For blocks of (32, 8) threads.
__device__ inline float column_sum(const float* partial, int64_t partials, int64_t columns) {
  float* sums = SharedMemory().take<float>(kPartialThreads);
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  float total = 0;
  if (column < columns)
    for (int64_t i = threadIdx.y; i < partials; i += blockDim.y) total += partial[i * columns + column];
  sums[threadIdx.y * kWarp + threadIdx.x] = total;
  __syncthreads();
  for (unsigned i = 1; i < blockDim.y; ++i) total += sums[i * kWarp + threadIdx.x];
  return total;
}

}  // namespace pygpt::cuda
