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
#ifdef __AVX512BF16__
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

// Sums the lanes pairwise: the same order whatever surrounds the call.
PYGPT_INLINE float reduce_add(vf v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

PYGPT_INLINE float reduce_max(vf v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

}  // namespace pygpt::PYGPT_ISA
