// Causal attention backward on CUDA tensor cores.
//
// Two kernels, so that every gradient has one owner and the same bits come out every time, with no atomics: one with a
// block per 64 keys, which walks over the queries and sums grad_k and grad_v in registers, and one with a block per 64
// queries, which walks over the keys and sums grad_q. Both make the probabilities again from the log-sum-exp.

#include "cuda/attention.h"
#include "cuda/attention_tile.h"

namespace pygpt::cuda {
namespace {

// A step over queries: fewer where a row is wide, because two sums of 16 x D floats share the registers, and with dropout,
// whose generator needs some too.
template <int D, bool kDropout>
constexpr int kQueries = (D == 64 ? 64 : 32) / (kDropout ? 2 : 1);

// Of a warp's 16 keys and N * 8 queries: s (scores) becomes the probabilities with dropout, which grad_v is made of, and
// d (products of grad and values) becomes the gradient of the scores. No query from end_query on sees the thread's keys.
template <bool kDropout, int N>
__device__ void probabilities_by_key(const Attention& p, float (&s)[N][4], float (&d)[N][4], int head, int key, int query,
                                     const int (&end_query)[2], uint64_t seed) {
  const int lane = threadIdx.x % kWarp, shift = p.S - p.T;
  const float scale = p.scale * kLog2e;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = query + n * 8 + lane % 4 * 2 + i;
      const int64_t at = int64_t(head) * p.T + (row < p.T ? row : 0);
      const float lse = p.lse[at] * kLog2e, delta = p.delta[at];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = key + lane / 4 + half * 8;
        float& x = s[n][2 * half + i];
        float& dx = d[n][2 * half + i];
        const float weight = row < end_query[half] && j <= row + shift ? ptx::exp2_approx(x * scale - lse) : 0.0f;
        float kept = 1.0f;
        if constexpr (kDropout) {
          const Words words = dropout_words(seed, head, row, j);
          const int word = j / 16 % 4;  // the same for the whole warp
          const uint32_t bits = word == 0 ? words.at[0] : word == 1 ? words.at[1] : word == 2 ? words.at[2] : words.at[3];
          kept = bits >= p.dropout.threshold ? p.dropout.kept_scale : 0.0f;
        }
        x = weight * kept;
        dx = weight * (dx * kept - delta);
      }
    }
  }
}

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kTileThreads) grad_keys(Attention p) {
  constexpr int Q = kQueries<D, kDropout>;
  SharedMemory shared;
  const Tile<T, D> keys{shared.take<T>(kTileRows * D, 128)}, values{shared.take<T>(kTileRows * D, 128)};
  T* query_tiles = shared.take<T>(2 * Q * D, 128);
  T* grad_tiles = shared.take<T>(2 * Q * D, 128);

  const int warp = threadIdx.x / kWarp;
  const auto [head, b, h, nth] = place(p, blockIdx.x, gridDim.x / (p.B * p.H));
  const int first = nth * kTileRows, key = first + warp * 16;
  const int shift = p.S - p.T, begin = (first > shift ? first - shift : 0) / Q;
  const int end = (queries_from_before(p, b, first + kTileRows) + Q - 1) / Q, own = key + threadIdx.x % kWarp / 4;
  const int end_query[2] = {queries_from_before(p, b, own + 1), queries_from_before(p, b, own + 9)};

  const T *q = head_of<T>(p.q, b, h), *grad = head_of<T>(p.grad, b, h);
  const auto fetch = [&](int tile) {
    const int stage = tile % 2 * Q * D;
    Tile<T, D>{query_tiles + stage}.template copy_from<Q>(q, p.q.token, tile * Q, p.T, p.D);
    Tile<T, D>{grad_tiles + stage}.template copy_from<Q>(grad, p.grad.token, tile * Q, p.T, p.D);
  };
  keys.template copy_from<kTileRows>(head_of<T>(p.k, b, h), p.k.token, first, p.S, p.D);
  values.template copy_from<kTileRows>(head_of<T>(p.v, b, h), p.v.token, first, p.S, p.D);
  fetch(begin);
  ptx::cp_async_commit();

  float grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {};
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and everybody has left the stage that the next one overwrites
    if (tile + 1 < end) fetch(tile + 1);
    ptx::cp_async_commit();

    const Tile<T, D> queries{query_tiles + tile % 2 * Q * D}, grads{grad_tiles + tile % 2 * Q * D};
    float s[Q / 8][4] = {}, d[Q / 8][4] = {};
#pragma unroll 4  // all eight of a wide row spill on sm_100
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[4];
      load_a(a, keys, warp * 16, step);
      multiply_by_rows(s, a, queries, 0, step);
      load_a(a, values, warp * 16, step);
      multiply_by_rows(d, a, grads, 0, step);
    }
    probabilities_by_key<kDropout>(p, s, d, head, key, tile * Q, end_query, seed);
