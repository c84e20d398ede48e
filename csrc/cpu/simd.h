// A vector of PYGPT_LANES floats, written with the compiler's vector extension so that one text serves every
// instruction set. Included by foreach_isa.h only, once per instruction set; hence no include guard.

namespace pygpt::PYGPT_ISA {

constexpr int kLanes = PYGPT_LANES;

typedef float vf __attribute__((vector_size(4 * PYGPT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * PYGPT_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * PYGPT_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * PYGPT_LANES)));
typedef int8_t vb __attribute__((vector_size(PYGPT_LANES)));

#define PYGPT_INLINE static inline __attribute__((always_inline, unused))

// How many elements ahead of those at work kernels ask for memory, where they read several streams at once or compute so much
// that too few reads are under way: a fifth of the time of GELU and of AdamW.
constexpr int64_t kAheadElements = 512;

PYGPT_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
PYGPT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYGPT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

PYGPT_INLINE vf splat(float x) { return x - vf{}; }

PYGPT_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// 16-bit elements, in the upper halves of the lanes; the lower ones are zero.
PYGPT_INLINE vu load_upper(const void* p) {
#if PYGPT_LANES == 8  // GCC 12 makes five instructions of the conversion below
  return (vu)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vh h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu) << 16;
#endif
}

PYGPT_INLINE void store_upper(void* p, vu v) {
#if PYGPT_LANES == 8
  const __m256i h = _mm256_srli_epi32((__m256i)v, 16), packed = _mm256_packus_epi32(h, h);  // each half by itself
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  vh h = __builtin_convertvector(v >> 16, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

PYGPT_INLINE vf load(const bf16* p) { return (vf)load_upper(p); }

PYGPT_INLINE vf load(const int8_t* p) {
#if PYGPT_LANES == 16
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif PYGPT_LANES == 8
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

PYGPT_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Rounded to bf16, in the upper halves of the lanes: to nearest, ties to even; NaN stays NaN. The lower halves are noise.
PYGPT_INLINE vu round_upper(vf v) {
  const vu u = (vu)v, rounded = u + 0x7fff + ((u >> 16) & 1);
  return (vu)(v != v ? (vi)(u | 0x400000) : (vi)rounded);
}

PYGPT_INLINE void store(bf16* p, vf v) {
#ifdef PYGPT_AVX512_BF16
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  store_upper(p, round_upper(v));
#endif
}

// The first n < kLanes elements; the other lanes are zero.
#if PYGPT_LANES == 16
PYGPT_INLINE vf load(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(_bzhi_u32(0xffff, n), p); }
PYGPT_INLINE vu load_upper(const void* p, int64_t n) {
  return (vu)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(_bzhi_u32(0xffff, n), p)), 16);
}
PYGPT_INLINE void store_upper(void* p, vu v, int64_t n) {
  _mm256_mask_storeu_epi16(p, _bzhi_u32(0xffff, n), _mm512_cvtepi32_epi16((__m512i)(v >> 16)));
}
PYGPT_INLINE vf load(const bf16* p, int64_t n) { return (vf)load_upper(p, n); }
PYGPT_INLINE vf load(const int8_t* p, int64_t n) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(_bzhi_u32(0xffff, n), p)));
}
PYGPT_INLINE void store(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, _bzhi_u32(0xffff, n), (__m512)v); }
PYGPT_INLINE void store(bf16* p, vf v, int64_t n) {
  bf16 rounded[kLanes];
  store(rounded, v);
  __m256i h;
  std::memcpy(&h, rounded, sizeof h);
  _mm256_mask_storeu_epi16(p, _bzhi_u32(0xffff, n), h);
}
#else
PYGPT_INLINE vu load_upper(const void* p, int64_t n) {
  uint16_t tmp[kLanes] = {};
  std::memcpy(tmp, p, n * sizeof *tmp);
  return load_upper(tmp);
}

PYGPT_INLINE void store_upper(void* p, vu v, int64_t n) {
  uint16_t tmp[kLanes];
  store_upper(tmp, v);
  std::memcpy(p, tmp, n * sizeof *tmp);
}

template <class T>
PYGPT_INLINE vf load(const T* p, int64_t n) {
  T tmp[kLanes] = {};
  std::memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}

template <class T>
PYGPT_INLINE void store(T* p, vf v, int64_t n) {
  T tmp[kLanes];
  store(tmp, v);
  std::memcpy(p, tmp, n * sizeof(T));
}
#endif

// Runs the body over 0 .. C in steps of STEP, with `i` the first element and `n` how many there are: a constant in all
// steps but the last, so that load_step and store_step cost nothing there.
#define PYGPT_FOR_STEPS(STEP, C, ...)        \
  {                                          \
    int64_t i = 0;                           \
    for (; i + (STEP) <= (C); i += (STEP)) { \
      constexpr int64_t n = STEP;            \
      __VA_ARGS__                            \
    }                                        \
    if (i < (C)) {                           \
      const int64_t n = (C) - i;             \
      __VA_ARGS__                            \
    }                                        \
  }
#define PYGPT_FOR_LANES(C, ...) PYGPT_FOR_STEPS(kLanes, C, __VA_ARGS__)

