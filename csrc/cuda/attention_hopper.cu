// Causal attention forward on Hopper's tensor cores (sm_90a only), after FlashAttention-3 (Shah et al., 2024): a warp that
// does nothing but load, two warpgroups that compute, and in each the softmax of one tile beside the products of the next.
//
// A block takes 128 queries of one head, a warpgroup 64 of them, and walks over the keys 128 at a time. K and V arrive by TMA
// through a ring of stages in shared memory; each stage has a barrier that it is full and one that it is empty. S and P never
// leave the registers. Blocks with the most keys come first.

#include "cuda/attention_tile.h"
#include "cuda/ptx_sm90.h"

namespace pygpt::cuda {
namespace {

constexpr int kGroup = 128;                  // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;         // one that loads, two that compute
constexpr int kRows = 2 * 64;                // queries of a block
constexpr int kTileKeys = 128;               // keys of a step
constexpr int kRowElements = 64;             // 16-bit elements in 128 bytes: a wider head is continued in a second part
constexpr int kPart = 128 * kRowElements;    // elements of a part: 128 queries or keys

template <int D>
constexpr int kStages = D == 64 ? 3 : 2;
template <int D>
constexpr int kBarriers = 4 * kStages<D> + 1;

struct HopperAttention {
  Attention p;
  TensorMap q, k, v;  // (D, H, T or S, B), in boxes of (64, 1, 128, 1)
};

// A ring of tiles of 128 rows of one head.
template <class T, int D>
struct Ring {
  T* tiles;
  uint64_t *full, *empty;

  __device__ void init() const {
    for (int i = 0; i < kStages<D>; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 2 * kGroup / kWarp);
    }
  }
  // `n` counts the tiles that have gone through the ring.
  __device__ T* tile(int n) const { return tiles + n % kStages<D> * 128 * D; }
  __device__ void load(int n, const TensorMap& map, int row, int b, int h) const {
    ptx::mbarrier_wait(empty + n % kStages<D>, (n / kStages<D> + 1) % 2);
    load_tile(tile(n), map, full + n % kStages<D>, row, b, h);
  }
  __device__ void wait(int n) const { ptx::mbarrier_wait(full + n % kStages<D>, n / kStages<D> % 2); }
  __device__ void release(int n) const {
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty + n % kStages<D>);
  }
  static __device__ void load_tile(T* to, const TensorMap& map, uint64_t* barrier, int row, int b, int h) {
    ptx::mbarrier_arrive_expect(barrier, 128 * D * sizeof(T));
#pragma unroll
    for (int part = 0; part < D / kRowElements; ++part)
      ptx::tma_load(to + part * kPart, &map, barrier, part * kRowElements, h, row, b);
  }
};

// Starts s (64, 128) = q k^T.
template <class T, int D>
__device__ void start_scores(float (&s)[kTileKeys / 8][4], const T* q, const T* k) {
  ptx::wgmma_fence();
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    const int at = d / kRowElements * kPart + d % kRowElements;
    ptx::wgmma_by_rows(T{}, s, ptx::wgmma_operand(q + at), ptx::wgmma_operand(k + at), d > 0);
  }
  ptx::wgmma_commit();
}

