// Causal attention on CUDA for what the tensor-core kernels do not serve: float32, odd head dimensions, head dimensions
// above 128, rows that are not at multiples of 16 bytes. Right rather than fast.
//
// A warp owns one row (a query, or a key in grad_keys) and its sums, each thread every 32nd element; the block's 8 warps
// stage 32 columns at a time in shared memory as float32. One thread per column makes the scores. With few queries the keys
// are split over blocks, as in attention.cu.

#include "cuda/attention.h"
#include "cuda/shared.h"
#include "cuda/warp.h"

namespace pygpt::cuda {
namespace {

constexpr int kRows = 8;      // of a block, one per warp
constexpr int kColumns = 32;  // of a step, one per thread of a warp
constexpr int kThreads = kRows * kWarp;
constexpr int kElements = kMaxHeadDim / kWarp;  // of a row, per thread
constexpr float kNegativeInfinity = -__builtin_huge_valf();

// `count` rows of a head from row `begin`, zeros beyond `rows`. A row takes D + 1 floats, to keep columns in other banks.
template <class T>
__device__ void stage(float* to, const Heads& x, int b, int h, int begin, int rows, int count, int D) {
  const T* head = static_cast<const T*>(x.data) + b * x.batch + h * x.head;
  for (int i = threadIdx.x; i < count * D; i += kThreads) {
    const int row = i / D, d = i % D;
    to[row * (D + 1) + d] = begin + row < rows ? to_float(head[(begin + row) * x.token + d]) : 0.0f;
  }
}

__device__ float dot(const float* a, const float* b, int D) {
  float sum = 0;
  for (int d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

// sum[d] += weight of column c * columns[c][d], for the 32 columns of a step.
__device__ void add_weighted(float (&sum)[kElements], float weight, const float* columns, int D) {
  const int lane = threadIdx.x % kWarp;
  for (int c = 0; c < kColumns; ++c) {
    const float w = __shfl_sync(kWholeWarp, weight, c);
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      if (lane + i * kWarp < D) sum[i] += w * columns[c * (D + 1) + lane + i * kWarp];
  }
}

template <class T>
__device__ void store_row(const float (&sum)[kElements], const Heads& x, int b, int h, int row, int D, float factor) {
  T* to = static_cast<T*>(x.data) + b * x.batch + h * x.head + row * x.token;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int d = threadIdx.x % kWarp + i * kWarp;
    if (d < D) to[d] = from_float<T>(sum[i] * factor);
  }
}

__device__ float kept(const Dropout& dropout, int head, int query, int key) {
  if (!dropout.seed) return 1.0f;
  const Words words = dropout_words(static_cast<uint64_t>(*dropout.seed), head, query, key);
  const int word = key / 16 % 4;
  const uint32_t bits = word == 0 ? words.at[0] : word == 1 ? words.at[1] : word == 2 ? words.at[2] : words.at[3];
  return bits >= dropout.threshold ? dropout.kept_scale : 0.0f;
}

struct Place {  // of a block and a warp in the problem
  int head, b, h, first, row, warp, lane, shift;
  // The blocks with the most to do come first: the last queries, or the first keys.
  __device__ Place(const Attention& p, bool last_first)
      : head(blockIdx.x % (p.B * p.H)),
        b(head / p.H),
        h(head % p.H),
        first((last_first ? (gridDim.x - 1 - blockIdx.x) / (p.B * p.H) : blockIdx.x / (p.B * p.H)) * kRows),
        row(first + threadIdx.x / kWarp),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp),
        shift(p.S - p.T) {}
  // The first of the keys that the block's queries see, down to a step; and one past the last.
  __device__ int first_step(const Attention& p) const { return first_key(p, b, first) / kColumns * kColumns; }
  __device__ int last_key(const Attention& p) const { return first + kRows + shift < p.S ? first + kRows + shift : p.S; }
};

template <class T>
__global__ void __launch_bounds__(kThreads) forward(Attention p) {
  SharedMemory shared;
  float* rows = shared.take<float>(kRows * (p.D + 1));
  float* keys = shared.take<float>(kColumns * (p.D + 1));
  float* values = shared.take<float>(kColumns * (p.D + 1));
  const Place at(p, true);
  stage<T>(rows, p.q, at.b, at.h, at.first, p.T, kRows, p.D);
  const int start = first_key(p, at.b, at.row);
  float out[kElements] = {}, largest = kNegativeInfinity, total = 0;
  const int first_step = at.first_step(p), split = blockIdx.y;
  const int steps = (at.last_key(p) - first_step + kColumns - 1) / kColumns;
  const int begin = first_step + static_cast<int>(int64_t(steps) * split / p.splits) * kColumns;
  const int end = first_step + static_cast<int>(int64_t(steps) * (split + 1) / p.splits) * kColumns;
  for (int key = begin; key < end; key += kColumns) {
    stage<T>(keys, p.k, at.b, at.h, key, p.S, kColumns, p.D);
    stage<T>(values, p.v, at.b, at.h, key, p.S, kColumns, p.D);
    __syncthreads();
    const int j = key + at.lane;
    const bool visible = j >= start && j <= at.row + at.shift && j < p.S;
    const float score = visible ? dot(rows + at.warp * (p.D + 1), keys + at.lane * (p.D + 1), p.D) * p.scale : kNegativeInfinity;
    const float now = fmaxf(largest, warp_max(score));
    const float base = now == kNegativeInfinity ? 0.0f : now;  // nothing seen yet: exp(-inf) is 0 all the same
    const float rescale = expf(largest - base), weight = expf(score - base);
    largest = now;
    total = total * rescale + warp_sum(weight);
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] *= rescale;
    add_weighted(out, weight * kept(p.dropout, at.head, at.row, j), values, p.D);
    __syncthreads();
  }
  if (at.row >= p.T) return;
  const bool empty = total == 0;  // a split may hold no key that the query sees
  const float inverse = empty ? 0.0f : 1.0f / total, lse = empty ? kNegativeInfinity : largest + logf(total);
  const int64_t row = (int64_t(p.splits > 1 ? split : 0) * p.B * p.H + at.head) * p.T + at.row;
  if (at.lane == 0) (p.splits == 1 ? p.lse : p.partial_lse)[row] = lse;
  if (p.splits == 1) return store_row<T>(out, p.out, at.b, at.h, at.row, p.D, inverse);
#pragma unroll
  for (int i = 0; i < kElements; ++i)
    if (at.lane + i * kWarp < p.D) p.partial_out[row * p.D + at.lane + i * kWarp] = out[i] * inverse;
}

template <class T>
__global__ void __launch_bounds__(kThreads) grad_queries(Attention p) {
  SharedMemory shared;
  float* rows = shared.take<float>(kRows * (p.D + 1));
  float* grads = shared.take<float>(kRows * (p.D + 1));
  float* keys = shared.take<float>(kColumns * (p.D + 1));
  float* values = shared.take<float>(kColumns * (p.D + 1));
  const Place at(p, true);
  stage<T>(rows, p.q, at.b, at.h, at.first, p.T, kRows, p.D);
  stage<T>(grads, p.grad, at.b, at.h, at.first, p.T, kRows, p.D);
  const int64_t statistics = int64_t(at.head) * p.T + (at.row < p.T ? at.row : 0);
  const float lse = p.lse[statistics], delta = p.delta[statistics];
  const int start = first_key(p, at.b, at.row);
  float sum[kElements] = {};
  for (int key = at.first_step(p); key < at.last_key(p); key += kColumns) {
    stage<T>(keys, p.k, at.b, at.h, key, p.S, kColumns, p.D);
    stage<T>(values, p.v, at.b, at.h, key, p.S, kColumns, p.D);
    __syncthreads();
    const int j = key + at.lane;
    float weight = 0;
    if (j >= start && j <= at.row + at.shift && at.row < p.T) {
      weight = expf(dot(rows + at.warp * (p.D + 1), keys + at.lane * (p.D + 1), p.D) * p.scale - lse);
      const float through = dot(grads + at.warp * (p.D + 1), values + at.lane * (p.D + 1), p.D);
      weight *= through * kept(p.dropout, at.head, at.row, j) - delta;
    }
    add_weighted(sum, weight, keys, p.D);
    __syncthreads();
  }
  if (at.row < p.T) store_row<T>(sum, p.grad_q, at.b, at.h, at.row, p.D, p.scale);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) grad_keys(Attention p) {
  SharedMemory shared;
  float* keys = shared.take<float>(kRows * (p.D + 1));
  float* values = shared.take<float>(kRows * (p.D + 1));
  float* queries = shared.take<float>(kColumns * (p.D + 1));
  float* grads = shared.take<float>(kColumns * (p.D + 1));
  const Place at(p, false);
  stage<T>(keys, p.k, at.b, at.h, at.first, p.S, kRows, p.D);
  stage<T>(values, p.v, at.b, at.h, at.first, p.S, kRows, p.D);
  float sum_k[kElements] = {}, sum_v[kElements] = {};
  const int last = queries_from_before(p, at.b, at.first + kRows), mine = queries_from_before(p, at.b, at.row + 1);
  for (int query = at.first > at.shift ? at.first - at.shift : 0; query < last; query += kColumns) {
    stage<T>(queries, p.q, at.b, at.h, query, p.T, kColumns, p.D);
    stage<T>(grads, p.grad, at.b, at.h, query, p.T, kColumns, p.D);
    __syncthreads();
    const int i = query + at.lane;
    float for_v = 0, for_k = 0;
    if (i < mine && at.row <= i + at.shift) {
      const int64_t statistics = int64_t(at.head) * p.T + i;
      const float score = dot(keys + at.warp * (p.D + 1), queries + at.lane * (p.D + 1), p.D) * p.scale;
      const float weight = expf(score - p.lse[statistics]), keep = kept(p.dropout, at.head, i, at.row);
      const float through = dot(values + at.warp * (p.D + 1), grads + at.lane * (p.D + 1), p.D);
      for_v = weight * keep;
      for_k = weight * (through * keep - p.delta[statistics]);
    }
    add_weighted(sum_v, for_v, grads, p.D);
    add_weighted(sum_k, for_k, queries, p.D);
    __syncthreads();
  }
  if (at.row >= p.S) return;
  store_row<T>(sum_k, p.grad_k, at.b, at.h, at.row, p.D, p.scale);
  store_row<T>(sum_v, p.grad_v, at.b, at.h, at.row, p.D, 1.0f);
}

size_t shared_bytes(int rows, int D) {
  return rows * (D + 1) * sizeof(float) + 4 * 16;  // at most four arrays, each rounded up to 16 bytes
}

template <class T>
void run_forward(const Attention& p, const Launch& at) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.T, kRows) * p.B * p.H), static_cast<unsigned>(p.splits));
  launch(at, forward<T>, grid, kThreads, shared_bytes(kRows + 2 * kColumns, p.D), p);
}

template <class T>
void run_backward(const Attention& p, const Launch& at) {
  const auto heads = static_cast<unsigned>(p.B * p.H);
  const size_t shared = shared_bytes(2 * kRows + 2 * kColumns, p.D);
  launch(at, grad_keys<T>, static_cast<unsigned>(ceil_div(p.S, kRows)) * heads, kThreads, shared, p);
  launch(at, grad_queries<T>, static_cast<unsigned>(ceil_div(p.T, kRows)) * heads, kThreads, shared, p);
}

}  // namespace

void attention_plain_forward(const Attention& p, const Launch& at) {
  if (p.dtype == DType::f32) return run_forward<float>(p, at);
  if (p.dtype == DType::bf16) return run_forward<__nv_bfloat16>(p, at);
  return run_forward<__half>(p, at);
}

void attention_plain_backward(const Attention& p, const Launch& at) {
  if (p.dtype == DType::f32) return run_backward<float>(p, at);
  if (p.dtype == DType::bf16) return run_backward<__nv_bfloat16>(p, at);
  return run_backward<__half>(p, at);
}

}  // namespace pygpt::cuda
