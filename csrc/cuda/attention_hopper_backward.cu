// Causal attention backward on Hopper's tensor cores (sm_90a only), after FlashAttention-3 (Shah et al., 2024): a warp that
// does nothing but load, and two warpgroups that compute; probabilities and gradients of scores never leave the registers.
//
// Two kernels, so that every gradient has one owner and the same bits come out every time, with no atomics. In one a block
// has 128 keys, walks over the queries and sums grad_k and grad_v; it computes scores transposed, keys along the rows, so
// that they come out as the first operand of those sums. In the other a block has 128 queries, walks over the keys and sums
// grad_q. In both a tile's sums run while the scores of the next one are computed.

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

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kThreads, 1) grad_keys(const __grid_constant__ HopperAttention arguments) {
  using Queries = QueryRing<T, D, kDropout>;
  constexpr int Q = kTileQueries<D, kDropout>;
  const Attention& p = arguments.p;
  SharedMemory shared;
  T* keys = shared.take<T>(kBlockRows * D, 1024);
  T* values = shared.take<T>(kBlockRows * D, 1024);
  T* query_tiles = shared.take<T>(Queries::kElements, 1024);
  T* grad_tiles = shared.take<T>(Queries::kElements, 1024);
  QueryStage<Q>* stages = shared.take<QueryStage<Q>>(kQueryStages);
  uint64_t* keys_full = shared.take<uint64_t>(1 + 2 * Queries::kBarriers);
  const Queries queries{query_tiles, keys_full + 1}, grads{grad_tiles, queries.barriers + Queries::kBarriers};
  if (threadIdx.x == 0) {
    queries.init(1 + kGroup);
    grads.init();
    ptx::mbarrier_init(keys_full, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const int heads = p.B * p.H, head = blockIdx.x % heads, b = head / p.H, h = head % p.H;
  const int first = static_cast<int>(blockIdx.x) / heads * kBlockRows, shift = p.S - p.T;
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  const int begin = (first > shift ? first - shift : 0) / Q;
  const int tiles = (queries_from_before(p, b, first + kBlockRows) + Q - 1) / Q - begin;  // none where no query sees the keys

  if (threadIdx.x < kGroup) {
    ptx::registers_give_back<kFillRegisters>();
    if (threadIdx.x == 0 && tiles > 0) {
      ptx::mbarrier_arrive_expect(keys_full, 2 * kBlockRows * D * sizeof(T));
      load_tile<T, D, kBlockRows>(keys, arguments.k, keys_full, first, b, h);
      load_tile<T, D, kBlockRows>(values, arguments.v, keys_full, first, b, h);
    }
    for (int n = 0; n < tiles; ++n) {
      const int query = (begin + n) * Q;
      if (threadIdx.x == 0) {
        queries.load(n, arguments.q, query, b, h);
        grads.load(n, arguments.grad, query, b, h);
      }
      queries.wait_empty(n);
      stages[n % kQueryStages].template fill<kDropout>(p, seed, head, query, first);
      ptx::mbarrier_arrive(queries.full(n));
    }
  } else {
    ptx::registers_take<kSumRegisters>();
    const int group = own_group();
    const OwnKeys own(p, b, first + group * 64 + threadIdx.x % kGroup / kWarp * 16);
    const T *k = keys + group * 64 * kRowElements, *v = values + group * 64 * kRowElements;
    float grad_k[D / 8][4] = {}, grad_v[D / 8][4] = {}, s[Q / 8][4], d[Q / 8][4];
    uint32_t probabilities[Q / 16][4], grad_scores[Q / 16][4];

    const auto start_sums = [&](int n) {
      start_by_columns<T, D>(grad_v, probabilities, grads.tile(n));
      start_by_columns<T, D>(grad_k, grad_scores, queries.tile(n));
    };
    const auto finish_scores = [&](int n) {  // of s, the probabilities: what start_sums takes
      grads.wait(n);
      start_by_rows<T, D>(d, v, grads.tile(n));
      ptx::wgmma_wait<0>(d);
      own.grad_scores<kDropout>(s, d, stages[n % kQueryStages], p.dropout.kept_scale);
      to_a<T>(probabilities, s);
      to_a<T>(grad_scores, d);
    };

    if (tiles > 0) {
      ptx::mbarrier_wait(keys_full, 0);
      queries.wait(0);
      start_by_rows<T, D>(s, k, queries.tile(0));
      ptx::wgmma_wait<0>(s);
      own.probabilities<kDropout>(s, stages[0], begin * Q);
      finish_scores(0);
      for (int n = 1; n < tiles; ++n) {
        queries.wait(n);
        start_by_rows<T, D>(s, k, queries.tile(n));
        start_sums(n - 1);
        ptx::wgmma_wait<2>(s);
        own.probabilities<kDropout>(s, stages[n % kQueryStages], (begin + n) * Q);
        ptx::wgmma_wait<0>(grad_v);
        ptx::wgmma_wait<0>(grad_k);
        __syncwarp();  // all threads of the warp have read their part of the stage
        queries.release(n - 1);
        grads.release(n - 1);
        finish_scores(n);
      }
      start_sums(tiles - 1);
      ptx::wgmma_wait<0>(grad_v);
      ptx::wgmma_wait<0>(grad_k);
    }
    store_rows(grad_k, head_of<T>(p.grad_k, b, h), p.grad_k.token, own.key, p.S, p.D, p.scale);
    store_rows(grad_v, head_of<T>(p.grad_v, b, h), p.grad_v.token, own.key, p.S, p.D, 1.0f);
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
  using Keys = KeyRing<T, D>;
  const Attention& p = arguments.p;
  SharedMemory shared;
  T* queries = shared.take<T>(kBlockRows * D, 1024);
  T* grads = shared.take<T>(kBlockRows * D, 1024);
  T* key_tiles = shared.take<T>(Keys::kElements, 1024);
  T* value_tiles = shared.take<T>(Keys::kElements, 1024);
  uint64_t* queries_full = shared.take<uint64_t>(1 + 2 * Keys::kBarriers);
  const Keys keys{key_tiles, queries_full + 1}, values{value_tiles, keys.barriers + Keys::kBarriers};
  if (threadIdx.x == 0) {
    keys.init();
    values.init();
    ptx::mbarrier_init(queries_full, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const auto [head, b, h, first, begin, tiles] = query_block(p);

  if (threadIdx.x < kGroup) {
    ptx::registers_give_back<kLoadRegisters>();
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(queries_full, 2 * kBlockRows * D * sizeof(T));
      load_tile<T, D, kBlockRows>(queries, arguments.q, queries_full, first, b, h);
      load_tile<T, D, kBlockRows>(grads, arguments.grad, queries_full, first, b, h);
      load_keys_and_values(keys, values, arguments, begin, tiles, b, h);
    }
  } else {
    ptx::registers_take<kComputeRegisters>();
    const int group = own_group();
    const OwnQueries own(p, b, head, first + group * 64 + threadIdx.x % kGroup / kWarp * 16);
    const T *q = queries + group * 64 * kRowElements, *grad = grads + group * 64 * kRowElements;
    const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
    float grad_q[D / 8][4] = {}, s[kTileKeys / 8][4], d[kTileKeys / 8][4];
    uint32_t grad_scores[kTileKeys / 16][4];
    const auto make_probabilities = [&](int n) {  // of s
      own.probabilities(s, (begin + n) * kTileKeys);
      if constexpr (kDropout) drop<true>(s, p.dropout, seed, head, own.row, (begin + n) * kTileKeys);
    };
    const auto finish_scores = [&](int n) {  // of s, the probabilities: what the sum takes
      values.wait(n);
      start_by_rows<T, D>(d, grad, values.tile(n));
      ptx::wgmma_wait<0>(d);
      values.release(n);
      own.grad_scores<kDropout>(s, d, p.dropout.kept_scale);
      to_a<T>(grad_scores, d);
    };

    ptx::mbarrier_wait(queries_full, 0);
    keys.wait(0);
    start_by_rows<T, D>(s, q, keys.tile(0));
    ptx::wgmma_wait<0>(s);
    make_probabilities(0);
    finish_scores(0);
    for (int n = 1; n < tiles; ++n) {
      keys.wait(n);
      start_by_rows<T, D>(s, q, keys.tile(n));
      start_by_columns<T, D>(grad_q, grad_scores, keys.tile(n - 1));
      ptx::wgmma_wait<1>(s);
      make_probabilities(n);
      ptx::wgmma_wait<0>(grad_q);
      keys.release(n - 1);
      finish_scores(n);
    }
    start_by_columns<T, D>(grad_q, grad_scores, keys.tile(tiles - 1));
    ptx::wgmma_wait<0>(grad_q);
    store_rows(grad_q, head_of<T>(p.grad_q, b, h), p.grad_q.token, own.row, p.T, p.D, p.scale);
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
    return 2 * (kBlockRows * D + ring_elements) * sizeof(T) + (1 + 2 * ring_barriers) * sizeof(uint64_t);
  };
  using Queries = QueryRing<T, D, kDropout>;
  using Keys = KeyRing<T, D>;
  const auto heads = static_cast<unsigned>(p.B * p.H);
  const auto key_blocks = static_cast<unsigned>(ceil_div(p.S, kBlockRows));
  const auto query_blocks = static_cast<unsigned>(ceil_div(p.T, kBlockRows));
  launch(at, grad_keys<T, D, kDropout>, key_blocks * heads, kThreads,
         shared(Queries::kElements, Queries::kBarriers) + kQueryStages * sizeof(QueryStage<Q>), arguments(Q, kBlockRows));
  launch(at, grad_queries<T, D, kDropout>, query_blocks * heads, kThreads, shared(Keys::kElements, Keys::kBarriers),
         arguments(kBlockRows, kTileKeys));
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
