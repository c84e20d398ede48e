// Causal attention backward on Hopper's tensor cores (sm_90a only), after FlashAttention-3 (Shah et al., 2024): a warp that
// does nothing but load, and two warpgroups that compute; probabilities and gradients of scores never leave the registers.
//
// Two kernels, so that every gradient has one owner and the same bits come out every time, with no atomics. In one a block
// takes 128 keys, walks over the queries and sums grad_k and grad_v; it computes scores transposed, keys along the rows, so
// that they come out as the first operand of those sums. In the other a block takes 128 queries, walks over the keys and sums
// grad_q. In both a tile's sums run while the scores of the next one are computed, and a block goes on with other rows.

#include "cuda/attention_hopper.h"

namespace pygpt::cuda {
namespace {

// --- grad_k and grad_v -----------------------------------------------------------------------------------------------

constexpr int kQueryStages = 4;
constexpr int kFillRegisters = 40, kSumRegisters = 232;  // as kLoadRegisters and kComputeRegisters: a stage is also filled

// Queries of a step: fewer where a row is wide, because two sums of 64 x D floats share the registers, and with dropout.
template <int D, bool kDropout>
constexpr int kTileQueries = D == 64 && !kDropout ? 128 : 64;
template <class T, int D, bool kDropout>
using QueryRing = Ring<T, D, kTileQueries<D, kDropout>, kQueryStages>;

// What belongs to the queries of a stage: log-sum-exp, of base 2, delta, and with dropout whether the element of a query and
// the block's key 16 w + r stays: bit r of kept[w]. The warpgroup that loads computes these bits, because a generator's four
// words are for keys of four warps.
template <int Q>
struct alignas(16) QueryStage {
  float lse[Q], delta[Q];
  uint16_t kept[kBlockRows / 16][Q];

  template <bool kDropout>
  __device__ void fill(const Attention& p, uint64_t seed, int head, int query, int key) {
    for (int i = threadIdx.x; i < Q; i += kGroup) {
      const int64_t at = int64_t(head) * p.T + query + i;
      const bool valid = query + i < p.T;
      lse[i] = valid ? p.lse[at] * kLog2e : 0.0f;
      delta[i] = valid ? p.delta[at] : 0.0f;
    }
#pragma unroll 1
    for (int item = threadIdx.x; kDropout && item < Q * kBlockRows / 64; item += kGroup) {
      const int i = item % Q, w = item / Q * 4;
      uint32_t bits[4] = {};
#pragma unroll 1
      for (int r = 0; r < 16; ++r) {
        const Words words = dropout_words(seed, head, query + i, key + w * 16 + r);
#pragma unroll
        for (int word = 0; word < 4; ++word) bits[word] |= uint32_t(words.at[word] >= p.dropout.threshold) << r;
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) kept[w + word][i] = static_cast<uint16_t>(bits[word]);
    }
  }
};

// What a thread knows of its two keys, key + lane / 4 and 8 further, key being its warp's first.
struct OwnKeys {
  int key, shift, end[2], first_end;  // no query from `end` on sees the key; first_end: the warp's smallest
  float scale;                        // of base 2

  __device__ OwnKeys(const Attention& p, int b, int key) : key(key), shift(p.S - p.T), scale(p.scale * kLog2e) {
    const int own = key + threadIdx.x % kWarp / 4;
    end[0] = queries_from_before(p, b, own + 1);
    end[1] = queries_from_before(p, b, own + 9);
    first_end = __shfl_sync(kWholeWarp, end[0], 0);
  }

  // Turns scores of a tile's queries, from `query`, into probabilities, and changes the sign of those that are dropped.
  template <bool kDropout, int Q>
  __device__ void probabilities(float (&s)[Q / 8][4], const QueryStage<Q>& stage, int query) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < Q / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const float2 base = *reinterpret_cast<const float2*>(stage.lse + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = ptx::exp2_approx(s[n][i] * scale - (i % 2 ? base.y : base.x));
    }
    if (query + shift < key + 15 || query + Q > first_end) {
#pragma unroll
      for (int n = 0; n < Q / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = query + n * 8 + lane % 4 * 2 + i % 2, j = key + lane / 4 + i / 2 * 8;
          if (row >= end[i / 2] || j > row + shift) s[n][i] = 0.0f;
        }
      }
    }
    if constexpr (kDropout) {
#pragma unroll
      for (int n = 0; n < Q / 8; ++n) {
        const uint16_t* pair = stage.kept[key / 16 % 8] + n * 8 + lane % 4 * 2;  // of two queries
        const uint32_t kept = *reinterpret_cast<const uint32_t*>(pair) >> lane / 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = kept >> (i / 2 * 8 + i % 2 * 16) & 1 ? s[n][i] : -s[n][i];
      }
    }
  }

