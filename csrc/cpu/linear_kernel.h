// Linear layers of few rows, for one instruction set (see foreach_isa.h). T: dtype of x, weight and y.
//
// Generation multiplies one row, or a few, with every weight: the time is that of reading the weights once, so what counts is
// that they stream in. Each tile of weight rows is multiplied with all rows of x while it is in the first-level cache.

namespace pygpt::PYGPT_ISA {

// How many elements of T a step takes, and the products of a step added to the sums of each lane.
template <class T>
constexpr int64_t kProductStep = kLanes;
PYGPT_INLINE vf add_products(vf sum, vf a, vf b) { return sum + a * b; }
template <class T>
PYGPT_INLINE vf load_operand(const T* p, int64_t n) {
  return load_step(p, n);
}

#ifdef PYGPT_AVX512_BF16
template <>
constexpr int64_t kProductStep<bf16> = 2 * kLanes;
PYGPT_INLINE vf add_products(vf sum, __m512bh a, __m512bh b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
PYGPT_INLINE __m512bh load_operand(const bf16* p, int64_t n) {
  return (__m512bh)(n == 2 * kLanes ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffff, n), p));
}
#endif

// Lane l: the sum of all lanes of v[l], for kLanes vectors, which are overwritten. Each step adds the two halves of every
// group of lanes and fills the freed half with another vector's.
PYGPT_INLINE vf sum_each(vf* v) {
  const vi lane = lane_numbers();
#pragma GCC unroll 8
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    const vi second = (lane & width) * (kLanes / width);  // of the two vectors
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i)
      v[i] = shuffle(v[i], v[i + width], lane + second) + shuffle(v[i], v[i + width], (lane ^ width) + second);
  }
  return v[0];
}

// y[m][n] = x[m] . weight[n] + bias[n] for M rows of x and N of weight, K elements each; y's rows are y_stride apart. Asks for
// the memory `ahead` elements further on than the weights.
template <int M, int N, class T>
PYGPT_INLINE void linear_tile(const T* x, const T* weight, const T* bias, T* y, int64_t K, int64_t y_stride, int64_t ahead) {
  constexpr int64_t kStep = kProductStep<T>;
  constexpr int kVectors = (M * N + kLanes - 1) / kLanes;
  vf sum[kVectors * kLanes] = {};
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      if (ahead) __builtin_prefetch(weight + i * K + k + ahead);
      const auto w = load_operand(weight + i * K + k, kStep);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m * N + i] = add_products(sum[m * N + i], load_operand(x + m * K + k, kStep), w);
    }
  }
  if (k < K) {
    for (int i = 0; i < N; ++i)
      for (int m = 0; m < M; ++m)
        sum[m * N + i] = add_products(sum[m * N + i], load_operand(x + m * K + k, K - k), load_operand(weight + i * K + k, K - k));
  }
  T out[kVectors * kLanes];
  vf shift = {};
  if (bias)
    for (int i = 0; i < kLanes; ++i) shift[i] = load(bias + i % N, 1)[0];  // N divides kLanes
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) store(out + i * kLanes, sum_each(sum + i * kLanes) + shift);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) std::memcpy(y + m * y_stride, out + m * N, N * sizeof(T));
}

// x (rows, K), weight (columns, K), bias (columns) or null -> y, `columns` wide, its rows y_stride apart.
template <int N, class T>
PYGPT_INLINE void linear_columns(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t columns, int64_t K,
                                 int64_t y_stride) {
  for (int64_t n = 0; n + N <= columns; n += N, weight += N * K, bias += bias ? N : 0, y += N) {
    const T* in = x;
    T* out = y;
    int64_t left = rows, ahead = N * K;
    for (; left >= 8; left -= 8, in += 8 * K, out += 8 * y_stride, ahead = 0) {
      for (int i = 0; i < N; i += 2)
        linear_tile<8, 2>(in, weight + i * K, bias ? bias + i : nullptr, out + i, K, y_stride, ahead);
    }
    if (left >= 4) {
      linear_tile<4, N>(in, weight, bias, out, K, y_stride, ahead);
      left -= 4, in += 4 * K, out += 4 * y_stride, ahead = 0;
    }
    if (left >= 2) {
      linear_tile<2, N>(in, weight, bias, out, K, y_stride, ahead);
      left -= 2, in += 2 * K, out += 2 * y_stride, ahead = 0;
    }
    if (left) linear_tile<1, N>(in, weight, bias, out, K, y_stride, ahead);
  }
}

template <class T>
void linear_few_rows(const T* x, const T* weight, const T* bias, T* y, int64_t rows, int64_t columns, int64_t K,
                     int64_t y_stride) {
  linear_columns<4>(x, weight, bias, y, rows, columns, K, y_stride);
  const int64_t done = columns / 4 * 4;
  for (int64_t n = done; n < columns; ++n)
    for (int64_t row = 0; row < rows; ++row)
      linear_tile<1, 1>(x + row * K, weight + n * K, bias ? bias + n : nullptr, y + row * y_stride + n, K, y_stride, 0);
}

}  // namespace pygpt::PYGPT_ISA
