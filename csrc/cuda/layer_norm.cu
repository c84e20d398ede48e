// layer_norm and add_layer_norm on CUDA.
//
// Up to C = 12,288 a row lives in the registers of the threads that share it, read once by 16-byte loads. A row of up to
// 512 or 768 elements belongs to one warp, four rows to a block, so that no barrier is needed; a longer one has a block to
// itself. Other widths and pointers that are not 16-byte aligned take the plain kernels at the end.
//
// Weight gradients: each block walks over every gridDim-th group of rows with sums in registers, and asks for the next
// row before it works on this one. It writes one partial sum, and a second small kernel adds the partials in order. No
// atomics: the same bits every time.

#include "cuda/layer_norm.h"

#include <algorithm>

#include "cuda/partials.h"
#include "cuda/shared.h"
#include "cuda/warp.h"

namespace pygpt::cuda {
namespace {

constexpr int kRowsPerBlock = 4;  // where a row is one warp
constexpr int kPlainThreads = 256;

// A kernel's blocks have up to so many threads: where a row of 16 bits is one warp, as GPT-2's, where it is a block, and for
// more than 4,096 elements, which leave no registers to read ahead.
constexpr int kWarpRow = 128, kBlockRow = 256, kLongRow = 512;
__host__ __device__ constexpr int elements(int threads) {  // of a row, held by a thread
  return threads == kBlockRow ? 16 : 24;
}
constexpr int64_t kMaxC = int64_t(kLongRow) * elements(kLongRow);

// Warps of the backward kernel for which a multiprocessor has the registers.
constexpr int resident_warps(int threads, size_t element_bytes) {
  return threads == kWarpRow ? 12 : threads == kBlockRow && element_bytes == 4 ? 8 : 16;
}

// A row in registers: E elements a thread, each 16-byte access as far from the last as the row has threads.
template <class T, int E>
struct Row {
  static constexpr int V = kVector<T>, N = E / V;
  Vector<T, V> part[N];

  __device__ static int column(int i) { return static_cast<int>((i * blockDim.x + threadIdx.x) * V); }

  __device__ void load(const T* row, int i) { part[i] = cuda::load<V>(row + column(i)); }
  __device__ void load_all(const T* row, int C) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (column(i) < C) load(row, i);
  }
};

template <class T>
__device__ const T* at(const void* p, int64_t offset) {
  return static_cast<const T*>(p) + offset;
}
template <class T>
__device__ T* at(void* p, int64_t offset) {
  return static_cast<T*>(p) + offset;
}

// Sums over the threads of a row: a warp of a block of several rows, or else the whole block. The caller does not use the
// same scratch twice in a row.
template <int N>
__device__ void row_sums(float (&x)[N], float* scratch) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp * N + n] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = 0;
  for (int warp = 0; warp < warps; ++warp)
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] += scratch[warp * N + n];
}

__device__ float row_sum(float x, float* scratch) {
  float sum[] = {x};
  row_sums(sum, scratch);
  return sum[0];
}

constexpr int kScratch = 2 * 2 * kLongRow / kWarp;  // floats: two sums of each warp, of two rows

template <int Threads, class T, class W>
__global__ void __launch_bounds__(Threads) forward_vector(LayerNormForward p) {
  constexpr int E = elements(Threads), V = kVector<T>, N = E / V;
  float* scratch = SharedMemory().take<float>(kScratch);
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // only in blocks of several rows, which have no barrier
  const int64_t begin = row * p.C;
  const int C = static_cast<int>(p.C);

  Row<T, E> x;
  x.load_all(at<T>(p.x, begin), C);
  if (p.residual) {
    Row<T, E> residual;
    residual.load_all(at<T>(p.residual, begin), C);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (x.column(i) >= C) continue;
#pragma unroll
      for (int j = 0; j < V; ++j)
        x.part[i].set(j, x.part[i].get(j) + residual.part[i].get(j));  // rounded, as in two eager ops
      store(at<T>(p.sum, begin + x.column(i)), x.part[i]);
    }
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (x.column(i) >= C) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) total += x.part[i].get(j);
  }
  const float mean = row_sum(total, scratch) / C;

  float squares = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (x.column(i) >= C) continue;
#pragma unroll
    for (int j = 0; j < V; ++j) squares += (x.part[i].get(j) - mean) * (x.part[i].get(j) - mean);
  }
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch + kScratch / 2) / C + p.eps);

#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int c = x.column(i);
    if (c >= C) continue;
    const Vector<W, V> weight = load<V>(at<W>(p.weight, c));
    Vector<W, V> bias{};
    if (p.bias) bias = load<V>(at<W>(p.bias, c));
