// GELU (tanh form), with or without a bias before it, on CUDA.
//
// A thread owns the columns of one 16-byte access and walks over rows, so that the bias stays in its registers and the
// bias gradient is summed there: x is read once in forward, x and grad once in backward. Blocks write one partial sum
// each, which a second small kernel adds in order. No atomics: the same bits every time. Sizes that are not a multiple of
// 16 bytes, and pointers that are not aligned so, take the same kernels with one element an access.
//
// 0.5 (1 + tanh u) is the logistic function of 2u, u = sqrt(2 / pi) (x + 0.044715 x^3): one exponential and no tanh.

#include "cuda/gelu.h"

#include <algorithm>

#include "cuda/partials.h"
#include "cuda/ptx.h"
#include "cuda/shared.h"
#include "cuda/warp.h"

namespace pygpt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;               // that a thread of the forward kernel takes, loaded together
constexpr int kBlocksPerProcessor = 8; // of the backward kernel with a bias
constexpr int64_t kFlatC = 2048;       // columns that plain GELU counts by

constexpr float kCubic = 0.044715f;
constexpr float kTwoU = 2 * 0.7978845608f;                 // 2u = kTwoU x (1 + kCubic x^2)
constexpr float kExponent = -kTwoU * 1.4426950409f;        // the same as an exponent of 2, negated
constexpr float kFar = 10.0f;                              // from there on the logistic function is 0 or 1

__device__ inline float logistic_of_2u(float x) {
  return __fdividef(1.0f, 1.0f + ptx::exp2_approx(kExponent * x * (1.0f + kCubic * x * x)));
}

__device__ inline float gelu(float x) { return x < -kFar ? 0.0f : x * logistic_of_2u(x); }

// s + x s (1 - s) d(2u)/dx, s being the logistic function of 2u. NaN stays NaN.
__device__ inline float gelu_slope(float x) {
  x = x < -kFar ? -kFar : x > kFar ? kFar : x;
  const float s = logistic_of_2u(x);
  return s * (1.0f + x * (1.0f - s) * kTwoU * (1.0f + 3 * kCubic * x * x));
}

