// AdamW's update and the sum of squares, for one instruction set (see foreach_isa.h). G: dtype of the gradients.
// Every element is computed alike wherever a range begins, so the bits do not depend on how ranges are spread.

namespace pygpt::PYGPT_ISA {

template <class T>
PYGPT_INLINE vf load_stream(const T* p, int64_t n) {
  __builtin_prefetch(p + kAheadElements);
  return load_step(p, n);
}

PYGPT_INLINE vf load_master(const float* weight, const int16_t*, int64_t i, int64_t n) { return load_stream(weight + i, n); }
PYGPT_INLINE void store_master(float* weight, int16_t*, vf w, int64_t i, int64_t n) { store_step(weight + i, w, n); }

PYGPT_INLINE vu load_upper_step(const void* p, int64_t n) { return n == kLanes ? load_upper(p) : load_upper(p, n); }
PYGPT_INLINE void store_upper_step(void* p, vu v, int64_t n) { n == kLanes ? store_upper(p, v) : store_upper(p, v, n); }

// The float32 whose nearest bf16 is `weight`, ties away from zero, and whose bits are the residual further on. Only a zero that
// somebody wrote over a weight can change its sign there: it stays zero.
PYGPT_INLINE vf load_master(const bf16* weight, const int16_t* residual, int64_t i, int64_t n) {
  __builtin_prefetch(weight + i + kAheadElements);
  __builtin_prefetch(residual + i + kAheadElements);
  const vu upper = load_upper_step(weight + i, n);
  const vu bits = upper + (vu)((vi)load_upper_step(residual + i, n) >> 16), changed = (vu)((vi)(upper ^ bits) >> 31);
  return (vf)((bits & ~changed) | (upper & changed));
}

PYGPT_INLINE void store_master(bf16* weight, int16_t* residual, vf w, int64_t i, int64_t n) {
  const vu bits = (vu)(w != w ? (vi)(vu{} + 0x7fc00000u) : (vi)w);
  store_upper_step(weight + i, bits + 0x8000u, n);
  store_upper_step(residual + i, bits << 16, n);
}

// W: float, without residuals, or bf16.
template <class W, class G>
void adamw_range(const G* grad, W* weight, int16_t* residual, float* mean, float* square, int64_t count, AdamWStep s) {
  PYGPT_FOR_LANES(count, {
    const vf g = load_stream(grad + i, n) * s.grad_factor;
    const vf m = load_stream(mean + i, n) * s.beta1 + g * s.rest1;
    const vf v = load_stream(square + i, n) * s.beta2 + g * g * s.rest2;
    const vf w = load_master(weight, residual, i, n) * s.decay - m * s.rate / (vsqrt(v) * s.correction + s.eps);
    store_step(mean + i, m, n);
    store_step(square + i, v, n);
    store_master(weight, residual, w, i, n);
  })
}

// Short sums in float32, their sum in double: as near as one needs, at the speed of float32. Eight parts at once, in pages of
// their own: memory gives one stream half of what it gives eight.
template <class G>
double sum_of_squares(const G* x, int64_t count) {
  constexpr int kParts = 8;
  constexpr int64_t kShort = 16 * kLanes;
  const int64_t part = count / kParts / kLanes * kLanes;
  double total = 0;
  for (int64_t start = 0; start < part; start += kShort) {
    vf sum[kParts] = {};
    const int64_t end = smaller(part, start + kShort);
    for (int64_t i = start; i < end; i += kLanes)
#pragma GCC unroll 8
      for (int u = 0; u < kParts; ++u) {
        const vf v = load(x + u * part + i);
        sum[u] += v * v;
      }
    total += reduce_add(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
  }
  x += kParts * part;
  vf rest = {};
  PYGPT_FOR_LANES(count - kParts * part, {
    const vf v = load_step(x + i, n);
    rest += v * v;
  })
  return total + reduce_add(rest);
}

}  // namespace pygpt::PYGPT_ISA
