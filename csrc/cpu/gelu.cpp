// gelu on the CPU: checks, threads and registration. The arithmetic is gelu_kernel.h.

#include "cpu/operators.h"

#define PYGPT_KERNELS "cpu/gelu_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

// Elements a thread takes at least: some 10 microseconds of work, below which waking a second thread does not pay.
constexpr int64_t kGrain = 32768;

void check(const Tensor& x, const char* op) {
  PYGPT_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, op,
              ": x must be float32 or bfloat16");
}

}  // namespace

Tensor gelu_forward(Tensor x) {
  check(x, "gelu_forward");
  x = as_contiguous(x);
  Tensor y = new_like(x);
  const auto run = [&]<class T>(T) {
    const auto kernel = PYGPT_DISPATCH(gelu_forward<T>);
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* out = static_cast<T*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, x.numel(), kGrain,
                                [&](int64_t begin, int64_t end) { kernel(in + begin, out + begin, end - begin); });
  };
  x.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return y;
}

namespace {

Tensor gelu_backward(Tensor grad, Tensor x) {
  check(x, "gelu_backward");
  PYGPT_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(),
              "gelu_backward: grad must match x in shape and dtype");
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  Tensor grad_x = new_like(x);
  const auto run = [&]<class T>(T) {
    const auto kernel = PYGPT_DISPATCH(gelu_backward<T>);
    const T *dy = static_cast<const T*>(grad.const_data_ptr()), *in = static_cast<const T*>(x.const_data_ptr());
    T* dx = static_cast<T*>(grad_x.mutable_data_ptr());
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      kernel(dy + begin, in + begin, dx + begin, end - begin);
    });
  };
  x.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("gelu_forward", TORCH_BOX(&gelu_forward));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward));
}

}  // namespace pygpt
