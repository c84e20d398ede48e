// The second step of a deterministic sum over rows: blocks have written partial sums (partials, columns), which are now
// added in an order that is always the same. Where columns are few, so are those of a block, down to the 32 bytes of one
// access to memory, and threads share out the partial sums of each: this step is no more than latency.
#pragma once

#include "cuda/shared.h"
#include "cuda/types.h"

namespace pygpt::cuda {

constexpr int kPartialThreads = 1024;
constexpr size_t kPartialShared = kPartialThreads * sizeof(float);

// Powers of two.
inline dim3 partial_block(int64_t columns) { return columns <= 4096 ? dim3(8, 128) : dim3(32, 32); }

// Column blockIdx.x * blockDim.x + threadIdx.x; right in the threads of threadIdx.y = 0. For blocks of partial_block.
__device__ inline float column_sum(const float* partial, int64_t partials, int64_t columns) {
  float* sums = SharedMemory().take<float>(kPartialThreads);
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  float total = 0;
  if (column < columns)
    for (int64_t i = threadIdx.y; i < partials; i += blockDim.y) total += partial[i * columns + column];
  sums[threadIdx.y * blockDim.x + threadIdx.x] = total;
  for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half)
      sums[threadIdx.y * blockDim.x + threadIdx.x] += sums[(threadIdx.y + half) * blockDim.x + threadIdx.x];
  }
  return threadIdx.y == 0 ? sums[threadIdx.x] : 0.0f;
}

}  // namespace pygpt::cuda
