// What attention's forward and backward on Hopper share: tiles that the copy engine loads, rings of them, their products.
//
// A tile is R rows of one head, in parts of 64 columns that follow each other (ptx_sm90.h says how a part lies in memory). A
// block has one warpgroup that loads and two that compute; each of these has 64 rows of the block's own tiles of 128.
#pragma once

#include "cuda/attention_tile.h"
#include "cuda/ptx_sm90.h"

namespace pygpt::cuda {

constexpr int kGroup = 128;           // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;  // one that loads, two that compute
constexpr int kBlockRows = 2 * 64;    // queries or keys that a block owns
constexpr int kRowElements = 64;      // 16-bit elements in 128 bytes: a wider head is continued in a second part

// Registers of the two kinds of warpgroups: no more than the 3 * 168 that all begin with.
constexpr int kLoadRegisters = 24, kComputeRegisters = 240;

// Which of the warpgroups that compute a thread is in. Asked of the warp's first thread, so that the compiler knows that the
// whole warp has the same one, and keeps what is derived from it in the warp's registers instead of each thread's.
__device__ inline int own_group() { return __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kGroup, 0) - 1; }

struct HopperAttention {
  Attention p;
  TensorMap q, k, v, grad;  // (D, H, T or S, B), in boxes of (64, 1, R, 1)
};

// A ring of kStages tiles of one head; each stage has a barrier that it is full and one that it is empty. `n` counts the
// tiles that have gone through.
template <class T, int D, int R, int kStages>
struct Ring {
  static constexpr int kElements = kStages * R * D, kBarriers = 2 * kStages;

  T* tiles;
  uint64_t* barriers;

  // `fillers`: how many arrivals make a stage full, one of them that of load().
  __device__ void init(int fillers = 1) const {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full(i), fillers);
      ptx::mbarrier_init(empty(i), 2 * kGroup / kWarp);
    }
  }
  __device__ T* tile(int n) const { return tiles + n % kStages * R * D; }
  __device__ uint64_t* full(int n) const { return barriers + n % kStages; }
  __device__ uint64_t* empty(int n) const { return barriers + kStages + n % kStages; }

  __device__ void wait_empty(int n) const { ptx::mbarrier_wait(empty(n), (n / kStages + 1) % 2); }
  __device__ void load(int n, const TensorMap& map, int row, int b, int h) const {
    wait_empty(n);
    ptx::mbarrier_arrive_expect(full(n), R * D * sizeof(T));
#pragma unroll
    for (int part = 0; part < D / kRowElements; ++part)
      ptx::tma_load(tile(n) + part * R * kRowElements, &map, full(n), part * kRowElements, h, row, b);
  }
  __device__ void wait(int n) const { ptx::mbarrier_wait(full(n), n / kStages % 2); }
  __device__ void release(int n) const {
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(empty(n));
  }
};

constexpr int kTileKeys = 128;  // of a step over keys
template <class T, int D>
using KeyRing = Ring<T, D, kTileKeys, D == 64 ? 4 : 2>;

// A block of the grid takes one of these in each round, so that the tiles of the next arrive while the sums of the last are
// written: 128 rows of a head, the first of them `first`, and the tiles that they are multiplied with.
struct Work {
  int head, b, h, first, begin, tiles;
};

// Work comes longest first: with every other round reversed no block always takes the longer ones.
__device__ inline int item_of(int round) {
  return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

__device__ inline int blocks_of_head(int rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// Queries, and the tiles of keys that they see. Within a section those with the most keys come first.
__device__ inline Work query_work(const Attention& p, int item) {
  const int blocks = blocks_of_head(p.T), shift = p.S - p.T;
  const auto [head, b, h, nth] = place(p, item, blocks);
  const int first = (blocks - 1 - nth) * kBlockRows;
  const int last_key = first + kBlockRows + shift < p.S ? first + kBlockRows + shift : p.S;  // one past it
  const int begin = first_key(p, b, first) / kTileKeys, tiles = (last_key + kTileKeys - 1) / kTileKeys - begin;
  return {head, b, h, first, begin, tiles};
}

// The tile of a block's own rows, and of the rows that it takes next, where there is room for both.
template <class T, int D>
using OwnRing = Ring<T, D, kBlockRows, D == 64 ? 2 : 1>;

// One of these fills a multiprocessor's registers.
inline unsigned blocks_for(int64_t items, const Launch& at) {
  return static_cast<unsigned>(items < at.multiprocessors ? items : at.multiprocessors);
}

// Starts c (64, 8 N) = a b^T: 64 rows, from `a` on, of a tile of the block's own, and a tile of 8 N rows.
template <class T, int D, int N>
__device__ void start_by_rows(float (&c)[N][4], const T* a, const T* b) {
  ptx::wgmma_fence();
  const uint64_t a_begin = ptx::wgmma_operand(a), b_begin = ptx::wgmma_operand(b);
#pragma unroll
  for (int d = 0; d < D; d += 16) {
    const int part = d / kRowElements * kRowElements, column = d % kRowElements;
    ptx::wgmma_by_rows(T{}, c, a_begin + (part * kBlockRows + column) / kVector<T>,
                       b_begin + (part * N * 8 + column) / kVector<T>, d > 0);
  }
  ptx::wgmma_commit();
}

// Starts c (64, D) += a b: 64 rows in registers, and a tile of 16 K rows.
template <class T, int D, int K>
__device__ void start_by_columns(float (&c)[D / 8][4], const uint32_t (&a)[K][4], const T* b) {
  ptx::wgmma_fence();
  const uint64_t begin = ptx::wgmma_operand(b, K * 16 * kRowElements * sizeof(T));
#pragma unroll
  for (int step = 0; step < K; ++step)
    ptx::wgmma_by_columns(T{}, c, a[step], begin + step * 16 * kRowElements / kVector<T>);
  ptx::wgmma_commit();
}

// An accumulator as the A operand of start_by_columns.
template <class T, int K>
__device__ void to_a(uint32_t (&a)[K][4], const float (&c)[2 * K][4]) {
#pragma unroll
  for (int step = 0; step < K; ++step) to_a<T>(a[step], c, step);
}

// Of a warp's 16 x 128 tile, keys along its columns.
template <bool kMark = false>
__device__ inline void drop(float (&c)[2 * kKeys / 8][4], const Dropout& dropout, uint64_t seed, int head, int row, int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    drop<kMark>(reinterpret_cast<float(&)[kKeys / 8][4]>(c[half * kKeys / 8]), dropout, seed, head, row, key + half * kKeys);
}

// A dimension of one element has any stride, and the driver asks for a valid one.
inline uint64_t stride_bytes(int64_t size, int64_t elements) { return size == 1 ? 16 : static_cast<uint64_t>(elements) * 2; }

inline TensorMap map_of(const Attention& p, const Heads& x, int tokens, uint32_t box_rows, const Launch& at) {
  return tensor_map(p.dtype, x.data, {uint64_t(p.D), uint64_t(p.H), uint64_t(tokens), uint64_t(p.B)},
                    {stride_bytes(p.H, x.head), stride_bytes(tokens, x.token), stride_bytes(p.B, x.batch)},
                    {kRowElements, 1, box_rows, 1}, at);
}

}  // namespace pygpt::cuda
