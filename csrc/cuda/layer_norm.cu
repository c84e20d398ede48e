// layer_norm and add_layer_norm on CUDA.
//
// Up to C = 12,288 a row lives in the registers of the threads that share it: 32 elements a thread, read once by 16-byte
// loads. A row of up to 1,024 elements belongs to one warp, four rows to a block, so that no barrier is needed; a longer
// row has a block to itself. Other widths and pointers that are not 16-byte aligned take the plain kernels at the end.
//
// Weight gradients: each block walks over every gridDim-th group of rows with sums in registers, writes one partial sum,
// and a second small kernel adds the partials in order. No atomics: the same bits every time.

#include "cuda/layer_norm.h"

#include <algorithm>

#include "cuda/partials.h"
#include "cuda/shared.h"
#include "cuda/warp.h"

namespace pygpt::cuda {
namespace {

constexpr int kElements = 32;      // of a row, held by a thread
constexpr int kMaxThreads = 384;   // of a row: 384 * 32 = 12,288 elements, at up to 168 registers a thread
constexpr int kRowsPerBlock = 4;   // where a row is one warp
constexpr int kPlainThreads = 256;
constexpr int64_t kMaxC = int64_t(kElements) * kMaxThreads;

template <class T>
constexpr int kVectors = kElements / kVector<T>;

template <class T>
__device__ const T* at(const void* p, int64_t offset) {
  return static_cast<const T*>(p) + offset;
}
template <class T>
__device__ T* at(void* p, int64_t offset) {
  return static_cast<T*>(p) + offset;
}

// Sum over the threads of a row: a warp of a block of several rows, or else the whole block.
__device__ float row_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return x;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < warps; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_vector(LayerNormForward p) {
  constexpr int V = kVector<T>;
  float* scratch = SharedMemory().take<float>(kMaxThreads / kWarp);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // only in blocks of several rows, which have no barrier
  const int64_t begin = row * p.C;
  const int C = static_cast<int>(p.C);

  Vector<T, V> x[kVectors<T>];
  float total = 0;
#pragma unroll
  for (int i = 0; i < kVectors<T>; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * V;
    if (c >= C) continue;
    x[i] = load<V>(at<T>(p.x, begin + c));
    if (p.residual) {
      const Vector<T, V> r = load<V>(at<T>(p.residual, begin + c));
#pragma unroll
      for (int j = 0; j < V; ++j) x[i].set(j, x[i].get(j) + r.get(j));  // rounded, as in two eager ops
      store(at<T>(p.sum, begin + c), x[i]);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) total += x[i].get(j);
  }
  const float mean = row_sum(total, scratch) / C;

  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors<T>; ++i) {
    if (static_cast<int>((i * blockDim.x + threadIdx.x) * V) >= C) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) squares += (x[i].get(j) - mean) * (x[i].get(j) - mean);
  }
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch) / C + p.eps);

#pragma unroll
  for (int i = 0; i < kVectors<T>; ++i) {
    const int c = (i * blockDim.x + threadIdx.x) * V;
    if (c >= C) continue;
    const Vector<W, V> weight = load<V>(at<W>(p.weight, c));
    Vector<W, V> bias{};
    if (p.bias) bias = load<V>(at<W>(p.bias, c));
#pragma unroll
    for (int j = 0; j < V; ++j) x[i].set(j, (x[i].get(j) - mean) * rstd * weight.get(j) + bias.get(j));
    store(at<T>(p.y, begin + c), x[i]);
  }
  if (threadIdx.x == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

// grad_x of every gridDim.x-th group of rows, and this block's partial sums of the weight gradients.
template <class T, class W>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_vector(LayerNormBackward p) {
  constexpr int V = kVector<T>;
  SharedMemory shared;
  float* scratch = shared.take<float>(kMaxThreads / kWarp);
  const int C = static_cast<int>(p.C);
  float sum_weight[kElements] = {}, sum_bias[kElements] = {};

  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows; row += int64_t(gridDim.x) * blockDim.y) {
    const int64_t begin = row * p.C;
    const float mean = p.mean[row], rstd = p.rstd[row];
    Vector<T, V> grad[kVectors<T>], x[kVectors<T>];
    float dot = 0, total = 0;  // of the gradient of the normalised row, with that row and with 1
#pragma unroll
    for (int i = 0; i < kVectors<T>; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * V;
      if (c >= C) continue;
      grad[i] = load<V>(at<T>(p.grad, begin + c));
      x[i] = load<V>(at<T>(p.x, begin + c));
      const Vector<W, V> weight = load<V>(at<W>(p.weight, c));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = (x[i].get(j) - mean) * rstd, dy = grad[i].get(j);
        sum_weight[i * V + j] += dy * normed;
        sum_bias[i * V + j] += dy;
        total += dy * weight.get(j);
        dot += dy * weight.get(j) * normed;
      }
    }
    total = row_sum(total, scratch) / C;
    dot = row_sum(dot, scratch) / C;
#pragma unroll
    for (int i = 0; i < kVectors<T>; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * V;
      if (c >= C) continue;
      const Vector<W, V> weight = load<V>(at<W>(p.weight, c));
      Vector<T, V> other{};
      if (p.grad_sum) other = load<V>(at<T>(p.grad_sum, begin + c));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = (x[i].get(j) - mean) * rstd;
        const float from_norm = (grad[i].get(j) * weight.get(j) - total - normed * dot) * rstd;
        x[i].set(j, from_norm + other.get(j));
      }
      store(at<T>(p.grad_x, begin + c), x[i]);
    }
  }

  // Rows of a block are added in order through shared memory; then one partial sum of each gradient leaves the block.
  float* rows = shared.take<float>(blockDim.y > 1 ? static_cast<int>(blockDim.y) * C : 0);
  float* partial = p.partial + int64_t(blockIdx.x) * 2 * C;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const auto& sum = which == 0 ? sum_weight : sum_bias;
