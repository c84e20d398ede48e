// Tiles of rows in shared memory, and their products on tensor cores: shared by attention's forward and backward.
//
// A tile is R rows of D 16-bit elements. The 16-byte pieces of a row are permuted by the row's number, so that the 8 rows
// that an ldmatrix reads lie in different banks.
#pragma once

#include "cuda/attention.h"
#include "cuda/ptx.h"
#include "cuda/shared.h"
#include "cuda/warp.h"

namespace pygpt::cuda {

constexpr int kTileThreads = 128;  // 4 warps, each with 16 rows of the block's 64
constexpr int kTileRows = 64;
constexpr int kKeys = 64;  // of a step over keys: as many as a counter of the dropout mask stands for
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kNegativeInfinity = -__builtin_huge_valf();

template <class T, int D>
struct Tile {
  T* data;

  __device__ T* piece(int row, int piece) const { return data + row * D + (piece ^ (row & 7)) * 8; }

  // Rows begin .. begin + R - 1 of one head, zeros beyond `rows` rows and beyond head_dim elements.
  template <int R>
  __device__ void copy_from(const T* head, int64_t stride, int begin, int rows, int head_dim) const {
    constexpr int kPieces = D / 8, kStep = kTileThreads / kPieces;  // kStep: rows that the block copies at once
    static_assert(kStep % 8 == 0);                                 // so that a thread's pieces stay in their column
    const int row = threadIdx.x / kPieces, column = threadIdx.x % kPieces;
    T* to = piece(row, column);
    const T* from = head + (begin + row) * stride + column * 8;
#pragma unroll
    for (int i = 0; i < R; i += kStep) {
      const bool valid = begin + row + i < rows && column * 8 < head_dim;
      ptx::cp_async_16(to + i * D, valid ? from : head, valid);
      from += kStep * stride;
    }
  }
};

// The A operand: 16 rows from `row`, 16 columns from 16 * step.
template <class T, int D>
__device__ void load_a(uint32_t (&a)[4], Tile<T, D> tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
  ptx::ldmatrix_x4(a, tile.piece(row + lane % 16, step * 2 + lane / 16));
}

// c (16, 8 N) += a (16, 16) times columns 16 * step .. of the tile's rows `row` .. row + 8 N - 1, transposed: rows of the
// tile are columns of c.
template <int N, class T, int D>
__device__ void multiply_by_rows(float (&c)[N][4], const uint32_t (&a)[4], Tile<T, D> tile, int row, int step) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, tile.piece(row + n * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
    ptx::mma_m16n8k16(T{}, c[n], a, b[0], b[1]);
    ptx::mma_m16n8k16(T{}, c[n + 1], a, b[2], b[3]);
  }
}

// c (16, D) += a (16, 16) times rows `row` .. row + 15 of the tile.
template <class T, int D>
__device__ void multiply_by_columns(float (&c)[D / 8][4], const uint32_t (&a)[4], Tile<T, D> tile, int row) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4_transposed(b, tile.piece(row + lane % 16, n + lane / 16));
    ptx::mma_m16n8k16(T{}, c[n], a, b[0], b[1]);
    ptx::mma_m16n8k16(T{}, c[n + 1], a, b[2], b[3]);
  }
}

// Columns 16 * step .. of an accumulator, as the A operand of the next product.
template <class T, int N>
__device__ void to_a(uint32_t (&a)[4], const float (&c)[N][4], int step) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    a[2 * half] = ptx::pack(T{}, c[2 * step + half][0], c[2 * step + half][1]);
    a[2 * half + 1] = ptx::pack(T{}, c[2 * step + half][2], c[2 * step + half][3]);
  }
}

// Among four neighbouring threads: x[i] of the j-th becomes x[j] of the i-th.
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = x[i], &high = x[i | step];
      const uint32_t other = __shfl_xor_sync(kWholeWarp, lane & step ? low : high, step);
      (lane & step ? low : high) = other;
    }
  }
}

// Writes an accumulator's rows row .. row + 15 of one head, those below `rows`, times `factor`. The whole warp calls it: four
// threads, which have two columns of every eight, exchange them and write 16 bytes each.
template <class T, int N>
__device__ void store_rows(const float (&c)[N][4], T* head, int64_t stride, int row, int rows, int head_dim, float factor) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + lane / 4 + half * 8;
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = ptx::pack(T{}, c[n + i][2 * half] * factor, c[n + i][2 * half + 1] * factor);
      transpose_quad(pairs);
      const int column = (n + lane % 4) * 8;
      if (at < rows && column < head_dim)
        *reinterpret_cast<uint4*>(head + at * stride + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

// Drops elements of a warp's 16 x 64 tile of probabilities and scales those kept; or only marks those dropped, by their sign.
template <bool kMark = false>
__device__ inline void drop(float (&p)[kKeys / 8][4], const Dropout& dropout, uint64_t seed, uint32_t head, int row, int key) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // each thread's 16 keys of a query are the four words of four counters
    const int half = i / 4, odd = i / 2 % 2, element = i % 2;
    const Words words = dropout_words(seed, head, row + lane / 4 + half * 8, key + odd * 8 + lane % 4 * 2 + element);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      float& x = p[2 * word + odd][2 * half + element];
      const bool kept = words.at[word] >= dropout.threshold;
      if constexpr (kMark)
        x = kept ? x : -x;
      else
        x = kept ? x * dropout.kept_scale : 0.0f;
    }
  }
}

template <class T>
__device__ T* head_of(const Heads& x, int b, int h) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head;
}

}  // namespace pygpt::cuda
