// Causal attention forward on Hopper's tensor cores (sm_90a only), after FlashAttention-3 (Shah et al., 2024): a warp that
// does nothing but load, two warpgroups that compute, and in each the softmax of one tile beside the products of the next.
//
// There is a block per multiprocessor. It takes 128 queries of one head, a warpgroup 64 of them, walks over the keys 128 at a
// time, and goes on with other queries. Q, K and V arrive by TMA through rings of stages in shared memory; each stage has a
// barrier that it is full and one that it is empty. S and P never leave the registers.

#include "cuda/attention_hopper.h"

namespace pygpt::cuda {
namespace {

// What a thread knows of its two queries, row + lane / 4 and 8 further, row being its warp's first.
struct Rows {
  int row, shift, start[2], last_start;  // shift: query i sees keys start .. i + shift; last_start: the warp's largest
  float scale;                           // of base 2
  float largest[2] = {kNegativeInfinity, kNegativeInfinity}, total[2] = {};

  __device__ Rows(const Attention& p, int b, int row) : row(row), shift(p.S - p.T), scale(p.scale * kLog2e) {
    const int query = row + threadIdx.x % kWarp / 4;
    start[0] = first_key(p, b, query);
    start[1] = first_key(p, b, query + 8);
    last_start = first_key(p, b, row + 15);
  }

  // Turns scores of the keys from `key` into exponentials relative to the largest score so far; what was summed up before
  // is to be multiplied by `rescale`.
  __device__ void softmax(float (&s)[kTileKeys / 8][4], int key, float (&rescale)[2]) {
    const int lane = threadIdx.x % kWarp;
    if (key < last_start || key + kTileKeys - 1 > row + shift) {
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = key + n * 8 + lane % 4 * 2 + i % 2, query = row + lane / 4 + i / 2 * 8;
          if (j < start[i / 2] || j > query + shift) s[n][i] = kNegativeInfinity;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float now = largest[half];
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) now = fmaxf(now, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      now = warp_max<4>(now);
      const float base = now == kNegativeInfinity ? 0.0f : now * scale;  // nothing seen yet: exp2(-inf) is 0 all the same
      rescale[half] = ptx::exp2_approx(largest[half] * scale - base);
      largest[half] = now;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = ptx::exp2_approx(s[n][i] * scale - base);
          sum += s[n][i];
        }
      }
      total[half] = total[half] * rescale[half] + sum;
    }
  }
};

