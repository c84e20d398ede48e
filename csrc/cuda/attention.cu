// Causal attention forward on CUDA tensor cores: FlashAttention-2's loop (Dao, 2023) with mma.sync and cp.async.
//
// A block takes 64 queries of one head, a warp 16 of them, and walks over the keys 64 at a time. K and V arrive through two
// stages of shared memory; S and P never leave the registers. Blocks with the most keys come first.
// With few queries the keys are split over blocks too, and a second kernel joins the parts by their log-sum-exp.

#include "cuda/attention.h"

#include <algorithm>

#include "cuda/attention_tile.h"

namespace pygpt::cuda {
namespace {

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kTileThreads, D == 64 ? 3 : 2) forward(Attention p) {
  SharedMemory shared;
  const Tile<T, D> queries{shared.take<T>(kTileRows * D, 128)};
  T* key_tiles = shared.take<T>(2 * kKeys * D, 128);
  T* value_tiles = shared.take<T>(2 * kKeys * D, 128);

  const int heads = p.B * p.H, tiles = gridDim.x / heads, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto [head, b, h, nth] = place(p, blockIdx.x, tiles);
  const int first = (tiles - 1 - nth) * kTileRows, row = first + warp * 16;
  const int shift = p.S - p.T, split = blockIdx.y;
  const int last_key = first + kTileRows + shift < p.S ? first + kTileRows + shift : p.S;  // one past it
  const int first_tile = first_key(p, b, first) / kKeys, key_tiles_all = (last_key + kKeys - 1) / kKeys - first_tile;
  const int begin = first_tile + static_cast<int>(int64_t(key_tiles_all) * split / p.splits);
  const int end = first_tile + static_cast<int>(int64_t(key_tiles_all) * (split + 1) / p.splits);

  const T *k = head_of<T>(p.k, b, h), *v = head_of<T>(p.v, b, h);
  const auto fetch = [&](int tile) {
    const int stage = tile % 2 * kKeys * D;
    Tile<T, D>{key_tiles + stage}.template copy_from<kKeys>(k, p.k.token, tile * kKeys, p.S, p.D);
    Tile<T, D>{value_tiles + stage}.template copy_from<kKeys>(v, p.v.token, tile * kKeys, p.S, p.D);
  };
  queries.template copy_from<kTileRows>(head_of<T>(p.q, b, h), p.q.token, first, p.T, p.D);
  if (begin < end) fetch(begin);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  constexpr bool kHoldQ = D == 64;  // in registers; a wider row would leave too few for the rest
  uint32_t q[D / 16][4];
  if constexpr (kHoldQ) {
#pragma unroll
    for (int step = 0; step < D / 16; ++step) load_a(q[step], queries, warp * 16, step);
  }

  float out[D / 8][4] = {}, largest[2] = {kNegativeInfinity, kNegativeInfinity}, total[2] = {};
  // Of this thread's two queries, and the largest of its warp's.
  const int start[2] = {first_key(p, b, row + lane / 4), first_key(p, b, row + lane / 4 + 8)};
  const int last_start = first_key(p, b, row + 15);
  const float scale = p.scale * kLog2e;
  const uint64_t seed = kDropout ? static_cast<uint64_t>(*p.dropout.seed) : 0;
  for (int tile = begin; tile < end; ++tile) {
    if (tile > begin) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the tile is there, and everybody has left the stage that the next one overwrites
    }
    if (tile + 1 < end) fetch(tile + 1);
    ptx::cp_async_commit();
    if (row >= p.T) continue;  // a warp without queries only helps to fetch

    const int stage = tile % 2 * kKeys * D, key = tile * kKeys;
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      if constexpr (!kHoldQ) load_a(q[step], queries, warp * 16, step);
      multiply_by_rows(s, q[step], Tile<T, D>{key_tiles + stage}, 0, step);
    }

    const bool whole = key >= last_start && key + kKeys - 1 <= row + shift;  // no element of the warp's tile is masked
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = row + lane / 4 + half * 8;
      float now = largest[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * half + i];
          const int j = key + n * 8 + lane % 4 * 2 + i;
          x = whole || (j >= start[half] && j <= query + shift) ? x * scale : kNegativeInfinity;
          now = fmaxf(now, x);
        }
      }
      now = warp_max<4>(now);
      const float base = now == kNegativeInfinity ? 0.0f : now;  // nothing seen yet: exp2(-inf) is 0 all the same
      const float rescale = ptx::exp2_approx(largest[half] - base);
      largest[half] = now;
      total[half] *= rescale;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[n][2 * half + i];
          x = ptx::exp2_approx(x - base);
          total[half] += x;
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[n][2 * half] *= rescale;
        out[n][2 * half + 1] *= rescale;
      }
    }
    if constexpr (kDropout) drop(s, p.dropout, seed, head, row, key);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t a[4];
      to_a<T>(a, s, step);
      multiply_by_columns(out, a, Tile<T, D>{value_tiles + stage}, step * 16);
    }
  }
  ptx::cp_async_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + lane / 4 + half * 8;
    const float sum = warp_sum<4>(total[half]), inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      out[n][2 * half] *= inverse;
      out[n][2 * half + 1] *= inverse;
    }
    if (query >= p.T) continue;
    const float lse = sum > 0.0f ? (largest[half] + log2f(sum)) / kLog2e : kNegativeInfinity;
    const int64_t at = (int64_t(p.splits > 1 ? split : 0) * heads + head) * p.T + query;
    if (lane % 4 == 0) (p.splits == 1 ? p.lse : p.partial_lse)[at] = lse;
    if (p.splits == 1) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if (column >= p.D) continue;
      *reinterpret_cast<float2*>(p.partial_out + at * p.D + column) = make_float2(out[n][2 * half], out[n][2 * half + 1]);
    }
  }
  if (p.splits == 1) store_rows(out, head_of<T>(p.out, b, h), p.out.token, row, p.T, p.D, 1.0f);
}