// The same, with `u`, a constant that counts the steps modulo K: for K sums that do not wait for each other.
#define PYGPT_FOR_STEPS_BY(STEP, K, C, ...)                                 \
  {                                                                         \
    int64_t start = 0;                                                      \
    for (; start + (K) * (STEP) <= (C); start += (K) * (STEP))              \
      for (int u = 0; u < (K); ++u) {                                       \
        constexpr int64_t n = STEP;                                         \
        const int64_t i = start + u * (STEP);                               \
        __VA_ARGS__                                                         \
      }                                                                     \
    for (; start < (C); start += (STEP)) {                                  \
      constexpr int u = 0;                                                  \
      const int64_t i = start, n = (C)-i < (STEP) ? (C)-i : int64_t{STEP}; \
      __VA_ARGS__                                                           \
    }                                                                       \
  }
#define PYGPT_FOR_LANES_BY(K, C, ...) PYGPT_FOR_STEPS_BY(kLanes, K, C, __VA_ARGS__)

template <class T>
PYGPT_INLINE vf load_step(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load(p, n);
}

template <class T>
PYGPT_INLINE void store_step(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store(p, v, n);
}

// a > b ? a : b and a < b ? a : b, so that b comes out where one of them is NaN; the compiler needs two instructions for each.
#if PYGPT_LANES == 16
PYGPT_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
PYGPT_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif PYGPT_LANES == 8
PYGPT_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
PYGPT_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
PYGPT_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
PYGPT_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif

PYGPT_INLINE vf vsqrt(vf x) {
#if PYGPT_LANES == 16
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif PYGPT_LANES == 8
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif PYGPT_X86_LEVELS
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

PYGPT_INLINE vi lane_numbers() {
  vi v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// Lane i: element which[i] of a and b one after the other.
PYGPT_INLINE vf shuffle(vf a, vf b, vi which) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a, b, which);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = which[i] < kLanes ? a[which[i]] : b[which[i] - kLanes];
  return v;
#endif
}

// kLanes x kLanes transpose: in step `width`, blocks of that width change places with their mirror image.
template <int WIDTH>
PYGPT_INLINE void transpose(vf rows[kLanes]) {
  const vi lane = lane_numbers(), upper = (lane & WIDTH) != 0;
  const vi pick_low = upper ? lane + (kLanes - WIDTH) : lane, pick_high = upper ? lane + kLanes : lane + WIDTH;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & WIDTH) continue;
    const vf a = rows[i], b = rows[i + WIDTH];
#if defined(__GNUC__) && !defined(__clang__)
    rows[i] = __builtin_shuffle(a, b, pick_low);
    rows[i + WIDTH] = __builtin_shuffle(a, b, pick_high);
#else
    for (int l = 0; l < kLanes; ++l) {
      rows[i][l] = pick_low[l] < kLanes ? a[pick_low[l]] : b[pick_low[l] - kLanes];
      rows[i + WIDTH][l] = pick_high[l] < kLanes ? a[pick_high[l]] : b[pick_high[l] - kLanes];
    }
#endif
  }
  if constexpr (WIDTH > 1) transpose<WIDTH / 2>(rows);
}

// 2^x for x <= 127: by polynomials in the fraction f, |f| <= 1/2, with the least largest relative error among those
// that are 1 at 0. DEGREE 5: 2 ulp; 4: 3e-6; 3: 1e-4. 0 for results below the normal range and for -inf; NaN stays NaN.
template <int DEGREE = 5>
PYGPT_INLINE vf vexp2(vf x) {
  static_assert(DEGREE >= 3 && DEGREE <= 5);
#if PYGPT_LANES == 16
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), whole = x - f;  // f of an infinity is 0
#else
  // 1.5 * 2^23, whose ulp is 1, and an exponent's bias: the low bits of the sum are the exponent of 2^whole.
  const vf round = splat(12582912.0f + 127.0f);
  x = vmax(splat(-127.0f), x);
  const vf shifted = x + round, f = x - (shifted - round);
#endif
  vf p;
  if constexpr (DEGREE == 5)
    p = ((((splat(1.3264727e-3f) * f + 9.671513e-3f) * f + 5.5507336e-2f) * f + 0.24022242f) * f + 0.693147f) * f +
        1.0f;
  else if constexpr (DEGREE == 4)
    p = (((splat(9.582853e-3f) * f + 5.5906426e-2f) * f + 0.24024099f) * f + 0.6931242f) * f + 1.0f;
  else
    p = ((splat(5.500893e-2f) * f + 0.24221095f) * f + 0.6932829f) * f + 1.0f;
#if PYGPT_LANES == 16
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return p * (vf)((vu)shifted << 23);  // -127 makes the factor 0; keys that a query does not see may overflow
#endif
}

// The lanes' sum or maximum, pairwise: lane i with lane i + WIDTH, the same order whatever surrounds the call.
template <bool MAX, int WIDTH>
PYGPT_INLINE float reduce(vf v) {
  const vf other = shuffle(v, v, lane_numbers() ^ WIDTH);
  v = MAX ? vmax(v, other) : v + other;
  if constexpr (WIDTH > 1)
    return reduce<MAX, WIDTH / 2>(v);
  else
    return v[0];
}

PYGPT_INLINE float reduce_add(vf v) { return reduce<false, kLanes / 2>(v); }
PYGPT_INLINE float reduce_max(vf v) { return reduce<true, kLanes / 2>(v); }

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

}  // namespace pygpt::PYGPT_ISA