template <int N>
__device__ void multiply_rows(float (&c)[N][4], const float (&factor)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] *= factor[i / 2];
  }
}

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ HopperAttention arguments) {
  using Queries = OwnRing<T, D>;
  using Keys = KeyRing<T, D>;
  const Attention& p = arguments.p;
  SharedMemory shared;
  T* query_tiles = shared.take<T>(Queries::kElements, 1024);
  T* key_tiles = shared.take<T>(Keys::kElements, 1024);
  T* value_tiles = shared.take<T>(Keys::kElements, 1024);
  const Queries queries{query_tiles, shared.take<uint64_t>(Queries::kBarriers + 2 * Keys::kBarriers)};
  const Keys keys{key_tiles, queries.barriers + Queries::kBarriers}, values{value_tiles, keys.barriers + Keys::kBarriers};
  if (threadIdx.x == 0) {
    queries.init();
    keys.init();
    values.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const int items = p.B * p.H * blocks_of_head(p.T);
  int own = 0, n = 0;  // of the rings: tiles of queries, and of keys and values, that have gone through
  if (threadIdx.x < kGroup) {
    ptx::registers_give_back<kLoadRegisters>();
    for (int round = 0, item; threadIdx.x == 0 && (item = item_of(round)) < items; ++round) {
      const auto [head, b, h, first, begin, tiles] = query_work(p, item);
      queries.load(own++, arguments.q, first, b, h);
      for (int tile = begin; tile < begin + tiles; ++tile, ++n) {
        keys.load(n, arguments.k, tile * kTileKeys, b, h);
        values.load(n, arguments.v, tile * kTileKeys, b, h);
      }
    }
    return;
  }
  ptx::registers_take<kComputeRegisters>();
  const int group = own_group(), lane = threadIdx.x % kWarp;
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int round = 0, item; (item = item_of(round)) < items; ++round, ++own, ++n) {
    const auto [head, b, h, first, begin, tiles] = query_work(p, item);
    const int row = first + group * 64 + threadIdx.x % kGroup / kWarp * 16;
    Rows rows(p, b, row);
    float out[D / 8][4] = {}, s[kTileKeys / 8][4], rescale[2];
    uint32_t probabilities[kTileKeys / 16][4];
    const auto finish_scores = [&](int tile) {  // of s: what the next product takes
      rows.softmax(s, tile * kTileKeys, rescale);
      if constexpr (kDropout) drop(s, p.dropout, seed, head, row, tile * kTileKeys);
    };

    queries.wait(own);
    const T* q = queries.tile(own) + group * 64 * kRowElements;
    keys.wait(n);
    start_by_rows<T, D>(s, q, keys.tile(n));
    ptx::wgmma_wait<0>(s);
    keys.release(n);
    finish_scores(begin);
    to_a<T>(probabilities, s);
    for (int tile = begin + 1; tile < begin + tiles; ++tile) {
      ++n;
      keys.wait(n);
      start_by_rows<T, D>(s, q, keys.tile(n));
      values.wait(n - 1);
      start_by_columns<T, D>(out, probabilities, values.tile(n - 1));
      ptx::wgmma_wait<1>(s);
      keys.release(n);
      finish_scores(tile);
      ptx::wgmma_wait<0>(out);
      values.release(n - 1);
      multiply_rows(out, rescale);
      to_a<T>(probabilities, s);
    }
    queries.release(own);
    values.wait(n);
    start_by_columns<T, D>(out, probabilities, values.tile(n));
    ptx::wgmma_wait<0>(out);
    values.release(n);

    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + lane / 4 + half * 8;
      const float sum = warp_sum<4>(rows.total[half]);
      inverse[half] = sum > 0.0f ? 1.0f / sum : 0.0f;
      const float lse = sum > 0.0f ? (rows.largest[half] * rows.scale + log2f(sum)) / kLog2e : kNegativeInfinity;
      if (query < p.T && lane % 4 == 0) p.lse[int64_t(head) * p.T + query] = lse;
    }
    multiply_rows(out, inverse);
    store_rows(out, head_of<T>(p.out, b, h), p.out.token, row, p.T, p.D, 1.0f);
  }
}

template <class T, int D>
void run(const Attention& p, const Launch& at) {
  const HopperAttention arguments{p, map_of(p, p.q, p.T, kBlockRows, at), map_of(p, p.k, p.S, kTileKeys, at),
                                  map_of(p, p.v, p.S, kTileKeys, at), {}};
  const auto kernel = p.dropout.seed ? forward<T, D, true> : forward<T, D, false>;
  using Queries = OwnRing<T, D>;
  using Keys = KeyRing<T, D>;
  const size_t shared = (Queries::kElements + 2 * Keys::kElements) * sizeof(T) +
                        (Queries::kBarriers + 2 * Keys::kBarriers) * sizeof(uint64_t);
  launch(at, kernel, blocks_for(ceil_div(p.T, kBlockRows) * p.B * p.H, at), kThreads, shared, arguments);
}

bool mapped(const Attention& p, const Heads& x, int tokens) {
  const auto valid = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < int64_t{1} << 39); };
  return valid(p.H, x.head) && valid(tokens, x.token) && valid(p.B, x.batch);
}

}  // namespace

bool attention_on_hopper(const Attention& p, bool backward) {
  // Few queries are split over their keys instead; softmax takes the largest score before it is scaled.
  return attention_on_tensor_cores(p, backward) && p.T > kTileRows && p.scale > 0.0f && mapped(p, p.q, p.T) &&
         mapped(p, p.k, p.S) && mapped(p, p.v, p.S) && (!backward || mapped(p, p.grad, p.T));
}

void attention_hopper_forward(const Attention& p, const Launch& at) {
  const bool small = p.D <= 64;
  if (p.dtype == DType::bf16) return small ? run<__nv_bfloat16, 64>(p, at) : run<__nv_bfloat16, 128>(p, at);
  return small ? run<__half, 64>(p, at) : run<__half, 128>(p, at);
}

}  // namespace pygpt::cuda