  // Turns d, products of grad and values, into the gradient of the scores, and drops elements of s, the probabilities.
  template <bool kDropout, int Q>
  __device__ void grad_scores(float (&s)[Q / 8][4], float (&d)[Q / 8][4], const QueryStage<Q>& stage, float kept_scale) const {
#pragma unroll
    for (int n = 0; n < Q / 8; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(stage.delta + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float kept = !kDropout ? 1.0f : s[n][i] < 0.0f ? 0.0f : kept_scale;
        d[n][i] = fabsf(s[n][i]) * (d[n][i] * kept - (i % 2 ? delta.y : delta.x));
        s[n][i] *= kept;
      }
    }
  }
};

// Keys, and the tiles of queries that see them, none where no query does. Within a section those with the most queries come first.
template <int Q>
__device__ Work key_work(const Attention& p, int item) {
  const auto [head, b, h, nth] = place(p, item, blocks_of_head(p.S));
  const int first = nth * kBlockRows, shift = p.S - p.T, begin = (first > shift ? first - shift : 0) / Q;
  return {head, b, h, first, begin, (queries_from_before(p, b, first + kBlockRows) + Q - 1) / Q - begin};
}

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) grad_keys(const __grid_constant__ HopperAttention arguments) {
  using Keys = OwnRing<T, D>;
  using Queries = QueryRing<T, D, kDropout>;
  constexpr int Q = kTileQueries<D, kDropout>;
  const Attention& p = arguments.p;
  SharedMemory shared;
  T* key_tiles = shared.take<T>(Keys::kElements, 1024);
  T* value_tiles = shared.take<T>(Keys::kElements, 1024);
  T* query_tiles = shared.take<T>(Queries::kElements, 1024);
  T* grad_tiles = shared.take<T>(Queries::kElements, 1024);
  QueryStage<Q>* stages = shared.take<QueryStage<Q>>(kQueryStages);
  const Keys keys{key_tiles, shared.take<uint64_t>(2 * Keys::kBarriers + 2 * Queries::kBarriers)};
  const Keys values{value_tiles, keys.barriers + Keys::kBarriers};
  const Queries queries{query_tiles, values.barriers + Keys::kBarriers}, grads{grad_tiles, queries.barriers + Queries::kBarriers};
  if (threadIdx.x == 0) {
    keys.init();
    values.init();
    queries.init(1 + kGroup);
    grads.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  const int items = p.B * p.H * blocks_of_head(p.S);
  int own = 0, n = 0;  // of the rings: tiles of keys and values, and of queries and gradients, that have gone through
  if (threadIdx.x < kGroup) {
    ptx::registers_give_back<kFillRegisters>();
    for (int round = 0, item; (item = item_of(round)) < items; ++round) {
      const auto [head, b, h, first, begin, tiles] = key_work<Q>(p, item);
      if (tiles <= 0) continue;
      if (threadIdx.x == 0) {
        keys.load(own, arguments.k, first, b, h);
        values.load(own, arguments.v, first, b, h);
      }
      ++own;
      for (int tile = begin; tile < begin + tiles; ++tile, ++n) {
        if (threadIdx.x == 0) {
          queries.load(n, arguments.q, tile * Q, b, h);
          grads.load(n, arguments.grad, tile * Q, b, h);
        }
        queries.wait_empty(n);
        stages[n % kQueryStages].template fill<kDropout>(p, seed, head, tile * Q, first);
        ptx::mbarrier_arrive(queries.full(n));
      }
    }
    return;
  }
  ptx::registers_take<kSumRegisters>();
  const int group = own_group();
  for (int round = 0, item; (item = item_of(round)) < items; ++round) {
    const auto [head, b, h, first, begin, tiles] = key_work<Q>(p, item);
    const OwnKeys rows(p, b, first + group * 64 + threadIdx.x % kGroup / kWarp * 16);
    float grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {}, s[Q / 8][4], d[Q / 8][4];
    uint32_t probabilities[Q / 16][4], grad_scores[Q / 16][4];
    const T *k = keys.tile(own) + group * 64 * kRowElements, *v = values.tile(own) + group * 64 * kRowElements;

    const auto finish_sums = [&] {
      ptx::wgmma_wait<0>(grad_v);
      ptx::wgmma_wait<0>(grad_k);
      __syncwarp();  // all threads of the warp have read their part of the stage
    };
    const auto start_sums = [&](int n) {
      start_by_columns<T, D>(grad_v, probabilities, grads.tile(n));
      start_by_columns<T, D>(grad_k, grad_scores, queries.tile(n));
    };
    const auto finish_scores = [&](int n) {  // of s, the probabilities: what start_sums takes
      grads.wait(n);
      start_by_rows<T, D>(d, v, grads.tile(n));
      ptx::wgmma_wait<0>(d);
      rows.grad_scores<kDropout>(s, d, stages[n % kQueryStages], p.dropout.kept_scale);
      to_a<T>(probabilities, s);
      to_a<T>(grad_scores, d);
    };

    if (tiles > 0) {
      keys.wait(own);
      values.wait(own);
      queries.wait(n);
      start_by_rows<T, D>(s, k, queries.tile(n));
      ptx::wgmma_wait<0>(s);
      rows.probabilities<kDropout>(s, stages[n % kQueryStages], begin * Q);
      finish_scores(n);
      for (int tile = begin + 1; tile < begin + tiles; ++tile) {
        ++n;
        queries.wait(n);
        start_by_rows<T, D>(s, k, queries.tile(n));
        start_sums(n - 1);
        ptx::wgmma_wait<2>(s);
        rows.probabilities<kDropout>(s, stages[n % kQueryStages], tile * Q);
        finish_sums();
        queries.release(n - 1);
        grads.release(n - 1);
        finish_scores(n);
      }
      keys.release(own);
      values.release(own);
      ++own;
      start_sums(n);
      finish_sums();
      queries.release(n);
      grads.release(n);
      ++n;
    }
    store_rows(grad_k, head_of<T>(p.grad_k, b, h), p.grad_k.token, rows.key, p.S, p.D, p.scale);
    store_rows(grad_v, head_of<T>(p.grad_v, b, h), p.grad_v.token, rows.key, p.S, p.D, 1.0f);
  }
}

// --- grad_q ----------------------------------------------------------------------------------------------------------

// What a thread knows of its two queries, row + lane / 4 and 8 further, row being its warp's first.
struct OwnQueries {
  int row, shift, start[2], last_start;  // query i sees keys start .. i + shift; last_start: the warp's largest
  float scale, lse[2], delta[2];         // of base 2: scale and lse

  __device__ OwnQueries(const Attention& p, int b, int head, int row)
      : row(row), shift(p.S - p.T), last_start(first_key(p, b, row + 15)), scale(p.scale * kLog2e) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + threadIdx.x % kWarp / 4 + half * 8;
      const int64_t at = int64_t(head) * p.T + (query < p.T ? query : 0);
      start[half] = first_key(p, b, query);
      lse[half] = p.lse[at] * kLog2e;
      delta[half] = p.delta[at];
    }
  }

  // Turns scores of the keys from `key` into probabilities.
  template <int N>
  __device__ void probabilities(float (&s)[N][4], int key) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = ptx::exp2_approx(s[n][i] * scale - lse[i / 2]);
    }
    if (key >= last_start && key + N * 8 - 1 <= row + shift) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = key + n * 8 + lane % 4 * 2 + i % 2, query = row + lane / 4 + i / 2 * 8;
        if (j < start[i / 2] || j > query + shift) s[n][i] = 0.0f;
      }
    }
  }

  // Turns d, products of grad and values, into the gradient of the scores. A probability that is dropped has its sign changed.
  template <bool kDropout, int N>
  __device__ void grad_scores(const float (&s)[N][4], float (&d)[N][4], float kept_scale) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float kept = !kDropout ? 1.0f : s[n][i] < 0.0f ? 0.0f : kept_scale;
        d[n][i] = fabsf(s[n][i]) * (d[n][i] * kept - delta[i / 2]);
      }
    }
  }
};

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) grad_queries(const __grid_constant__ HopperAttention arguments) {
  using Queries = OwnRing<T, D>;
  using Keys = KeyRing<T, D>;
  const Attention& p = arguments.p;
  SharedMemory shared;
  T* query_tiles = shared.take<T>(Queries::kElements, 1024);
  T* grad_tiles = shared.take<T>(Queries::kElements, 1024);
  T* key_tiles = shared.take<T>(Keys::kElements, 1024);
  T* value_tiles = shared.take<T>(Keys::kElements, 1024);
  const Queries queries{query_tiles, shared.take<uint64_t>(2 * Queries::kBarriers + 2 * Keys::kBarriers)};
  const Queries grads{grad_tiles, queries.barriers + Queries::kBarriers};
  const Keys keys{key_tiles, grads.barriers + Queries::kBarriers}, values{value_tiles, keys.barriers + Keys::kBarriers};
  if (threadIdx.x == 0) {
    queries.init();
    grads.init();
    keys.init();
    values.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const int items = p.B * p.H * blocks_of_head(p.T);
  int own = 0, n = 0;  // of the rings: tiles of queries and gradients, and of keys and values, that have gone through
  if (threadIdx.x < kGroup) {
    ptx::registers_give_back<kLoadRegisters>();
    for (int round = 0, item; threadIdx.x == 0 && (item = item_of(round)) < items; ++round, ++own) {
      const auto [head, b, h, first, begin, tiles] = query_work(p, item);
      queries.load(own, arguments.q, first, b, h);
      grads.load(own, arguments.grad, first, b, h);
      for (int tile = begin; tile < begin + tiles; ++tile, ++n) {
        keys.load(n, arguments.k, tile * kTileKeys, b, h);
        values.load(n, arguments.v, tile * kTileKeys, b, h);
      }
    }
    return;
  }
  ptx::registers_take<kComputeRegisters>();
  const int group = own_group();
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int round = 0, item; (item = item_of(round)) < items; ++round, ++own, ++n) {
    const auto [head, b, h, first, begin, tiles] = query_work(p, item);
    const OwnQueries rows(p, b, head, first + group * 64 + threadIdx.x % kGroup / kWarp * 16);
    const T *q = queries.tile(own) + group * 64 * kRowElements, *grad = grads.tile(own) + group * 64 * kRowElements;
    float grad_q[D / 8][4] = {}, s[kTileKeys / 8][4], d[kTileKeys / 8][4];
    uint32_t grad_scores[kTileKeys / 16][4];
    const auto make_probabilities = [&](int tile) {  // of s
      rows.probabilities(s, tile * kTileKeys);
      if constexpr (kDropout) drop<true>(s, p.dropout, seed, head, rows.row, tile * kTileKeys);
    };
    const auto finish_scores = [&] {  // of s, the probabilities: what the sum takes
      values.wait(n);
      start_by_rows<T, D>(d, grad, values.tile(n));
      ptx::wgmma_wait<0>(d);
      values.release(n);
      rows.grad_scores<kDropout>(s, d, p.dropout.kept_scale);
      to_a<T>(grad_scores, d);
    };

    queries.wait(own);
    grads.wait(own);
    keys.wait(n);
    start_by_rows<T, D>(s, q, keys.tile(n));
    ptx::wgmma_wait<0>(s);
    make_probabilities(begin);
    finish_scores();
    for (int tile = begin + 1; tile < begin + tiles; ++tile) {
      ++n;
      keys.wait(n);
      start_by_rows<T, D>(s, q, keys.tile(n));
      start_by_columns<T, D>(grad_q, grad_scores, keys.tile(n - 1));
      ptx::wgmma_wait<1>(s);
      make_probabilities(tile);
      ptx::wgmma_wait<0>(grad_q);
      keys.release(n - 1);
      finish_scores();
    }
    queries.release(own);
    grads.release(own);
    start_by_columns<T, D>(grad_q, grad_scores, keys.tile(n));
    ptx::wgmma_wait<0>(grad_q);
    keys.release(n);
    store_rows(grad_q, head_of<T>(p.grad_q, b, h), p.grad_q.token, rows.row, p.T, p.D, p.scale);
  }
}

