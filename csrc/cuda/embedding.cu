// Token and position embedding on CUDA.
//
// Backward sorts the token ids on the device (stable radix sort, 8 bits a pass: as many passes as the vocabulary needs),
// then sums each run of equal ids. A run is summed in order, by chunks of 16; what crosses a chunk's border goes through a
// float32 partial sum. No atomics on floats and no word to the host: the same bits every time, and fit for graph capture.
//
// A token id outside [0, V) reads nothing: its output row is NaN, and it has no gradient.

#include "cuda/embedding.h"

#include <algorithm>
#include <bit>

#include "cuda/shared.h"
#include "cuda/warp.h"

namespace pygpt::cuda {
namespace {

constexpr int kDigits = 256;      // of a pass of the sort: one thread each
constexpr int kTile = 1024;       // ids that a block sorts
constexpr int kScanThreads = 1024;
constexpr int kChunk = 16;        // sorted ids whose rows a block sums
constexpr int kMaxColumns = 256;  // threads across a row

template <class T, int V>
__global__ void __launch_bounds__(kMaxColumns) gather(EmbeddingForward p) {
  const int64_t row = blockIdx.x, c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= p.C) return;
  const int64_t id = p.idx[row];
  Vector<T, V> x;
  if (id >= 0 && id < p.V) {
    x = load<V>(static_cast<const T*>(p.token_table) + id * p.C + c);
    if (p.position_table) {
      const int64_t at = p.position_offset + row % p.T;
      const Vector<T, V> position = load<V>(static_cast<const T*>(p.position_table) + at * p.C + c);
#pragma unroll
      for (int i = 0; i < V; ++i) x.set(i, x.get(i) + position.get(i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) x.set(i, __int_as_float(0x7fc00000));
  }
  store(static_cast<T*>(p.out) + row * p.C + c, x);
}

// --- stable sort of (id, place) by id -------------------------------------------------------------------------------

struct Pass {
  const int64_t* idx;  // the first pass reads the ids themselves: id i has place i
  const int32_t *keys, *places;
  int32_t *sorted_keys, *sorted_places, *counts;
  int count, V, shift;

  __device__ int key(int i) const {
    if (!idx) return keys[i];
    const int64_t id = idx[i];
    return id >= 0 && id < V ? static_cast<int>(id) : V;  // ids out of range go last
  }
  __device__ int digit(int key) const { return key >> shift & (kDigits - 1); }
};

// The keys of a block's tile, in shared memory.
__device__ int load_tile(const Pass& pass, int* tile) {
  const int begin = blockIdx.x * kTile, size = pass.count - begin < kTile ? pass.count - begin : kTile;
  for (int i = threadIdx.x; i < size; i += kDigits) tile[i] = pass.key(begin + i);
  __syncthreads();
  return size;
}

// counts[digit][tile]: each thread counts its own digit.
__global__ void __launch_bounds__(kDigits) count_digits(Pass pass) {
  int* tile = SharedMemory().take<int>(kTile);
  const int size = load_tile(pass, tile), mine = threadIdx.x;
  int count = 0;
  for (int i = 0; i < size; ++i) count += pass.digit(tile[i]) == mine;
  pass.counts[mine * gridDim.x + blockIdx.x] = count;
}

// Turns counts into where each (digit, tile) begins: an exclusive sum, by one block.
__global__ void __launch_bounds__(kScanThreads) scan_counts(int32_t* counts, int size) {
  int* sums = SharedMemory().take<int>(kScanThreads / kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int before = 0;  // the sum of all earlier turns
  for (int begin = 0; begin < size; begin += kScanThreads) {
    const int i = begin + threadIdx.x, mine = i < size ? counts[i] : 0;
    int sum = mine;  // up to and with this thread, within the warp
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int left = __shfl_up_sync(kWholeWarp, sum, step);
      if (lane >= step) sum += left;
    }
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    int earlier_warps = 0, all_warps = 0;
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w < warp) earlier_warps += sums[w];
      all_warps += sums[w];
    }
    if (i < size) counts[i] = before + earlier_warps + sum - mine;
    before += all_warps;
    __syncthreads();
  }
}

// Each thread moves the keys of its own digit, in order.
__global__ void __launch_bounds__(kDigits) scatter_keys(Pass pass) {
  int* tile = SharedMemory().take<int>(kTile);
  const int size = load_tile(pass, tile), mine = threadIdx.x, begin = blockIdx.x * kTile;
  int at = pass.counts[mine * gridDim.x + blockIdx.x];
  for (int i = 0; i < size; ++i) {
    if (pass.digit(tile[i]) != mine) continue;
    pass.sorted_keys[at] = tile[i];
    pass.sorted_places[at++] = pass.idx ? begin + i : pass.places[begin + i];
  }
}

// --- sums over runs of equal ids ------------------------------------------------------------------------------------

template <int V, class G>
__device__ void add_to(G* to, const float (&sum)[V]) {
  Vector<G, V> total = load<V>(to);
#pragma unroll
  for (int i = 0; i < V; ++i) total.set(i, total.get(i) + sum[i]);
  store(to, total);
}

// Of each chunk of sorted ids: runs that lie in it whole are added to their rows. The part of a run that came from the
// chunk before goes to partial 0, the beginning of one that goes on in the next chunk to partial 1.
template <class T, class G, int V>
__global__ void __launch_bounds__(kMaxColumns) sum_chunks(EmbeddingBackward p, const int32_t* keys, const int32_t* places) {
  const int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= p.C) return;
  const int64_t begin = int64_t(blockIdx.x) * kChunk, end = begin + kChunk < p.tokens ? begin + kChunk : p.tokens;
  float sum[V] = {};
  bool came = begin > 0 && keys[begin - 1] == keys[begin];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t key = keys[i];
    if (key == p.V) return;
    const Vector<T, V> grad = load<V>(static_cast<const T*>(p.grad) + places[i] * p.C + c);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += grad.get(j);
    const bool goes_on = i + 1 < p.tokens && keys[i + 1] == key;
    if (goes_on && i + 1 < end) continue;
    if (came || goes_on) {
      float* partial = p.partial + (int64_t(blockIdx.x) * 2 + (came ? 0 : 1)) * p.C + c;
#pragma unroll
      for (int j = 0; j < V; ++j) partial[j] = sum[j];
    } else {
      add_to<V>(static_cast<G*>(p.token_grad) + key * p.C + c, sum);
    }
    came = false;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
  }
}