#pragma unroll
    for (int i = 0; i < kVectors<T>; ++i) {
      const int c = (i * blockDim.x + threadIdx.x) * V;
      if (c >= C) continue;
      float* to = blockDim.y > 1 ? rows + threadIdx.y * C + c : partial + which * C + c;
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = sum[i * V + j];
    }
    if (blockDim.y == 1) continue;
    __syncthreads();
    for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < C; c += blockDim.x * blockDim.y) {
      float total = 0;
      for (unsigned row = 0; row < blockDim.y; ++row) total += rows[row * C + c];
      partial[which * C + c] = total;
    }
    __syncthreads();
  }
}

// --- any C, any alignment: a block per row, three passes ---------------------------------------------------------------

template <class T, class W>
__global__ void __launch_bounds__(kPlainThreads) forward_plain(LayerNormForward p) {
  float* scratch = SharedMemory().take<float>(kPlainThreads / kWarp);
  const int64_t begin = int64_t(blockIdx.x) * p.C;
  const T* x = at<T>(p.x, begin);
  float total = 0, squares = 0;
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
    T value = x[c];
    if (p.residual) {
      value = from_float<T>(to_float(value) + to_float(*at<T>(p.residual, begin + c)));
      *at<T>(p.sum, begin + c) = value;
    }
    total += to_float(value);
  }
  if (p.residual) x = at<T>(p.sum, begin);  // a thread reads back only what it wrote itself
  const float mean = row_sum(total, scratch) / p.C;
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) squares += (to_float(x[c]) - mean) * (to_float(x[c]) - mean);
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch) / p.C + p.eps);
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
    const float bias = p.bias ? to_float(*at<W>(p.bias, c)) : 0.0f;
    *at<T>(p.y, begin + c) = from_float<T>((to_float(x[c]) - mean) * rstd * to_float(*at<W>(p.weight, c)) + bias);
  }
  if (threadIdx.x == 0) {
    p.mean[blockIdx.x] = mean;
    p.rstd[blockIdx.x] = rstd;
  }
}

template <class T, class W>
__global__ void __launch_bounds__(kPlainThreads) backward_plain(LayerNormBackward p) {
  float* scratch = SharedMemory().take<float>(kPlainThreads / kWarp);
  const int64_t begin = int64_t(blockIdx.x) * p.C;
  const T *x = at<T>(p.x, begin), *grad = at<T>(p.grad, begin);
  const W* weight = at<W>(p.weight, 0);
  const float mean = p.mean[blockIdx.x], rstd = p.rstd[blockIdx.x];
  float dot = 0, total = 0;
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
    const float scaled = to_float(grad[c]) * to_float(weight[c]);
    total += scaled;
    dot += scaled * (to_float(x[c]) - mean) * rstd;
  }
  total = row_sum(total, scratch) / p.C;
  dot = row_sum(dot, scratch) / p.C;
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
    const float normed = (to_float(x[c]) - mean) * rstd;
    const float from_norm = (to_float(grad[c]) * to_float(weight[c]) - total - normed * dot) * rstd;
    const float other = p.grad_sum ? to_float(*at<T>(p.grad_sum, begin + c)) : 0.0f;
    *at<T>(p.grad_x, begin + c) = from_float<T>(from_norm + other);
  }
}