// Starts out (64, D) += p v.
template <class T, int D>
__device__ void start_output(float (&out)[D / 8][4], const uint32_t (&p)[kTileKeys / 16][4], const T* v) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTileKeys / 16; ++step)
    ptx::wgmma_by_columns(T{}, out, p[step], ptx::wgmma_operand(v + step * 16 * kRowElements, kPart * sizeof(T)));
  ptx::wgmma_commit();
}

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
  const Attention& p = arguments.p;
  SharedMemory shared;
  T* queries = shared.take<T>(kRows * D, 1024);
  T* key_tiles = shared.take<T>(kStages<D> * kTileKeys * D, 1024);
  T* value_tiles = shared.take<T>(kStages<D> * kTileKeys * D, 1024);
  uint64_t* barriers = shared.take<uint64_t>(kBarriers<D>);
  const Ring<T, D> keys{key_tiles, barriers, barriers + kStages<D>};
  const Ring<T, D> values{value_tiles, barriers + 2 * kStages<D>, barriers + 3 * kStages<D>};
  uint64_t* queries_full = barriers + 4 * kStages<D>;
  if (threadIdx.x == 0) {
    keys.init();
    values.init();
    ptx::mbarrier_init(queries_full, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const int heads = p.B * p.H, blocks = gridDim.x / heads, head = blockIdx.x % heads, b = head / p.H, h = head % p.H;
  const int first = (blocks - 1 - static_cast<int>(blockIdx.x) / heads) * kRows, shift = p.S - p.T;
  const int last_key = first + kRows + shift < p.S ? first + kRows + shift : p.S;  // one past it
  const int begin = first_key(p, b, first) / kTileKeys, tiles = (last_key + kTileKeys - 1) / kTileKeys - begin;

  if (threadIdx.x < kGroup) {
    ptx::registers_give_back<24>();
    if (threadIdx.x == 0) {
      Ring<T, D>::load_tile(queries, arguments.q, queries_full, first, b, h);
      for (int n = 0; n < tiles; ++n) {
        keys.load(n, arguments.k, (begin + n) * kTileKeys, b, h);
        values.load(n, arguments.v, (begin + n) * kTileKeys, b, h);
      }
    }
  } else {
    ptx::registers_take<240>();
    const int group = threadIdx.x / kGroup - 1, lane = threadIdx.x % kWarp;
    const int row = first + group * 64 + threadIdx.x % kGroup / kWarp * 16;
    const T* q = queries + group * 64 * kRowElements;
    const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
    Rows rows(p, b, row);
    float out[D / 8][4] = {}, s[kTileKeys / 8][4], rescale[2];
    uint32_t probabilities[kTileKeys / 16][4];
    const auto finish_scores = [&](int n) {  // of s: what the next product takes
      rows.softmax(s, (begin + n) * kTileKeys, rescale);
      if constexpr (kDropout) {
#pragma unroll
        for (int half = 0; half < kTileKeys / kKeys; ++half)
          drop(reinterpret_cast<float(&)[kKeys / 8][4]>(s[half * kKeys / 8]), p.dropout, seed, head, row,
               (begin + n) * kTileKeys + half * kKeys);
      }
    };
    const auto pack_scores = [&] {
#pragma unroll
      for (int step = 0; step < kTileKeys / 16; ++step) to_a<T>(probabilities[step], s, step);
    };

    ptx::mbarrier_wait(queries_full, 0);
    keys.wait(0);
    start_scores<T, D>(s, q, keys.tile(0));
    ptx::wgmma_wait<0>(s);
    keys.release(0);
    finish_scores(0);
    pack_scores();
    for (int n = 1; n < tiles; ++n) {
      keys.wait(n);
      start_scores<T, D>(s, q, keys.tile(n));
      values.wait(n - 1);
      start_output<T, D>(out, probabilities, values.tile(n - 1));
      ptx::wgmma_wait<1>(s);
      keys.release(n);
      finish_scores(n);
      ptx::wgmma_wait<0>(out);
      values.release(n - 1);
      multiply_rows(out, rescale);
      pack_scores();
    }
    values.wait(tiles - 1);
    start_output<T, D>(out, probabilities, values.tile(tiles - 1));
    ptx::wgmma_wait<0>(out);

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

// A dimension of one element has any stride, and the driver asks for a valid one.
uint64_t stride_bytes(int64_t size, int64_t elements) { return size == 1 ? 16 : static_cast<uint64_t>(elements) * 2; }

TensorMap map_of(const Attention& p, const Heads& x, int tokens, const Launch& at) {
  return tensor_map(p.dtype, x.data, {uint64_t(p.D), uint64_t(p.H), uint64_t(tokens), uint64_t(p.B)},
                    {stride_bytes(p.H, x.head), stride_bytes(tokens, x.token), stride_bytes(p.B, x.batch)},
                    {kRowElements, 1, 128, 1}, at);
}

template <class T, int D>
void run(const Attention& p, const Launch& at) {
  const HopperAttention arguments{p, map_of(p, p.q, p.T, at), map_of(p, p.k, p.S, at), map_of(p, p.v, p.S, at)};
  const auto blocks = static_cast<unsigned>(ceil_div(p.T, kRows) * p.B * p.H);
  const auto kernel = p.dropout.seed ? forward<T, D, true> : forward<T, D, false>;
  const size_t shared = (kRows + 2 * kStages<D> * kTileKeys) * D * sizeof(T) + kBarriers<D> * sizeof(uint64_t);
  launch(at, kernel, blocks, kThreads, shared, arguments);
}

bool mapped(const Attention& p, const Heads& x, int tokens) {
  const auto valid = [](int64_t size, int64_t stride) { return size == 1 || (stride > 0 && stride < int64_t{1} << 39); };
  return valid(p.H, x.head) && valid(tokens, x.token) && valid(p.B, x.batch);
}

}  // namespace

bool attention_on_hopper(const Attention& p) {
  // Few queries are split over their keys instead; softmax takes the largest score before it is scaled.
  return attention_on_tensor_cores(p, false) && p.T > kTileRows && p.scale > 0.0f && mapped(p, p.q, p.T) &&
         mapped(p, p.k, p.S) && mapped(p, p.v, p.S);
}

void attention_hopper_forward(const Attention& p, const Launch& at) {
  const bool small = p.D <= 64;
  if (p.dtype == DType::bf16) return small ? run<__nv_bfloat16, 64>(p, at) : run<__nv_bfloat16, 128>(p, at);
  return small ? run<__half, 64>(p, at) : run<__half, 128>(p, at);
}

}  // namespace pygpt::cuda