#pragma unroll
    for (int j = 0; j < V; ++j) x.part[i].set(j, (x.part[i].get(j) - mean) * rstd * weight.get(j) + bias.get(j));
    store(at<T>(p.y, begin + c), x.part[i]);
  }
  if (threadIdx.x == 0) {
    p.mean[row] = mean;
    p.rstd[row] = rstd;
  }
}

// What the backward kernel reads of a row, but for grad_sum.
template <class T, int E>
struct BackwardRow {
  Row<T, E> grad{}, x{};
  float mean = 0, rstd = 0;

  __device__ void load(const LayerNormBackward& p, int64_t row) {
    if (row >= p.rows) return;
    grad.load_all(at<T>(p.grad, row * p.C), static_cast<int>(p.C));
    x.load_all(at<T>(p.x, row * p.C), static_cast<int>(p.C));
    mean = p.mean[row];
    rstd = p.rstd[row];
  }
};

// grad_x of every gridDim.x-th group of rows, and this block's partial sums of the weight gradients.
template <int Threads, class T, class W>
__global__ void __launch_bounds__(Threads, resident_warps(Threads, sizeof(T)) * kWarp / Threads)
    backward_vector(LayerNormBackward p) {
  constexpr int E = elements(Threads), V = kVector<T>, N = E / V;
  SharedMemory shared;
  float* scratch = shared.take<float>(kScratch);
  const int C = static_cast<int>(p.C);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  float sum_weight[E] = {}, sum_bias[E] = {};

  constexpr bool ahead = Threads != kLongRow;
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  BackwardRow<T, E> next;
  if (ahead) next.load(p, row);
  for (int turn = 0; row < p.rows; row += step, turn ^= 1) {
    const int64_t begin = row * p.C;
    auto [grad, x, mean, rstd] = next;
    if (ahead) {
      next.load(p, row + step);
    } else {
      mean = p.mean[row];
      rstd = p.rstd[row];
    }
    Row<T, E> other{};
    if (ahead && p.grad_sum) other.load_all(at<T>(p.grad_sum, begin), C);
    float sums[2] = {};  // of the gradient of the normalised row, times 1 and times that row
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = x.column(i);
      if (c >= C) continue;
      if (!ahead) {
        grad.load(at<T>(p.grad, begin), i);
        x.load(at<T>(p.x, begin), i);
      }
      const Vector<W, V> weight = load<V>(at<W>(p.weight, c));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = (x.part[i].get(j) - mean) * rstd, dy = grad.part[i].get(j);
        sum_weight[i * V + j] += dy * normed;
        sum_bias[i * V + j] += dy;
        sums[0] += dy * weight.get(j);
        sums[1] += dy * weight.get(j) * normed;
      }
    }
    row_sums(sums, scratch + turn * kScratch / 2);
    const float total = sums[0] / C, dot = sums[1] / C;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = x.column(i);
      if (c >= C) continue;
      Vector<T, V> of_sum{};
      if (ahead) of_sum = other.part[i];
      else if (p.grad_sum) of_sum = load<V>(at<T>(p.grad_sum, begin + c));
      const Vector<W, V> weight = load<V>(at<W>(p.weight, c));
      Vector<T, V> grad_x;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float normed = (x.part[i].get(j) - mean) * rstd;
        const float from_norm = (grad.part[i].get(j) * weight.get(j) - total - normed * dot) * rstd;
        grad_x.set(j, from_norm + of_sum.get(j));
      }
      store(at<T>(p.grad_x, begin + c), grad_x);
    }
  }

  // Rows of a block are added in order through shared memory; then one partial sum of each gradient leaves the block.
  float* rows = shared.take<float>(blockDim.y > 1 ? static_cast<int>(blockDim.y) * C : 0);
  float* partial = p.partial + int64_t(blockIdx.x) * 2 * C;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const auto& sum = which == 0 ? sum_weight : sum_bias;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int c = Row<T, E>::column(i);
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
  float* scratch = SharedMemory().take<float>(kScratch);
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
  const float rstd = 1.0f / sqrtf(row_sum(squares, scratch + kScratch / 2) / p.C + p.eps);
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
  float* scratch = SharedMemory().take<float>(kScratch);
  const int64_t begin = int64_t(blockIdx.x) * p.C;
  const T *x = at<T>(p.x, begin), *grad = at<T>(p.grad, begin);
  const W* weight = at<W>(p.weight, 0);
  const float mean = p.mean[blockIdx.x], rstd = p.rstd[blockIdx.x];
  float sums[2] = {};
  for (int64_t c = threadIdx.x; c < p.C; c += blockDim.x) {
    const float scaled = to_float(grad[c]) * to_float(weight[c]);
    sums[0] += scaled;
    sums[1] += scaled * (to_float(x[c]) - mean) * rstd;
  }
  row_sums(sums, scratch);
  const float total = sums[0] / p.C, dot = sums[1] / p.C;
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
  const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (threadIdx.y > 0 || column >= 2 * p.C) return;
  void* to = column < p.C ? p.grad_weight : p.grad_bias;
  if (to) *at<W>(to, column < p.C ? column : column - p.C) = from_float<W>(total);
}

