// Packed panels and the small matrix products of attention, for one instruction set (see foreach_isa.h).
//
// A panel is an array of 32-bit units. With kPair<T> == 1 a unit is a float. Where the machine multiplies bfloat16
// (avx512_bf16) it is a pair of bfloat16 that are neighbours along the summed dimension, kPair<bf16> is 2, and one
// instruction sums both products in float32; everything else stays the same.

namespace pygpt::PYGPT_ISA {

template <class T>
constexpr int kPair = 1;
#ifdef PYGPT_AVX512_BF16
template <>
constexpr int kPair<bf16> = 2;
#endif

// The register block of a product: rows times vectors of accumulators.
constexpr int kRows = PYGPT_LANES == 16 ? 8 : 4;
constexpr int kVectors = 2;
// Rows that go through a product together, column by column of its blocks: the second operand, which with all the others does
// not fit the first-level cache, is read once for all of them.
constexpr int kGroup = 4 * kRows;

constexpr int64_t kBlock = kAttentionBlock;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// --- products ------------------------------------------------------------------------------------------------------

// What becomes of a product: c = ab, c = factor[0] ab, c = c + ab, or row by row c[r] = factor[r] c[r] + (ab)[r].
enum class Into { assign, scale, add, rescale };

template <int PAIR>
PYGPT_INLINE vf multiply_add(vf sum, const float* a, vf b) {
#ifdef PYGPT_AVX512_BF16
  if constexpr (PAIR == 2) {
    int32_t unit;
    std::memcpy(&unit, a, sizeof unit);
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(unit), (__m512bh)b);
  }
#endif
  return sum + b * *a;
}

// c (kRows x VECTORS * kLanes) from the product a b over k units.
// a is (kRows x k) with row stride lda, or ACROSS: (k x kRows) with row stride lda. b is (k x ...) with row stride ldb.
// A function of its own: among a kernel's other values there are not registers enough for its addresses.
template <int PAIR, bool ACROSS, Into INTO, int VECTORS>
__attribute__((noinline)) static void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                                    int64_t ldc, int64_t k, const float* factor) {
  vf sum[kRows][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = vf{};
#pragma GCC unroll 2
  for (int64_t i = 0; i < k; ++i) {
    vf row[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + i * ldb + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v)
        sum[r][v] = multiply_add<PAIR>(sum[r][v], ACROSS ? a + i * lda + r : a + r * lda + i, row[v]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* at = c + r * ldc + v * kLanes;
      if constexpr (INTO == Into::scale) sum[r][v] *= *factor;
      if constexpr (INTO == Into::add) sum[r][v] += load(at);
      if constexpr (INTO == Into::rescale) sum[r][v] += load(at) * factor[r];
      store(at, sum[r][v]);
    }
}

// The same for any number of columns and a multiple of kRows rows; columns up to the next multiple of kLanes are computed too.
template <int PAIR, bool ACROSS, Into INTO>
PYGPT_INLINE void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
                          int64_t rows, int64_t columns, const float* factor = nullptr) {
  const int64_t next = ACROSS ? kRows : kRows * lda;
  int64_t at = 0;
  for (; at + (kVectors - 1) * kLanes < columns; at += kVectors * kLanes)
    for (int64_t r = 0; r < rows; r += kRows)
      product_block<PAIR, ACROSS, INTO, kVectors>(a + r / kRows * next, lda, b + at, ldb, c + r * ldc + at, ldc, k,
                                                  INTO == Into::rescale ? factor + r : factor);
  for (; at < columns; at += kLanes)
    for (int64_t r = 0; r < rows; r += kRows)
      product_block<PAIR, ACROSS, INTO, 1>(a + r / kRows * next, lda, b + at, ldb, c + r * ldc + at, ldc, k,
                                           INTO == Into::rescale ? factor + r : factor);
}

// --- packing -------------------------------------------------------------------------------------------------------

// The units of one row from its element `first` on: kLanes units, zero beyond the n elements that are left.
template <class T>
PYGPT_INLINE vf load_units(const T* row, int64_t first, int64_t D) {
  const int64_t n = smaller(D - first, kLanes * kPair<T>);
  if constexpr (kPair<T> == 1) {
    return n <= 0 ? vf{} : n < kLanes ? load(row + first, n) : load(row + first);
  } else {
    vf v = {};
    if (n == 2 * kLanes)
      std::memcpy(&v, row + first, sizeof v);
    else if (n > 0)
      std::memcpy(&v, row + first, n * sizeof(T));
    return v;
  }
}

// Rows as the first operand of a product, or with kPair 1 as either: (rows x width / kPair units).
template <class T>
static void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t D, int64_t width, float* to) {
  const int64_t units = width / kPair<T>;
  for (int64_t r = 0; r < rows; ++r, from += stride, to += units)
    for (int64_t u = 0; u < units; u += kLanes) store(to + u, load_units(from, u * kPair<T>, D));
}

// kLanes units that each hold an element of one row and the element below it; zero beyond n elements or without `odd`.
template <class T>
PYGPT_INLINE vf load_pair_of_rows(const T* even, const T* odd, int64_t n) {
  vh low = {}, high = {};
  if (n >= kLanes) {
    std::memcpy(&low, even, sizeof low);
    if (odd) std::memcpy(&high, odd, sizeof high);
  } else if (n > 0) {
    std::memcpy(&low, even, n * sizeof(T));
    if (odd) std::memcpy(&high, odd, n * sizeof(T));
  }
  return (vf)(__builtin_convertvector(low, vu) | __builtin_convertvector(high, vu) << 16);
}

// Rows as the second operand of a product that sums over them: (rows / kPair x width units).
template <class T>
static void pack_summed_rows(const T* from, int64_t stride, int64_t rows, int64_t D, int64_t width, float* to) {
  if constexpr (kPair<T> == 1) {
    pack_rows(from, stride, rows, D, width, to);
  } else {
    for (int64_t r = 0; r < rows; r += 2, from += 2 * stride)
      for (int64_t d = 0; d < width; d += kLanes, to += kLanes)
        store(to, load_pair_of_rows(from + d, r + 1 < rows ? from + stride + d : nullptr, D - d));
  }
}

// Rows as the second operand of a product over D: (width / kPair units x kBlock rows), absent rows zero.
template <class T>
static void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t D, int64_t width, float* to) {
  for (int64_t u = 0; u < width / kPair<T> && u * kPair<T> < D; u += kLanes)
    for (int64_t r = 0; r < kBlock; r += kLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        block[i] = r + i < rows ? load_units(from + (r + i) * stride, u * kPair<T>, D) : vf{};
      transpose<kLanes / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (u + i) * kBlock + r, block[i]);
    }
}

#ifdef PYGPT_AVX512_BF16
// 32 neighbours of one row as 16 units.
PYGPT_INLINE vf pair_along(vf first, vf second) { return (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

// 16 elements each of an even row and the odd one after it, as units that span both.
PYGPT_INLINE vf pair_across(vf even, vf odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const vi lane = lane_numbers();
  return (vf)_mm512_permutexvar_epi16((__m512i)(lane | (lane + kLanes) << 16), both);
}
#endif

}  // namespace pygpt::PYGPT_ISA
