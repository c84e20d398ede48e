// GELU with the tanh approximation, for one instruction set (see foreach_isa.h). T: dtype of x, y and the gradients.
//
// 0.5 (1 + tanh u) is the logistic function of 2u, so y = x / (1 + exp(-2u)) with u = sqrt(2 / pi) (x + 0.044715 x^3):
// one exponential and no tanh.

namespace pygpt::PYGPT_ISA {

constexpr float kGeluCubic = 0.044715f;
constexpr float kGeluScale = -2.0f * 0.7978845608f * 1.4426950409f;  // -2 sqrt(2 / pi) log2(e): u to the exponent of 2

// From there on the logistic function of 2u is 0 or 1 in float32, but for 1e-38: still within the range of vexp2.
constexpr float kGeluFar = 10.0f;

// In this order NaN stays NaN.
PYGPT_INLINE vf at_least_far(vf x) { return x < splat(-kGeluFar) ? splat(-kGeluFar) : x; }
PYGPT_INLINE vf at_most_far(vf x) { return x > splat(kGeluFar) ? splat(kGeluFar) : x; }

// x: at least -kGeluFar.
PYGPT_INLINE vf logistic_of_2u(vf x, vf square) {
  return 1.0f / (vexp2(x * (square * kGeluCubic + 1.0f) * kGeluScale) + 1.0f);
}

template <class T>
void gelu_forward(const T* x, T* y, int64_t count) {
  PYGPT_FOR_LANES(count, {
    const vf v = at_least_far(load_step(x + i, n));
    store_step(y + i, v * logistic_of_2u(v, v * v), n);
  })
}

// dy/dx = s + x s (1 - s) d(2u)/dx, s being the logistic function of 2u.
template <class T>
void gelu_backward(const T* grad, const T* x, T* grad_x, int64_t count) {
  PYGPT_FOR_LANES(count, {
    const vf v = at_most_far(at_least_far(load_step(x + i, n))), square = v * v, s = logistic_of_2u(v, square);
    const vf slope = (square * (3.0f * kGeluCubic) + 1.0f) * (2.0f * 0.7978845608f);
    store_step(grad_x + i, load_step(grad + i, n) * s * (1.0f + v * (1.0f - s) * slope), n);
  })
}

}  // namespace pygpt::PYGPT_ISA
