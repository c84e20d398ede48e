// Rows in steps of two vectors, for kernels that memory should bound. Included by kernels, once per instruction set like
// simd.h; hence no include guard.
//
// A bf16 vector costs a permutation to load and another to store, on few ports of a processor. A pair of vectors needs none
// to load, as long as nobody minds which element lies in which lane: those of even index are a shift away, those of odd index
// a mask. What meets them, weights and sums of columns, has to lie in the same order.

namespace pygpt::PYGPT_ISA {

constexpr int64_t kPair = 2 * kLanes;

// Elements of a row: of float32 the first kLanes and the others, of bf16 those of even index and those of odd index.
struct Pair {
  vf a, b;
};

PYGPT_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
PYGPT_INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
PYGPT_INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
PYGPT_INLINE Pair operator-(Pair x, vf y) { return {x.a - y, x.b - y}; }
PYGPT_INLINE Pair operator*(Pair x, vf y) { return {x.a * y, x.b * y}; }

PYGPT_INLINE Pair halves(vu v) { return {(vf)(v << 16), (vf)(v & 0xffff0000u)}; }

PYGPT_INLINE Pair load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

PYGPT_INLINE Pair load_pair(const bf16* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return halves(v);
}

PYGPT_INLINE void store_pair(float* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}

PYGPT_INLINE vu round_pair(Pair v) {
#ifdef PYGPT_AVX512_BF16
  const vu lane = (vu)lane_numbers(), one_of_each = lane | (lane + kLanes) << 16;
  return (vu)_mm512_permutexvar_epi16((__m512i)one_of_each, (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
#else
  return round_upper(v.a) >> 16 | (round_upper(v.b) & 0xffff0000u);
#endif
}

PYGPT_INLINE void store_pair(bf16* p, Pair v) {
  const vu rounded = round_pair(v);
  std::memcpy(p, &rounded, sizeof rounded);
}

// The first n < kPair elements; the others are zero.
PYGPT_INLINE Pair load_pair(const float* p, int64_t n) {
  return n < kLanes ? Pair{load(p, n), vf{}} : Pair{load(p), load(p + kLanes, n - kLanes)};
}

PYGPT_INLINE void store_pair(float* p, Pair v, int64_t n) {
  if (n < kLanes) return store(p, v.a, n);
  store(p, v.a);
  store(p + kLanes, v.b, n - kLanes);
}

#if PYGPT_LANES == 16
PYGPT_INLINE Pair load_pair(const bf16* p, int64_t n) {
  return halves((vu)_mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffff, n), p));
}
PYGPT_INLINE void store_pair(bf16* p, Pair v, int64_t n) {
  _mm512_mask_storeu_epi16(p, _bzhi_u32(0xffffffff, n), (__m512i)round_pair(v));
}
#else
PYGPT_INLINE Pair load_pair(const bf16* p, int64_t n) {
  bf16 tmp[kPair] = {};
  std::memcpy(tmp, p, n * sizeof *tmp);
  return load_pair(tmp);
}
PYGPT_INLINE void store_pair(bf16* p, Pair v, int64_t n) {
  bf16 tmp[kPair];
  store_pair(tmp, v);
  std::memcpy(p, tmp, n * sizeof *tmp);
}
#endif

template <class T>
PYGPT_INLINE Pair load_pair_step(const T* p, int64_t n) {
  return n == kPair ? load_pair(p) : load_pair(p, n);
}

template <class T>
PYGPT_INLINE void store_pair_step(T* p, Pair v, int64_t n) {
  n == kPair ? store_pair(p, v) : store_pair(p, v, n);
}

#define PYGPT_FOR_PAIRS(C, ...) PYGPT_FOR_STEPS(kPair, C, __VA_ARGS__)
#define PYGPT_FOR_PAIRS_BY(K, C, ...) PYGPT_FOR_STEPS_BY(kPair, K, C, __VA_ARGS__)

// From the order of elements to that of a pair of T, and back.
template <class T>
PYGPT_INLINE Pair to_pair_order(Pair v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  const vi even = lane_numbers() * 2;
  return {shuffle(v.a, v.b, even), shuffle(v.a, v.b, even + 1)};
}

template <class T>
PYGPT_INLINE Pair from_pair_order(Pair v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  const vi lane = lane_numbers(), which = (lane >> 1) + (lane & 1) * kLanes;
  return {shuffle(v.a, v.b, which), shuffle(v.a, v.b, which + kLanes / 2)};
}

// The elements of a pair of T that are among the first n; 0 in place of the others.
template <class T>
PYGPT_INLINE Pair first_of_pair(Pair v, int64_t n) {
  const vi lane = lane_numbers(), count = vi{} + static_cast<int32_t>(n);
  constexpr bool kHalves = sizeof(T) == sizeof(float);
  const vi a = kHalves ? lane : lane * 2, b = kHalves ? lane + kLanes : lane * 2 + 1;
  return {a < count ? v.a : vf{}, b < count ? v.b : vf{}};
}

// Asks for the memory of a pair.
template <class T>
PYGPT_INLINE void prefetch_pair(const T* p) {
  __builtin_prefetch(p);
  if constexpr (kPair * sizeof(T) > 64) __builtin_prefetch(p + 64 / sizeof(T));
}

}  // namespace pygpt::PYGPT_ISA