template <class T, int D, bool kDropout>
void run(const Attention& p, const Launch& at) {
  constexpr int Q = kTileQueries<D, kDropout>;
  const auto arguments = [&](int rows_of_queries, int rows_of_keys) {
    return HopperAttention{p, map_of(p, p.q, p.T, rows_of_queries, at), map_of(p, p.k, p.S, rows_of_keys, at),
                           map_of(p, p.v, p.S, rows_of_keys, at), map_of(p, p.grad, p.T, rows_of_queries, at)};
  };
  const auto shared = [](int ring_elements, int ring_barriers) {
    return 2 * ((OwnRing<T, D>::kElements + ring_elements) * sizeof(T) +
                (OwnRing<T, D>::kBarriers + ring_barriers) * sizeof(uint64_t));
  };
  using Queries = QueryRing<T, D, kDropout>;
  using Keys = KeyRing<T, D>;
  const int64_t heads = int64_t(p.B) * p.H;
  launch(at, grad_keys<T, D, kDropout>, blocks_for(ceil_div(p.S, kBlockRows) * heads, at), kThreads,
         shared(Queries::kElements, Queries::kBarriers) + kQueryStages * sizeof(QueryStage<Q>), arguments(Q, kBlockRows));
  launch(at, grad_queries<T, D, kDropout>, blocks_for(ceil_div(p.T, kBlockRows) * heads, at), kThreads,
         shared(Keys::kElements, Keys::kBarriers), arguments(kBlockRows, kTileKeys));
}

template <class T>
void run(const Attention& p, const Launch& at) {
  if (p.dropout.seed)
    p.D <= 64 ? run<T, 64, true>(p, at) : run<T, 128, true>(p, at);
  else
    p.D <= 64 ? run<T, 64, false>(p, at) : run<T, 128, false>(p, at);
}

}  // namespace

void attention_hopper_backward(const Attention& p, const Launch& at) {
  p.dtype == DType::bf16 ? run<__nv_bfloat16>(p, at) : run<__half>(p, at);
}

}  // namespace pygpt::cuda