#pragma unroll
    for (int step = 0; step < Q / 16; ++step) {
      uint32_t a[4];
      to_a<T>(a, s, step);
      multiply_by_columns(grad_v, a, grads, step * 16);
      to_a<T>(a, d, step);
      multiply_by_columns(grad_k, a, queries, step * 16);
    }
  }
  ptx::cp_async_wait<0>();
  store_rows(grad_k, head_of<T>(p.grad_k, b, h), p.grad_k.token, key, p.S, p.D, p.scale);
  store_rows(grad_v, head_of<T>(p.grad_v, b, h), p.grad_v.token, key, p.S, p.D, 1.0f);
}

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kTileThreads) grad_queries(Attention p) {
  SharedMemory shared;
  const Tile<T, D> queries{shared.take<T>(kTileRows * D, 128)}, grads{shared.take<T>(kTileRows * D, 128)};
  T* key_tiles = shared.take<T>(2 * kKeys * D, 128);
  T* value_tiles = shared.take<T>(2 * kKeys * D, 128);

  const int tiles = gridDim.x / (p.B * p.H), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto [head, b, h, nth] = place(p, blockIdx.x, tiles);
  const int first = (tiles - 1 - nth) * kTileRows, row = first + warp * 16;
  const int shift = p.S - p.T, last_key = first + kTileRows + shift < p.S ? first + kTileRows + shift : p.S;
  const int begin = first_key(p, b, first) / kKeys, end = (last_key + kKeys - 1) / kKeys;

  const T *k = head_of<T>(p.k, b, h), *v = head_of<T>(p.v, b, h);
  const auto fetch = [&](int tile) {
    const int stage = tile % 2 * kKeys * D;
    Tile<T, D>{key_tiles + stage}.template copy_from<kKeys>(k, p.k.token, tile * kKeys, p.S, p.D);
    Tile<T, D>{value_tiles + stage}.template copy_from<kKeys>(v, p.v.token, tile * kKeys, p.S, p.D);
  };
  queries.template copy_from<kTileRows>(head_of<T>(p.q, b, h), p.q.token, first, p.T, p.D);
  grads.template copy_from<kTileRows>(head_of<T>(p.grad, b, h), p.grad.token, first, p.T, p.D);
  fetch(begin);
  ptx::cp_async_commit();

  const int start[2] = {first_key(p, b, row + lane / 4), first_key(p, b, row + lane / 4 + 8)};
  float lse[2], delta[2], grad_q[D / 8][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + lane / 4 + half * 8;
    const int64_t at = int64_t(head) * p.T + (query < p.T ? query : 0);
    lse[half] = p.lse[at] * kLog2e;
    delta[half] = p.delta[at];
  }
  const float scale = p.scale * kLog2e;
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < end) fetch(tile + 1);
    ptx::cp_async_commit();

    const Tile<T, D> keys{key_tiles + tile % 2 * kKeys * D}, values{value_tiles + tile % 2 * kKeys * D};
    const int key = tile * kKeys;
    float s[kKeys / 8][4] = {}, d[kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t a[4];
      load_a(a, queries, warp * 16, step);
      multiply_by_rows(s, a, keys, 0, step);
      load_a(a, grads, warp * 16, step);
      multiply_by_rows(d, a, values, 0, step);
    }
    if constexpr (kDropout) drop(d, p.dropout, seed, head, row, key);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = key + n * 8 + lane % 4 * 2 + i % 2, query = row + lane / 4 + i / 2 * 8;
        const bool visible = j >= start[i / 2] && j <= query + shift && query < p.T;
        const float weight = visible ? ptx::exp2_approx(s[n][i] * scale - lse[i / 2]) : 0.0f;
        d[n][i] = weight * (d[n][i] - delta[i / 2]);
      }
    }
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[4];
      to_a<T>(a, d, step);
      multiply_by_columns(grad_q, a, keys, step * 16);
    }
  }
  ptx::cp_async_wait<0>();
  store_rows(grad_q, head_of<T>(p.grad_q, b, h), p.grad_q.token, row, p.T, p.D, p.scale);
}

// A warp per query: the sum over D of grad * out.
template <class T>
__global__ void __launch_bounds__(kTileThreads) sum_delta(Attention p) {
  const int64_t row = int64_t(blockIdx.x) * (kTileThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= int64_t(p.B) * p.H * p.T) return;
  const int query = static_cast<int>(row % p.T), head = static_cast<int>(row / p.T);
  const T* grad = head_of<T>(p.grad, head / p.H, head % p.H) + query * p.grad.token;
  const T* out = head_of<T>(p.out, head / p.H, head % p.H) + query * p.out.token;
  float sum = 0;
  for (int d = threadIdx.x % kWarp; d < p.D; d += kWarp) sum += to_float(grad[d]) * to_float(out[d]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) p.delta[row] = sum;
}

template <class T, int D>
void run(const Attention& p, const Launch& at) {
  const bool dropout = p.dropout.seed != nullptr;
  const auto heads = static_cast<unsigned>(p.B * p.H);
  const auto key_blocks = static_cast<unsigned>(ceil_div(p.S, kTileRows)), query_blocks = static_cast<unsigned>(ceil_div(p.T, kTileRows));
  launch(at, dropout ? grad_keys<T, D, true> : grad_keys<T, D, false>, key_blocks * heads, kTileThreads,
         (2 * kTileRows + 4 * (dropout ? kQueries<D, true> : kQueries<D, false>)) * D * sizeof(T), p);
  launch(at, dropout ? grad_queries<T, D, true> : grad_queries<T, D, false>, query_blocks * heads, kTileThreads,
         (2 * kTileRows + 4 * kKeys) * D * sizeof(T), p);
}

}  // namespace

void attention_delta(const Attention& p, const Launch& at) {
  const auto blocks = static_cast<unsigned>(ceil_div(int64_t(p.B) * p.H * p.T, kTileThreads / kWarp));
  const auto kernel = p.dtype == DType::f32    ? sum_delta<float>
                      : p.dtype == DType::bf16 ? sum_delta<__nv_bfloat16>
                                               : sum_delta<__half>;
  launch(at, kernel, blocks, kTileThreads, 0, p);
}

void attention_backward(const Attention& p, const Launch& at) {
  const bool small = p.D <= 64;
  if (p.dtype == DType::bf16) return small ? run<__nv_bfloat16, 64>(p, at) : run<__nv_bfloat16, 128>(p, at);
  return small ? run<__half, 64>(p, at) : run<__half, 128>(p, at);
}

}  // namespace pygpt::cuda
