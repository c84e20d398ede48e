// A vector of PYGPT_LANES floats, written with the compiler's vector extension so that one text serves every
// instruction set. Included by foreach_isa.h only, once per instruction set; hence no include guard.

namespace pygpt::PYGPT_ISA {

constexpr int kLanes = PYGPT_LANES;

typedef float vf __attribute__((vector_size(4 * PYGPT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * PYGPT_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * PYGPT_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * PYGPT_LANES)));

#define PYGPT_INLINE static inline __attribute__((always_inline, unused))

PYGPT_INLINE vf splat(float x) { return x - vf{}; }

PYGPT_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

PYGPT_INLINE vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

PYGPT_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
PYGPT_INLINE void store(bf16* p, vf v) {
#ifdef PYGPT_AVX512_BF16
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu bits = (vu)(v != v ? (vi)((u >> 16) | 0x40) : (vi)rounded);
  vh h = __builtin_convertvector(bits, vh);
  std::memcpy(p, &h, sizeof h);
#endif
}

// The first n < kLanes elements; the other lanes are zero.
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

// Runs the body over 0 .. C in steps of kLanes, with `i` the first element and `n` how many there are: a constant in
// all steps but the last, so that load_step and store_step cost nothing there.
#define PYGPT_FOR_LANES(C, ...)              \
  {                                          \
    int64_t i = 0;                           \
    for (; i + kLanes <= (C); i += kLanes) { \
      constexpr int64_t n = kLanes;          \
      __VA_ARGS__                            \
    }                                        \
    if (i < (C)) {                           \
      const int64_t n = (C) - i;             \
      __VA_ARGS__                            \
    }                                        \
  }

template <class T>
PYGPT_INLINE vf load_step(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load(p, n);
}

template <class T>
PYGPT_INLINE void store_step(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store(p, v, n);
}

PYGPT_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

PYGPT_INLINE vi lane_numbers() {
  vi v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// 2^x. DEGREE 5: within 2 ulp for -126 <= x < 127.5; 4: relative error 3e-6; 3: 1e-4. Below -126.5 (and for -inf) 0,
// above 127.5 inf, NaN stays NaN, 2^0 is exactly 1. Minimax polynomials of 2^f on [-1/2, 1/2] that are 1 at 0.
template <int DEGREE = 5>
PYGPT_INLINE vf vexp2(vf x) {
  static_assert(DEGREE >= 3 && DEGREE <= 5);
  const vf low = splat(-127.0f), high = splat(128.0f), round = splat(12582912.0f);  // 1.5 * 2^23: ulp 1
  x = low > x ? low : x;  // in this order NaN passes
  x = high < x ? high : x;
  const vf rounded = x + round, f = x - (rounded - round);
  vf p;
  if constexpr (DEGREE == 5)
    p = ((((splat(1.3264727e-3f) * f + 9.671513e-3f) * f + 5.5507336e-2f) * f + 0.24022242f) * f + 0.693147f) * f + 1.0f;
  else if constexpr (DEGREE == 4)
    p = (((splat(9.582853e-3f) * f + 5.5906426e-2f) * f + 0.24024099f) * f + 0.6931242f) * f + 1.0f;
  else
    p = ((splat(5.500893e-2f) * f + 0.24221095f) * f + 0.6932829f) * f + 1.0f;
  // The integer lies in rounded's low bits; as an exponent, -127 is the factor 0 and 128 the factor inf.
  return p * (vf)(((vi)rounded << 23) + (127 << 23));
}

// Sums, or takes the largest of, the lanes pairwise: lower half with upper half, the same order whatever surrounds it.
template <int N>
struct FloatVector {
  typedef float type __attribute__((vector_size(4 * N)));
};

template <bool MAX, int N>
PYGPT_INLINE float reduce(typename FloatVector<N>::type v) {
  if constexpr (N == 2) {
    return MAX ? (v[0] > v[1] ? v[0] : v[1]) : v[0] + v[1];
  } else {
    typename FloatVector<N / 2>::type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return reduce<MAX, N / 2>(MAX ? (low > high ? low : high) : low + high);
  }
}

PYGPT_INLINE float reduce_add(vf v) { return reduce<false, kLanes>(v); }
PYGPT_INLINE float reduce_max(vf v) { return reduce<true, kLanes>(v); }

}  // namespace pygpt::PYGPT_ISA