// A thread per column, a block per chunk of rows: one partial sum of the weight gradients.
template <class T>
__global__ void __launch_bounds__(kPlainThreads) partial_plain(LayerNormBackward p) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, chunk = blockIdx.y, chunks = gridDim.y;
  if (c >= p.C) return;
  float sum_weight = 0, sum_bias = 0;
  for (int64_t row = p.rows * chunk / chunks; row < p.rows * (chunk + 1) / chunks; ++row) {
    const float dy = to_float(*at<T>(p.grad, row * p.C + c));
    sum_weight += dy * (to_float(*at<T>(p.x, row * p.C + c)) - p.mean[row]) * p.rstd[row];
    sum_bias += dy;
  }
  p.partial[(chunk * 2 + 0) * p.C + c] = sum_weight;
  p.partial[(chunk * 2 + 1) * p.C + c] = sum_bias;
}

// 2 C columns: the weight's gradient, then the bias'.
template <class W>
__global__ void __launch_bounds__(kPartialThreads) finish_weights(LayerNormBackward p, int64_t partials) {
  const float total = column_sum(p.partial, partials, 2 * p.C);
  const int64_t column = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  if (threadIdx.y > 0 || column >= 2 * p.C) return;
  void* to = column < p.C ? p.grad_weight : p.grad_bias;
  if (to) *at<W>(to, column < p.C ? column : column - p.C) = from_float<W>(total);
}

// --- host --------------------------------------------------------------------------------------------------------------

bool vectorizes(int64_t C, DType dtype, std::initializer_list<const void*> pointers) {
  if (C > kMaxC || C % (dtype == DType::f32 ? kVector<float> : kVector<__half>) != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(), aligned);
}

dim3 row_block(int64_t C) {
  const unsigned warps = static_cast<unsigned>(ceil_div(C, kElements * kWarp));
  return dim3(warps * kWarp, warps == 1 ? kRowsPerBlock : 1);
}

template <class T, class W>
void forward(const LayerNormForward& p, const Launch& at) {
  const dim3 block = row_block(p.C);
  if (vectorizes(p.C, p.dtype, {p.x, p.residual, p.weight, p.bias, p.sum, p.y})) {
    const auto blocks = grid_size(ceil_div(p.rows, block.y));
    launch(at, forward_vector<T, W>, blocks, block, kMaxThreads / kWarp * sizeof(float), p);
  } else {
    const size_t shared = kPlainThreads / kWarp * sizeof(float);
    launch(at, forward_plain<T, W>, grid_size(p.rows), kPlainThreads, shared, p);
  }
}

template <class T, class W>
void backward(const LayerNormBackward& p, const Launch& at) {
  const int64_t partials = p.rows ? layer_norm_partials(p.rows, p.C, at.multiprocessors) : 0;
  if (partials && vectorizes(p.C, p.dtype, {p.grad, p.grad_sum, p.x, p.weight, p.grad_x})) {
    const dim3 block = row_block(p.C);
    const size_t shared = (kMaxThreads / kWarp + (block.y > 1 ? block.y * p.C : 0)) * sizeof(float);
    launch(at, backward_vector<T, W>, static_cast<unsigned>(partials), block, shared, p);
  } else if (partials) {
    const size_t shared = kPlainThreads / kWarp * sizeof(float);
    launch(at, backward_plain<T, W>, grid_size(p.rows), kPlainThreads, shared, p);
    const auto columns = grid_size(ceil_div(p.C, kPlainThreads));
    launch(at, partial_plain<T>, dim3(columns, static_cast<unsigned>(partials)), kPlainThreads, 0, p);
  }
  launch(at, finish_weights<W>, grid_size(ceil_div(2 * p.C, kWarp)), dim3(kWarp, kPartialThreads / kWarp),
         kPartialShared, p, partials);
}

}  // namespace

int64_t layer_norm_partials(int64_t rows, int64_t C, int multiprocessors) {
  return std::clamp<int64_t>(ceil_div(rows, row_block(C).y), 1, 2 * int64_t(multiprocessors));
}

void layer_norm_forward(const LayerNormForward& p, const Launch& at) {
  if (p.rows == 0) return;
  const bool mixed = p.weight_dtype != p.dtype;
  if (p.dtype == DType::f32) return forward<float, float>(p, at);
  if (p.dtype == DType::bf16) return mixed ? forward<__nv_bfloat16, float>(p, at) : forward<__nv_bfloat16, __nv_bfloat16>(p, at);
  return mixed ? forward<__half, float>(p, at) : forward<__half, __half>(p, at);
}

void layer_norm_backward(const LayerNormBackward& p, const Launch& at) {
  const bool mixed = p.weight_dtype != p.dtype;
  if (p.dtype == DType::f32) return backward<float, float>(p, at);
  if (p.dtype == DType::bf16) return mixed ? backward<__nv_bfloat16, float>(p, at) : backward<__nv_bfloat16, __nv_bfloat16>(p, at);
  return mixed ? backward<__half, float>(p, at) : backward<__half, __half>(p, at);
}

}  // namespace pygpt::cuda