template <int V, class T>
__device__ Vector<T, V> bias_or_zero(const Gelu& p, int64_t c) {
  Vector<T, V> bias{};
  if (p.bias) bias = load<V>(static_cast<const T*>(p.bias) + c);
  return bias;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward(Gelu p) {
  const int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= p.C) return;
  const Vector<T, V> bias = bias_or_zero<V, T>(p, c);
  const int64_t first = (int64_t(blockIdx.x) * blockDim.y * kRows + threadIdx.y) * p.C + c, step = blockDim.y * p.C;
  Vector<T, V> x[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row)
    if (first + row * step < p.count) x[row] = load<V>(static_cast<const T*>(p.x) + first + row * step);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (first + row * step >= p.count) break;
#pragma unroll
    for (int i = 0; i < V; ++i) x[row].set(i, gelu(x[row].get(i) + bias.get(i)));
    store(static_cast<T*>(p.y) + first + row * step, x[row]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward(Gelu p) {
  float* sums = SharedMemory().take<float>(kThreads * V);
  const int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const int64_t first = (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * p.C + c;
  const int64_t step = int64_t(gridDim.x) * blockDim.y * p.C;
  float sum[V] = {};
  if (c < p.C) {
    const Vector<T, V> bias = bias_or_zero<V, T>(p, c);
    for (int64_t at = first; at < p.count; at += step) {
      Vector<T, V> x = load<V>(static_cast<const T*>(p.x) + at);
      const Vector<T, V> grad = load<V>(static_cast<const T*>(p.grad) + at);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float grad_x = grad.get(i) * gelu_slope(x.get(i) + bias.get(i));
        sum[i] += grad_x;
        x.set(i, grad_x);
      }
      store(static_cast<T*>(p.grad_x) + at, x);
    }
  }
  if (!p.bias) return;  // as every thread of the grid does
#pragma unroll
  for (int i = 0; i < V; ++i) sums[(threadIdx.y * blockDim.x + threadIdx.x) * V + i] = sum[i];
  __syncthreads();
  const int64_t begin = int64_t(blockIdx.y) * blockDim.x * V;
  const int columns = static_cast<int>(blockDim.x) * V;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < columns && begin + i < p.C; i += blockDim.x * blockDim.y) {
    float total = 0;
    for (unsigned row = 0; row < blockDim.y; ++row) total += sums[row * columns + i];
    p.partial[blockIdx.x * p.C + begin + i] = total;
  }
}

template <class T>
__global__ void __launch_bounds__(kPartialThreads) finish_bias(Gelu p, int64_t partials) {
  const float total = column_sum(p.partial, partials, p.C);
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (threadIdx.y == 0 && column < p.C) static_cast<T*>(p.grad_bias)[column] = from_float<T>(total);
}

// --- host --------------------------------------------------------------------------------------------------------------

// Whole warps across a row, and as many rows as fit beside each other; 128 threads divide the widths of most models.
dim3 tile(int64_t vectors) {
  const auto across = static_cast<unsigned>(vectors <= kThreads / 2 ? ceil_div(vectors, kWarp) * kWarp : kThreads / 2);
  return dim3(across, kThreads / across);
}

int64_t partial_sums(int64_t rows, int64_t vectors, int multiprocessors) {
  const dim3 block = tile(vectors);
  const int64_t fill = ceil_div(int64_t(kBlocksPerProcessor) * multiprocessors, ceil_div(vectors, block.x));
  return std::clamp<int64_t>(ceil_div(rows, block.y), 1, fill);
}

template <class T, int V>
void forward_of(const Gelu& p, const Launch& at) {
  const dim3 block = tile(ceil_div(p.C, V));
  const int64_t groups = ceil_div(ceil_div(p.count, p.C), block.y * kRows);
  launch(at, forward<T, V>, dim3(grid_size(groups), grid_size(ceil_div(p.C, block.x * V))), block, 0, p);
}

template <class T, int V>
void backward_of(const Gelu& p, const Launch& at) {
  const int64_t rows = ceil_div(p.count, p.C), vectors = ceil_div(p.C, V);
  const dim3 block = tile(vectors);
  const int64_t partials = p.bias ? partial_sums(rows, ceil_div(p.C, kVector<T>), at.multiprocessors) : 0;
  const int64_t groups = p.bias ? partials : ceil_div(rows, block.y);
  launch(at, backward<T, V>, dim3(grid_size(groups), grid_size(ceil_div(p.C, block.x * V))), block,
         kThreads * V * sizeof(float), p);
  if (!p.bias) return;
  const dim3 finish = partial_block(p.C);
  launch(at, finish_bias<T>, grid_size(ceil_div(p.C, finish.x)), finish, kPartialShared, p, partials);
}

template <class T>
void run(Gelu p, bool backward, const Launch& at) {
  if (!p.bias) p.C = kFlatC;
  const bool vectors = (p.bias ? p.C : p.count) % kVector<T> == 0 && aligned(p.x) && aligned(p.bias) && aligned(p.y) &&
                       aligned(p.grad) && aligned(p.grad_x);
  if (backward) return vectors ? backward_of<T, kVector<T>>(p, at) : backward_of<T, 1>(p, at);
  return vectors ? forward_of<T, kVector<T>>(p, at) : forward_of<T, 1>(p, at);
}

void run(const Gelu& p, bool backward, const Launch& at) {
  if (p.dtype == DType::f32) return run<float>(p, backward, at);
  if (p.dtype == DType::bf16) return run<__nv_bfloat16>(p, backward, at);
  return run<__half>(p, backward, at);
}

}  // namespace

int64_t gelu_partials(int64_t rows, int64_t C, DType dtype, int multiprocessors) {
  return partial_sums(rows, ceil_div(C, dtype == DType::f32 ? kVector<float> : kVector<__half>), multiprocessors);
}

void gelu_forward(Gelu p, const Launch& at) {
  if (p.count) run(p, false, at);
}

void gelu_backward(Gelu p, const Launch& at) {
  if (p.count) run(p, true, at);
}

}  // namespace pygpt::cuda
