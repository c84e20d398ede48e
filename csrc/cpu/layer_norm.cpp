// layer_norm and add_layer_norm on the CPU: checks, threads and registration. The arithmetic is layer_norm_kernel.h.

#include <algorithm>

#include "cpu/tensor.h"

#define PYGPT_KERNELS "cpu/layer_norm_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

// Weight gradients are summed per chunk of rows, then over chunks in order. The number of chunks depends on the shape
// alone, so the bits do not depend on the number of threads.
constexpr int64_t kMaxChunks = 16;
constexpr int64_t kMinChunkElements = 16384;

// Rows a thread takes at least: below about 32 KiB of input, waking a second thread costs more than it saves.
int64_t row_grain(int64_t C) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(C, 1)); }

void check(const Tensor& x, const Tensor& weight, const char* op) {
  PYGPT_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(x.dim() - 1) == weight.size(0), op,
              ": weight must be (C,) for x (..., C)");
  PYGPT_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, op,
              ": x must be float32 or bfloat16");
}

template <class T>
void forward(const Tensor& x, const T* residual, const float* weight, const float* bias, T* sum, T* y, float* mean,
             float* rstd, float eps) {
  const int64_t C = x.size(x.dim() - 1), rows = C ? x.numel() / C : 0;
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const auto rows_kernel = PYGPT_DISPATCH(layer_norm_rows<T>);
  torch::stable::parallel_for(0, rows, row_grain(C), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C;
    rows_kernel(in + at, residual ? residual + at : nullptr, weight, bias, sum ? sum + at : nullptr, y + at,
                mean + begin, rstd + begin, end - begin, C, eps);
  });
}

// residual absent: layer_norm, and `sum` is then an unused empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> any_forward(Tensor x, std::optional<Tensor> residual, Tensor weight,
                                                       std::optional<Tensor> bias, double eps, const char* op) {
  check(x, weight, op);
  x = as_contiguous(x);
  if (residual) {
    PYGPT_CHECK(residual->scalar_type() == x.scalar_type() && residual->numel() == x.numel(), op,
                ": x and residual must have the same shape and dtype");
    residual = as_contiguous(*residual);
  }
  weight = as_contiguous(to_dtype(weight, ScalarType::Float));
  if (bias) bias = as_contiguous(to_dtype(*bias, ScalarType::Float));
  const int64_t C = weight.size(0), rows = C ? x.numel() / C : 0;
  Tensor y = new_like(x), sum = residual ? new_like(x) : new_empty(x, {0}, x.scalar_type());
  Tensor mean = new_empty(x, {rows}, ScalarType::Float), rstd = new_empty(x, {rows}, ScalarType::Float);
  const auto run = [&]<class T>(T) {
    forward<T>(x, residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr,
               weight.const_data_ptr<float>(), bias ? bias->const_data_ptr<float>() : nullptr,
               residual ? static_cast<T*>(sum.mutable_data_ptr()) : nullptr, static_cast<T*>(y.mutable_data_ptr()),
               mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), static_cast<float>(eps));
  };
  x.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return {y, sum, mean, rstd};
}

template <class T>
void backward(const Tensor& grad, const T* grad_sum, const Tensor& x, const float* weight, const float* mean,
              const float* rstd, T* grad_x, float* partial_weight, float* partial_bias, int64_t chunks) {
  const int64_t C = x.size(x.dim() - 1), rows = x.numel() / C;
  const T *dy = static_cast<const T*>(grad.const_data_ptr()), *in = static_cast<const T*>(x.const_data_ptr());
  const auto rows_kernel = PYGPT_DISPATCH(layer_norm_backward_rows<T>);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks, at = begin * C;
      rows_kernel(dy + at, grad_sum ? grad_sum + at : nullptr, in + at, weight, mean + begin, rstd + begin,
                  grad_x + at, partial_weight + chunk * C, partial_bias ? partial_bias + chunk * C : nullptr,
                  end - begin, C);
    }
  });
}

// Adds the chunks in order, in the weight's dtype.
Tensor add_chunks(const Tensor& partial, ScalarType dtype) {
  const int64_t chunks = partial.size(0), C = partial.size(1);
  Tensor total = new_zeros(partial, {C}, ScalarType::Float);
  float* out = total.mutable_data_ptr<float>();
  const float* in = partial.const_data_ptr<float>();
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < C; ++c) out[c] += in[chunk * C + c];
  return to_dtype(total, dtype);
}

std::tuple<Tensor, Tensor, Tensor> any_backward(Tensor grad, std::optional<Tensor> grad_sum, Tensor x, Tensor weight,
                                                Tensor mean, Tensor rstd, bool has_bias, const char* op) {
  check(x, weight, op);
  const auto dtype = x.scalar_type();
  PYGPT_CHECK(grad.scalar_type() == dtype && grad.numel() == x.numel(), op, ": grad must match x in shape and dtype");
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  if (grad_sum) grad_sum = as_contiguous(*grad_sum);
  const auto weight_dtype = weight.scalar_type();
  weight = as_contiguous(to_dtype(weight, ScalarType::Float));
  const int64_t C = weight.size(0), rows = C ? x.numel() / C : 0;
  const int64_t chunks = std::clamp<int64_t>(x.numel() / kMinChunkElements, 1, std::min(std::max<int64_t>(rows, 1), kMaxChunks));
  Tensor grad_x = new_like(x);
  Tensor partial_weight = new_zeros(x, {chunks, C}, ScalarType::Float);
  Tensor partial_bias = new_zeros(x, {chunks, has_bias ? C : 0}, ScalarType::Float);
  const auto run = [&]<class T>(T) {
    backward<T>(grad, grad_sum ? static_cast<const T*>(grad_sum->const_data_ptr()) : nullptr, x,
                weight.const_data_ptr<float>(), mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
                static_cast<T*>(grad_x.mutable_data_ptr()), partial_weight.mutable_data_ptr<float>(),
                has_bias ? partial_bias.mutable_data_ptr<float>() : nullptr, chunks);
  };
  if (rows) dtype == ScalarType::Float ? run(float{}) : run(bf16{});
  return {grad_x, add_chunks(partial_weight, weight_dtype), add_chunks(partial_bias, weight_dtype)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  auto [y, sum, mean, rstd] = any_forward(x, std::nullopt, weight, bias, eps, "layer_norm_forward");
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd,
                                                       bool has_bias) {
  return any_backward(grad, std::nullopt, x, weight, mean, rstd, has_bias, "layer_norm_backward");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight,
                                                                  std::optional<Tensor> bias, double eps) {
  return any_forward(x, residual, weight, bias, eps, "add_layer_norm_forward");
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight,
                                                           Tensor mean, Tensor rstd, bool has_bias) {
  return any_backward(grad, grad_sum, sum, weight, mean, rstd, has_bias, "add_layer_norm_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace pygpt
