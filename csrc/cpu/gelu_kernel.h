// GELU with the tanh approximation, for one instruction set (see foreach_isa.h). T: dtype of x, y and the gradients.
//
// 0.5 (1 + tanh u) is the logistic function of 2u, so y = x / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3):
// one exponential and no tanh.

#include "cpu/pair.h"

namespace pygpt::PYGPT_ISA {

constexpr float kGeluCubic = 0.044715f;
constexpr float kGeluScale = -2.0f * 0.7978845608f * 1.4426950409f;  // -2 sqrt(2 / pi) log2(e): u to the exponent of 2

// From there on the logistic function of 2u is 0 or 1 in float32, but for 1e-38: still within the range of vexp2.
constexpr float kGeluFar = 10.0f;

// NaN stays NaN.
PYGPT_INLINE vf at_least_far(vf x) { return vmax(splat(-kGeluFar), x); }
PYGPT_INLINE vf at_most_far(vf x) { return vmin(splat(kGeluFar), x); }

// x: at least -kGeluFar. An exponential as precise as T.
template <class T>
PYGPT_INLINE vf logistic_of_2u(vf x, vf square) {
  return 1.0f / (vexp2<sizeof(T) == sizeof(float) ? 5 : 4>(x * (square * (kGeluCubic * kGeluScale) + kGeluScale)) + 1.0f);
}

template <class T>
PYGPT_INLINE vf gelu(vf x) {
  x = at_least_far(x);
  return x * logistic_of_2u<T>(x, x * x);
}

// dy/dx = s + x s (1 - s) d(2u)/dx, s being the logistic function of 2u.
template <class T>
PYGPT_INLINE vf gelu_slope(vf x) {
  x = at_most_far(at_least_far(x));
  const vf square = x * x, s = logistic_of_2u<T>(x, square);
  constexpr float kScale = 2.0f * 0.7978845608f;
  return s * (1.0f + (x - x * s) * (square * (3.0f * kGeluCubic * kScale) + kScale));
}

template <class T>
void gelu_forward(const T* x, T* y, int64_t count) {
  PYGPT_FOR_PAIRS(count, {
    prefetch_pair(x + i + kAheadElements);
    const Pair v = load_pair_step(x + i, n);
    store_pair_step(y + i, Pair{gelu<T>(v.a), gelu<T>(v.b)}, n);
  })
}

template <class T>
void gelu_backward(const T* grad, const T* x, T* grad_x, int64_t count) {
  PYGPT_FOR_PAIRS(count, {
    prefetch_pair(x + i + kAheadElements);
    prefetch_pair(grad + i + kAheadElements);
    const Pair v = load_pair_step(x + i, n);
    store_pair_step(grad_x + i, load_pair_step(grad + i, n) * Pair{gelu_slope<T>(v.a), gelu_slope<T>(v.b)}, n);
  })
}

}  // namespace pygpt::PYGPT_ISA
