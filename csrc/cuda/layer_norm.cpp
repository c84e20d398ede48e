// layer_norm and add_layer_norm on CUDA: checks, allocation and registration. The kernels are layer_norm.cu.

#include "cuda/layer_norm.h"

#include "cuda/tensor.h"

namespace pygpt::cuda {
namespace {

void check_shapes(const Tensor& x, const Tensor& weight, const char* op) {
  PYGPT_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(x.dim() - 1) == weight.size(0) && weight.size(0) > 0, op,
              ": weight must be (C,) for x (..., C), with C at least 1");
}

void check_same(const Tensor& x, const Tensor& other, const char* op, const char* what) {
  PYGPT_CHECK(other.scalar_type() == x.scalar_type() && other.numel() == x.numel(), op, ": ", what,
              " must match x in shape and dtype");
}

// residual absent: layer_norm, and the sum returned is then an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> any_forward(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                                       std::optional<Tensor> bias, double eps, const char* op) {
  check_shapes(x, weight, op);
  const OnDevice device(op, x);
  x = torch::stable::contiguous(x);
  if (residual) {
    check_same(x, *residual, op, "residual");
    residual = torch::stable::contiguous(*residual);
  }
  const bool same = weight.scalar_type() == x.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type());
  const ScalarType weight_type = same ? x.scalar_type() : ScalarType::Float;
  weight = torch::stable::contiguous(to_dtype(weight, weight_type));
  if (bias) bias = torch::stable::contiguous(to_dtype(*bias, weight_type));
  const int64_t C = weight.size(0), rows = x.numel() / C;
  Tensor y = torch::stable::empty_like(x), sum = residual ? torch::stable::empty_like(x) : new_empty(x, {0}, x.scalar_type());
  Tensor mean = new_empty(x, {rows}, ScalarType::Float), rstd = new_empty(x, {rows}, ScalarType::Float);
  layer_norm_forward({.dtype = dtype_of(x, op),
                      .weight_dtype = dtype_of(weight, op),
                      .x = data(x),
                      .residual = data(residual),
                      .weight = data(weight),
                      .bias = data(bias),
                      .sum = residual ? mutable_data(sum) : nullptr,
                      .y = mutable_data(y),
                      .mean = mutable_data<float>(mean),
                      .rstd = mutable_data<float>(rstd),
                      .rows = rows,
                      .C = C,
                      .eps = static_cast<float>(eps)},
                     device);
  return {y, sum, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> any_backward(Tensor grad, std::optional<Tensor> grad_sum, Tensor x, Tensor weight,
                                                Tensor mean, Tensor rstd, bool has_bias, const char* op) {
  check_shapes(x, weight, op);
  const OnDevice device(op, x);
  check_same(x, grad, op, "grad");
  grad = torch::stable::contiguous(grad);
  x = torch::stable::contiguous(x);
  if (grad_sum) {
    check_same(x, *grad_sum, op, "grad_sum");
    grad_sum = torch::stable::contiguous(*grad_sum);
  }
  const ScalarType weight_type = weight.scalar_type();
  weight = torch::stable::contiguous(weight_type == x.scalar_type() ? weight : to_dtype(weight, ScalarType::Float));
  const int64_t C = weight.size(0), rows = x.numel() / C;
  Tensor grad_x = torch::stable::empty_like(x), grad_weight = torch::stable::empty_like(weight);
  Tensor grad_bias = new_empty(weight, {has_bias ? C : 0}, weight.scalar_type());
  const int64_t partials = layer_norm_partials(rows, C, dtype_of(x, op), device.multiprocessors);
  Tensor partial = new_empty(x, {partials, 2, C}, ScalarType::Float);
  layer_norm_backward({.dtype = dtype_of(x, op),
                       .weight_dtype = dtype_of(weight, op),
                       .grad = data(grad),
                       .grad_sum = data(grad_sum),
                       .x = data(x),
                       .weight = data(weight),
                       .mean = data<float>(mean),
                       .rstd = data<float>(rstd),
                       .grad_x = mutable_data(grad_x),
                       .grad_weight = mutable_data(grad_weight),
                       .grad_bias = has_bias ? mutable_data(grad_bias) : nullptr,
                       .partial = mutable_data<float>(partial),
                       .rows = rows,
                       .C = C},
                      device);
  return {grad_x, to_dtype(grad_weight, weight_type), to_dtype(grad_bias, weight_type)};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  auto [y, sum, mean, rstd] = any_forward(x, std::nullopt, weight, bias, eps, "layer_norm_forward");
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) {
  return any_backward(grad, std::nullopt, x, weight, mean, rstd, has_bias, "layer_norm_backward");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_forward(Tensor x, Tensor residual, Tensor weight,
                                                       std::optional<Tensor> bias, double eps) {
  return any_forward(x, residual, weight, bias, eps, "add_layer_norm_forward");
}

std::tuple<Tensor, Tensor, Tensor> add_backward(Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight, Tensor mean,
                                                Tensor rstd, bool has_bias) {
  return any_backward(grad, grad_sum, sum, weight, mean, rstd, has_bias, "add_layer_norm_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, PYGPT_CUDA_KEY, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&forward));
  m.impl("layer_norm_backward", TORCH_BOX(&backward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_backward));
}

}  // namespace pygpt::cuda