// The chunk in which a run begins adds up the partial sums of the chunks that it crosses.
template <class G, int V>
__global__ void __launch_bounds__(kMaxColumns) sum_crossing(EmbeddingBackward p, const int32_t* keys) {
  const int64_t c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const int64_t begin = int64_t(blockIdx.x) * kChunk;
  int64_t end = begin + kChunk;
  if (c >= p.C || end >= p.tokens) return;
  const int32_t key = keys[end];
  const bool begins_here = keys[end - 1] == key && (keys[begin] != key || begin == 0 || keys[begin - 1] != key);
  if (!begins_here || key == p.V) return;
  float sum[V];
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] = p.partial[(int64_t(blockIdx.x) * 2 + 1) * p.C + c + j];
  for (; end < p.tokens && keys[end] == key && keys[end - 1] == key; end += kChunk) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += p.partial[end / kChunk * 2 * p.C + c + j];
  }
  add_to<V>(static_cast<G*>(p.token_grad) + key * p.C + c, sum);
}

// A block per position: over the batch, in order.
template <class T, class G, int V>
__global__ void __launch_bounds__(kMaxColumns) sum_positions(EmbeddingBackward p) {
  const int64_t t = blockIdx.x, c = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  if (c >= p.C) return;
  float sum[V] = {};
  for (int64_t row = t; row < p.tokens; row += p.T) {
    const Vector<T, V> grad = load<V>(static_cast<const T*>(p.grad) + row * p.C + c);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += grad.get(j);
  }
  add_to<V>(static_cast<G*>(p.position_grad) + (p.position_offset + t) * p.C + c, sum);
}

// --- host ------------------------------------------------------------------------------------------------------------