// A warp per query: out = sum of partial outputs, each by its share of the whole sum of exponentials.
template <class T>
__global__ void __launch_bounds__(kTileThreads) join_splits(Attention p) {
  const int64_t rows = int64_t(p.B) * p.H * p.T, row = int64_t(blockIdx.x) * (kTileThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp, query = static_cast<int>(row % p.T), head = static_cast<int>(row / p.T);
  float largest = kNegativeInfinity, total = 0;
  for (int split = 0; split < p.splits; ++split) largest = fmaxf(largest, p.partial_lse[split * rows + row]);
  for (int split = 0; split < p.splits; ++split) total += expf(p.partial_lse[split * rows + row] - largest);
  const float lse = largest + logf(total);
  T* out = head_of<T>(p.out, head / p.H, head % p.H) + query * p.out.token;
  for (int d = lane; d < p.D; d += kWarp) {
    float sum = 0;
    for (int split = 0; split < p.splits; ++split)
      sum += expf(p.partial_lse[split * rows + row] - lse) * p.partial_out[(split * rows + row) * p.D + d];
    out[d] = from_float<T>(sum);
  }
  if (lane == 0) p.lse[row] = lse;
}

int64_t query_tiles(const Attention& p) { return ceil_div(p.T, kTileRows); }

template <class T, int D>
void run(const Attention& p, const Launch& at) {
  const dim3 grid(static_cast<unsigned>(query_tiles(p) * p.B * p.H), static_cast<unsigned>(p.splits));
  const auto kernel = p.dropout.seed ? forward<T, D, true> : forward<T, D, false>;
  launch(at, kernel, grid, kTileThreads, (kTileRows + 4 * kKeys) * D * sizeof(T), p);
}

bool rows_aligned(const Heads& x) {
  return aligned(x.data) && x.batch % 8 == 0 && x.token % 8 == 0 && x.head % 8 == 0;
}

}  // namespace

bool attention_on_tensor_cores(const Attention& p, bool backward) {
  if (p.dtype == DType::f32 || p.D % 8 || p.D > 128) return false;
  bool good = rows_aligned(p.q) && rows_aligned(p.k) && rows_aligned(p.v) && rows_aligned(p.out);
  if (backward) good = good && rows_aligned(p.grad) && rows_aligned(p.grad_q) && rows_aligned(p.grad_k) && rows_aligned(p.grad_v);
  return good;
}

int heads_in_section(const Attention& p, int l2_bytes) {
  // A quarter: what a head's blocks read again, keys and values or queries and gradients, has to last beside all else.
  const int64_t head_bytes = int64_t{2} * p.S * p.D * (p.dtype == DType::f32 ? 4 : 2);
  return static_cast<int>(std::clamp<int64_t>(l2_bytes / 4 / std::max<int64_t>(head_bytes, 1), 1, std::max(p.B * p.H, 1)));
}

int attention_splits(const Attention& p, int multiprocessors) {
  const int64_t blocks = query_tiles(p) * p.B * p.H, key_tiles = ceil_div(p.S, kKeys);
  if (blocks == 0 || p.T > kTileRows) return 1;  // many queries: their blocks differ in length, and fill the device
  return static_cast<int>(std::clamp<int64_t>(2 * multiprocessors / blocks, 1, std::min<int64_t>(key_tiles, 64)));
}

void attention_join_splits(const Attention& p, const Launch& at) {
  const auto blocks = static_cast<unsigned>(ceil_div(int64_t(p.B) * p.H * p.T, kTileThreads / kWarp));
  const auto kernel = p.dtype == DType::f32    ? join_splits<float>
                      : p.dtype == DType::bf16 ? join_splits<__nv_bfloat16>
                                               : join_splits<__half>;
  launch(at, kernel, blocks, kTileThreads, 0, p);
}

void attention_forward(const Attention& p, const Launch& at) {
  const bool small = p.D <= 64;
  if (p.dtype == DType::bf16) return small ? run<__nv_bfloat16, 64>(p, at) : run<__nv_bfloat16, 128>(p, at);
  return small ? run<__half, 64>(p, at) : run<__half, 128>(p, at);
}

}  // namespace pygpt::cuda