// --- host --------------------------------------------------------------------------------------------------------------

bool vectorizes(int64_t C, DType dtype, std::initializer_list<const void*> pointers) {
  if (C > kMaxC || C % (dtype == DType::f32 ? kVector<float> : kVector<__half>) != 0) return false;
  return std::all_of(pointers.begin(), pointers.end(), aligned);
}

// Which kernel a row of C elements is for.
int threads_for(int64_t C, DType dtype) {
  const bool warp_row = dtype != DType::f32 && C > elements(kBlockRow) * kWarp && C <= elements(kWarpRow) * kWarp;
  return warp_row ? kWarpRow : C <= elements(kBlockRow) * kBlockRow ? kBlockRow : kLongRow;
}

dim3 row_block(int64_t C, DType dtype) {
  const auto warps = static_cast<unsigned>(ceil_div(C, elements(threads_for(C, dtype)) * kWarp));
  return dim3(warps * kWarp, warps == 1 ? kRowsPerBlock : 1);
}

template <class T, class W>
void forward(const LayerNormForward& p, const Launch& at) {
  const dim3 block = row_block(p.C, p.dtype);
  const size_t shared = kScratch * sizeof(float);
  if (vectorizes(p.C, p.dtype, {p.x, p.residual, p.weight, p.bias, p.sum, p.y})) {
    const int threads = threads_for(p.C, p.dtype);
    constexpr int kShort = sizeof(T) == 2 ? kWarpRow : kBlockRow;
    const auto kernel = threads == kShort    ? forward_vector<kShort, T, W>
                        : threads == kBlockRow ? forward_vector<kBlockRow, T, W>
                                               : forward_vector<kLongRow, T, W>;
    launch(at, kernel, grid_size(ceil_div(p.rows, block.y)), block, shared, p);
  } else {
    launch(at, forward_plain<T, W>, grid_size(p.rows), kPlainThreads, shared, p);
  }
}

template <class T, class W>
void backward(const LayerNormBackward& p, const Launch& at) {
  const int64_t partials = p.rows ? layer_norm_partials(p.rows, p.C, p.dtype, at.multiprocessors) : 0;
  if (partials && vectorizes(p.C, p.dtype, {p.grad, p.grad_sum, p.x, p.weight, p.grad_x})) {
    const dim3 block = row_block(p.C, p.dtype);
    const size_t shared = (kScratch + (block.y > 1 ? block.y * p.C : 0)) * sizeof(float);
    const int threads = threads_for(p.C, p.dtype);
    constexpr int kShort = sizeof(T) == 2 ? kWarpRow : kBlockRow;
    const auto kernel = threads == kShort    ? backward_vector<kShort, T, W>
                        : threads == kBlockRow ? backward_vector<kBlockRow, T, W>
                                               : backward_vector<kLongRow, T, W>;
    launch(at, kernel, static_cast<unsigned>(partials), block, shared, p);
  } else if (partials) {
    launch(at, backward_plain<T, W>, grid_size(p.rows), kPlainThreads, kScratch * sizeof(float), p);
    const auto columns = grid_size(ceil_div(p.C, kPlainThreads));
    launch(at, partial_plain<T>, dim3(columns, static_cast<unsigned>(partials)), kPlainThreads, 0, p);
  }
  const dim3 finish = partial_block(2 * p.C);
  launch(at, finish_weights<W>, grid_size(ceil_div(2 * p.C, finish.x)), finish, kPartialShared, p, partials);
}

}  // namespace

int64_t layer_norm_partials(int64_t rows, int64_t C, DType dtype, int multiprocessors) {
  const dim3 block = row_block(C, dtype);
  const int warps = resident_warps(threads_for(C, dtype), dtype == DType::f32 ? 4 : 2);
  const int64_t blocks = std::max<int64_t>(1, warps * kWarp / (block.x * block.y)) * multiprocessors;
  return std::clamp<int64_t>(ceil_div(rows, block.y), 1, blocks);
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