dim3 columns_grid(int64_t rows, int64_t C, int V, dim3& block) {
  const int64_t vectors = ceil_div(C, V);
  block = dim3(static_cast<unsigned>(std::min<int64_t>(ceil_div(vectors, kWarp) * kWarp, kMaxColumns)));
  return dim3(grid_size(rows), grid_size(ceil_div(vectors, block.x)));
}

template <class T, int V>
void forward(const EmbeddingForward& p, const Launch& at) {
  dim3 block;
  const dim3 grid = columns_grid(p.tokens, p.C, V, block);
  launch(at, gather<T, V>, grid, block, 0, p);
}

template <class T>
void forward(const EmbeddingForward& p, const Launch& at) {
  const bool wide = p.C % kVector<T> == 0 && aligned(p.token_table) && aligned(p.position_table) && aligned(p.out);
  wide ? forward<T, kVector<T>>(p, at) : forward<T, 1>(p, at);
}

// Returns which of the two scratch arrays holds the sorted ids.
int sort(const EmbeddingBackward& p, const Launch& at) {
  const auto tiles = static_cast<unsigned>(ceil_div(p.tokens, kTile));
  const int bits = std::bit_width(static_cast<uint64_t>(p.V));  // the largest key is V itself
  int from = 1;
  for (int shift = 0; shift < bits; shift += 8, from ^= 1) {
    const Pass pass{shift ? nullptr : p.idx, p.keys[from], p.places[from], p.keys[from ^ 1], p.places[from ^ 1],
                    p.counts,                static_cast<int>(p.tokens),   static_cast<int>(p.V), shift};
    launch(at, count_digits, tiles, kDigits, kTile * sizeof(int), pass);
    launch(at, scan_counts, 1, kScanThreads, kScanThreads / kWarp * sizeof(int), p.counts, static_cast<int>(tiles * kDigits));
    launch(at, scatter_keys, tiles, kDigits, kTile * sizeof(int), pass);
  }
  return from;
}

template <class T, class G, int V>
void backward(const EmbeddingBackward& p, const Launch& at) {
  dim3 block;
  if (p.position_grad) launch(at, sum_positions<T, G, V>, columns_grid(p.T, p.C, V, block), block, 0, p);
  const int sorted = sort(p, at);
  const dim3 grid = columns_grid(embedding_chunks(p.tokens), p.C, V, block);
  launch(at, sum_chunks<T, G, V>, grid, block, 0, p, p.keys[sorted], p.places[sorted]);
  launch(at, sum_crossing<G, V>, grid, block, 0, p, p.keys[sorted]);
}

template <class T, class G>
void backward(const EmbeddingBackward& p, const Launch& at) {
  const bool wide = p.C % kVector<T> == 0 && aligned(p.grad) && aligned(p.token_grad) && aligned(p.position_grad);
  wide ? backward<T, G, kVector<T>>(p, at) : backward<T, G, 1>(p, at);
}

}  // namespace

int64_t embedding_counts(int64_t tokens) { return ceil_div(tokens, kTile) * kDigits; }
int64_t embedding_chunks(int64_t tokens) { return ceil_div(tokens, kChunk); }

void embedding_forward(const EmbeddingForward& p, const Launch& at) {
  if (p.tokens == 0 || p.C == 0) return;
  if (p.dtype == DType::f32) return forward<float>(p, at);
  if (p.dtype == DType::bf16) return forward<__nv_bfloat16>(p, at);
  return forward<__half>(p, at);
}

void embedding_backward(const EmbeddingBackward& p, const Launch& at) {
  if (p.tokens == 0 || p.C == 0) return;
  const bool mixed = p.table_dtype != p.dtype;
  if (p.dtype == DType::f32) return backward<float, float>(p, at);
  if (p.dtype == DType::bf16) return mixed ? backward<__nv_bfloat16, float>(p, at) : backward<__nv_bfloat16, __nv_bfloat16>(p, at);
  return mixed ? backward<__half, float>(p, at) : backward<__half, __half>(p, at);
}

}  // namespace pygpt::cuda
