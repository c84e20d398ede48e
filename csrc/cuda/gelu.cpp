// gelu and bias_gelu on CUDA: checks, allocation and registration. The kernels are gelu.cu.

#include "cuda/gelu.h"

#include "cuda/tensor.h"

namespace pygpt::cuda {
namespace {

void check_grad(const Tensor& grad, const Tensor& x, const char* op) {
  PYGPT_CHECK(grad.scalar_type() == x.scalar_type() && grad.numel() == x.numel(), op,
              ": grad must match x in shape and dtype");
}

void check_bias(const Tensor& x, const Tensor& bias, const char* op) {
  PYGPT_CHECK(x.dim() >= 1 && bias.dim() == 1 && x.size(x.dim() - 1) == bias.size(0), op,
              ": bias must be (C,) for x (..., C)");
  PYGPT_CHECK(x.scalar_type() == bias.scalar_type(), op, ": bias must have x's dtype");
}

Tensor any_forward(Tensor x, const Tensor* bias, const char* op) {
  const DType dtype = dtype_of(x, op);
  const OnDevice device(op, x);
  x = torch::stable::contiguous(x);
  Tensor y = torch::stable::empty_like(x);
  gelu_forward({.dtype = dtype,
                .x = data(x),
                .bias = bias ? data(*bias) : nullptr,
                .y = mutable_data(y),
                .count = x.numel(),
                .C = bias ? bias->size(0) : 0},
               device);
  return y;
}

Tensor forward(Tensor x) { return any_forward(x, nullptr, "gelu_forward"); }

Tensor bias_forward(Tensor x, Tensor bias) {
  check_bias(x, bias, "bias_gelu_forward");
  bias = torch::stable::contiguous(bias);
  return any_forward(x, &bias, "bias_gelu_forward");
}

Tensor backward(Tensor grad, Tensor x) {
  const char* op = "gelu_backward";
  const DType dtype = dtype_of(x, op);
  check_grad(grad, x, op);
  const OnDevice device(op, x);
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  Tensor grad_x = torch::stable::empty_like(x);
  gelu_backward({.dtype = dtype, .x = data(x), .grad = data(grad), .grad_x = mutable_data(grad_x), .count = x.numel()},
                device);
  return grad_x;
}

std::tuple<Tensor, Tensor> bias_backward(Tensor grad, Tensor x, Tensor bias) {
  const char* op = "bias_gelu_backward";
  const DType dtype = dtype_of(x, op);
  check_bias(x, bias, op);
  check_grad(grad, x, op);
  const OnDevice device(op, x);
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  bias = torch::stable::contiguous(bias);
  Tensor grad_x = torch::stable::empty_like(x), grad_bias = torch::stable::empty_like(bias);
  if (x.numel() == 0) return {grad_x, torch::stable::zero_(grad_bias)};
  const int64_t C = bias.size(0), partials = gelu_partials(x.numel() / C, C, dtype, device.multiprocessors);
  Tensor partial = new_empty(x, {partials, C}, ScalarType::Float);
  gelu_backward({.dtype = dtype,
                 .x = data(x),
                 .bias = data(bias),
                 .grad = data(grad),
                 .grad_x = mutable_data(grad_x),
                 .grad_bias = mutable_data(grad_bias),
                 .partial = mutable_data<float>(partial),
                 .count = x.numel(),
                 .C = C},
                device);
  return {grad_x, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, PYGPT_CUDA_KEY, m) {
  m.impl("gelu_forward", TORCH_BOX(&forward));
  m.impl("gelu_backward", TORCH_BOX(&backward));
  m.impl("bias_gelu_forward", TORCH_BOX(&bias_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_backward));
}

}  // namespace pygpt::cuda
