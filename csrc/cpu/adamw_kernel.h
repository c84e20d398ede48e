// AdamW's update and the sum of squares, for one instruction set (see foreach_isa.h). G: dtype of the gradients.
// Every element is computed alike wherever a range begins, so the bits do not depend on how ranges are spread.

namespace pygpt::PYGPT_ISA {

// Rounds into memory past the cache, which would read the line first. To be followed by end_streaming.
PYGPT_INLINE void stream(bf16* p, vf v) {
#if PYGPT_LANES == 16
  __m256i h;
  store(reinterpret_cast<bf16*>(&h), v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), h);
#elif PYGPT_LANES == 8
  __m128i h;
  store(reinterpret_cast<bf16*>(&h), v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), h);
#else
  store(p, v);
#endif
}

PYGPT_INLINE void end_streaming() {
#if PYGPT_LANES >= 8
  _mm_sfence();
#endif
}

// weight: rounded copy of the master, or null where the weights are float32 themselves. STREAM: the copy is larger than the
// cache, and aligned.
template <class G, bool STREAM>
static void adamw_range_of(const G* grad, float* master, float* mean, float* square, bf16* weight, int64_t count,
                           AdamWStep s) {
  PYGPT_FOR_LANES(count, {
    const vf g = load_step(grad + i, n) * s.grad_factor;
    const vf m = load_step(mean + i, n) * s.beta1 + g * s.rest1;
    const vf v = load_step(square + i, n) * s.beta2 + g * g * s.rest2;
    const vf w = load_step(master + i, n) * s.decay - m * s.rate / (vsqrt(v) * s.correction + s.eps);
    store_step(mean + i, m, n);
    store_step(square + i, v, n);
    store_step(master + i, w, n);
    if (STREAM && n == kLanes)
      stream(weight + i, w);
    else if (weight)
      store_step(weight + i, w, n);
  })
  if (STREAM) end_streaming();
}

template <class G>
void adamw_range(const G* grad, float* master, float* mean, float* square, bf16* weight, int64_t count, AdamWStep s) {
  const bool stream = s.stream && weight && reinterpret_cast<uintptr_t>(weight) % 32 == 0;
  (stream ? adamw_range_of<G, true> : adamw_range_of<G, false>)(grad, master, mean, square, weight, count, s);
}

// Short sums in float32, their sum in double: as near as one needs, at the speed of float32.
template <class G>
double sum_of_squares(const G* x, int64_t count) {
  constexpr int kSums = 4;  // one would make each addition wait for the one before it
  constexpr int64_t kShort = 1024;
  double total = 0;
  for (; count > 0; count -= kShort, x += kShort) {
    vf sum[kSums] = {};
    const int64_t part = count < kShort ? count : kShort;
    PYGPT_FOR_LANES_BY(kSums, part, {
      const vf v = load_step(x + i, n);
      sum[u] += v * v;
    })
    total += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return total;
}

}  // namespace pygpt::PYGPT_ISA
