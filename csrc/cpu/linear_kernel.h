// Linear layers of few rows, and the gradient of a bias, for one instruction set (see foreach_isa.h).
//
// Generation multiplies one row, or a few, with every weight: the time is that of reading the weights once, so what counts is
// that they stream in. A tile's rows of weight are far apart, each in a page of its own: processors fetch ahead within a page
// only, and one stream at a time reaches two thirds of what eight do. A tile is multiplied with all rows of x while it is in
// the cache.

#include "cpu/pair.h"

namespace pygpt::PYGPT_ISA {

// How many elements of a weight row, of type W, a step takes, and the products of a step added to the sums of each lane.
template <class W>
constexpr int64_t kProductStep = kLanes;
PYGPT_INLINE vf add_products(vf sum, vf a, vf b) { return sum + a * b; }
template <class W>
PYGPT_INLINE vf load_operand(const W* p, int64_t n) {
  return load_step(p, n);
}

// Pairs of bf16, the first in a lane's low half.
template <>
constexpr int64_t kProductStep<bf16> = 2 * kLanes;
#ifdef PYGPT_AVX512_BF16
PYGPT_INLINE vf add_products(vf sum, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
#else
PYGPT_INLINE vf add_products(vf sum, vu a, vu b) {
  sum += (vf)(a << 16) * (vf)(b << 16);
  return sum + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
}
#endif
PYGPT_INLINE vu load_operand(const bf16* p, int64_t n) {
#if PYGPT_LANES == 16
  return (vu)(n == 2 * kLanes ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffff, n), p));
#else
  vu pairs = {};
  n == 2 * kLanes ? std::memcpy(&pairs, p, sizeof pairs) : std::memcpy(&pairs, p, n * sizeof(bf16));
  return pairs;
#endif
}

// The products of the n elements from k on of M rows of x and N of weight, every apart-th one, added to sum.
template <int M, int N, class X, class W>
PYGPT_INLINE void add_step(vf* sum, const X* x, const W* weight, int64_t k, int64_t n, int64_t K, int64_t apart) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const auto w = load_operand(weight + i * apart * K + k, n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m * N + i] = add_products(sum[m * N + i], load_operand(x + m * K + k, n), w);
  }
}

// What a tile asks memory for while it computes: weights `distance` elements further on, in its rows first, first + every, ...
struct Ask {
  int64_t distance, first, every;
};

// y[m][n] = (x[m] . weight[n]) scale[n] + bias[n] for M rows of x and N of weight, every apart-th one, of K elements each; scale
// and bias may be null, and y's rows are y_stride apart.
template <int M, int N, class X, class W, class Y>
PYGPT_INLINE void linear_tile(const X* x, const W* weight, const float* scale, const Y* bias, Y* y, int64_t K, int64_t apart,
                              int64_t y_stride, Ask ask) {
  constexpr int64_t kStep = kProductStep<W>;
  constexpr int kVectors = (M * N + kLanes - 1) / kLanes;
  vf sum[M * N] = {};
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
#if PYGPT_LANES == 16
    if (ask.first == 0) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) __builtin_prefetch(weight + i * apart * K + k + ask.distance);
    }
#else  // Into the second-level cache: the first would not hold the next tile as well. Asking once a line is slower than twice.
    if (k % (32 / sizeof(W)) == 0)
      for (int64_t i = ask.first; i < N; i += ask.every) __builtin_prefetch(weight + i * apart * K + k + ask.distance, 0, 2);
#endif
    add_step<M, N>(sum, x, weight, k, kStep, K, apart);
  }
  if (k < K) add_step<M, N>(sum, x, weight, k, K - k, K, apart);
  Y out[kVectors * kLanes];
  vf factor = splat(1.0f), shift = {};  // N divides kLanes
  if (scale)
    for (int i = 0; i < kLanes; ++i) factor[i] = scale[i % N * apart];
  if (bias)
    for (int i = 0; i < kLanes; ++i) shift[i] = load(bias + i % N * apart, 1)[0];
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    vf some[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) some[l] = i * kLanes + l < M * N ? sum[i * kLanes + l] : vf{};
    store(out + i * kLanes, sum_each(some) * factor + shift);
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i) y[m * y_stride + i * apart] = out[m * N + i];
}

template <class T>
PYGPT_INLINE const T* at(const T* p, int64_t n) {
  return p ? p + n : nullptr;
}

// All rows of x by N of weight, as many at a time as leave their sums in registers.
template <int N, class X, class W, class Y>
PYGPT_INLINE void linear_rows(const X* x, const W* weight, const float* scale, const Y* bias, Y* y, int64_t rows, int64_t K,
                              int64_t apart, int64_t y_stride) {
  constexpr int64_t kNear = 1024 / sizeof(W);
#if PYGPT_LANES == 16
  // The first pass asks for all, a little ahead.
  Ask ask{kNear, 0, 1};
  for (; rows >= 8; rows -= 8, x += 8 * K, y += 8 * y_stride, ++ask.first) {
    constexpr int kPair = N % 2 == 0 ? 2 : 1;
    for (int64_t i = 0, n = 0; i < N; i += kPair, n += kPair * apart)
      linear_tile<8, kPair>(x, weight + n * K, at(scale, n), at(bias, n), y + n, K, apart, y_stride, ask);
  }
  if (rows >= 4) {
    constexpr int kMost = N < 4 ? N : 4;
    for (int64_t i = 0, n = 0; i < N; i += kMost, n += kMost * apart)
      linear_tile<4, kMost>(x, weight + n * K, at(scale, n), at(bias, n), y + n, K, apart, y_stride, ask);
    rows -= 4, x += 4 * K, y += 4 * y_stride, ++ask.first;
  }
#else
  // Threes, and the last four, if there are, together: a sum in memory costs less than another pass. Each of several passes
  // asks for its share of the next tile, so that memory is not idle in any.
  const int64_t passes = larger(1, (rows + 1) / 3);
  Ask ask{passes > 1 ? K : kNear, 0, passes};
  for (; rows == 3 || rows > 4; rows -= 3, x += 3 * K, y += 3 * y_stride, ++ask.first)
    linear_tile<3, N>(x, weight, scale, bias, y, K, apart, y_stride, ask);
  if (rows == 4) return linear_tile<4, N>(x, weight, scale, bias, y, K, apart, y_stride, ask);
#endif
  for (; rows >= 2; rows -= 2, x += 2 * K, y += 2 * y_stride, ++ask.first)
    linear_tile<2, N>(x, weight, scale, bias, y, K, apart, y_stride, ask);
  if (rows) linear_tile<1, N>(x, weight, scale, bias, y, K, apart, y_stride, ask);
}

// x (rows, K), weight (columns, K), scale and bias (columns) or null -> y, `columns` wide, its rows y_stride apart. X and Y are
// W, but where weights are int8: there x is float, so that it is converted once and not for each tile.
template <class X, class W, class Y>
void linear_few_rows(const X* x, const W* weight, const float* scale, const Y* bias, Y* y, int64_t rows, int64_t columns, int64_t K,
                     int64_t y_stride) {
  constexpr int kStreams = kLanes == 16 ? 8 : 4;  // as many as leave registers for two rows of x, 4 for three
  const int64_t apart = columns / kStreams;
  int64_t n = 0;
  for (; n < apart; ++n)
    linear_rows<kStreams>(x, weight + n * K, at(scale, n), at(bias, n), y + n, rows, K, apart, y_stride);
  for (n = kStreams * apart; n < columns; ++n)
    linear_rows<1>(x, weight + n * K, at(scale, n), at(bias, n), y + n, rows, K, 1, y_stride);
}

constexpr int kAddedRows = 16;  // at a time, so that sums, in the first-level cache, are seldom written

template <int ROWS, class T>
PYGPT_INLINE Pair sum_of_rows(const T* x, int64_t columns, int64_t n) {
  Pair sum = load_pair_step(x, n);
#pragma GCC unroll 16
  for (int i = 1; i < ROWS; ++i) sum = sum + load_pair_step(x + i * columns, n);
  return sum;
}

// sums += ROWS rows of x.
template <int ROWS, class T>
PYGPT_INLINE void add_rows_to(float* sums, const T* x, int64_t columns) {
  PYGPT_FOR_PAIRS(columns, store_pair(sums + i, load_pair(sums + i) + sum_of_rows<ROWS>(x + i, columns, n));)
}

// sums = the sum of the rows of x (rows, columns), in the order of pairs of T and with whole pairs (see pair.h).
template <class T>
void sum_rows(const T* x, float* sums, int64_t rows, int64_t columns) {
  std::memset(sums, 0, (columns + kPair - 1) / kPair * kPair * sizeof *sums);
  for (; rows >= kAddedRows; rows -= kAddedRows, x += kAddedRows * columns) add_rows_to<kAddedRows>(sums, x, columns);
  for (; rows > 0; --rows, x += columns) add_rows_to<1>(sums, x, columns);
}

// y = the sums of sum_rows<T>, rounded.
template <class T>
void round_to(const float* sums, T* y, int64_t count) {
  PYGPT_FOR_PAIRS(count, store_pair_step(y + i, load_pair(sums + i), n);)
}

}  // namespace pygpt::PYGPT_ISA
