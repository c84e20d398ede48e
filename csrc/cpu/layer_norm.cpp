// layer_norm and add_layer_norm on the CPU: checks, threads and registration. The arithmetic is layer_norm_kernel.h.

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/operators.h"

#define PYGPT_KERNELS "cpu/layer_norm_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

// Weight gradients are summed per chunk of rows, then over chunks in order. The number of chunks depends on the shape
// alone, so the bits do not depend on the number of threads.
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kMinChunkElements = 16384;

// Rows a thread takes at least: below about 32 KiB of input, waking a second thread costs more than it saves.
int64_t row_grain(int64_t C) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(C, 1)); }

bool is_served(ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::BFloat16; }

void check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const char* op) {
  PYGPT_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(x.dim() - 1) == weight.size(0), op,
              ": weight must be (C,) for x (..., C)");
  PYGPT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op, ": bias must be (C,)");
  PYGPT_CHECK(is_served(x.scalar_type()) && is_served(weight.scalar_type()) && (!bias || is_served(bias->scalar_type())), op,
              ": x, weight and bias must be float32 or bfloat16");
}

void check_like(const Tensor& other, const Tensor& x, const char* op) {
  PYGPT_CHECK(other.scalar_type() == x.scalar_type() && other.numel() == x.numel(), op,
              ": tensors of x's shape must have its dtype");
}

void check_statistics(const Tensor& stats, int64_t rows, const char* op) {
  PYGPT_CHECK(stats.scalar_type() == ScalarType::Float && stats.numel() == rows, op, ": mean and rstd must be (rows,) float32");
}

// A weight or bias as the kernels for rows of T take it; null where absent.
template <class T>
class RowOrder {
 public:
  explicit RowOrder(const std::optional<Tensor>& weight) {
    if (!weight) return;
    const Tensor from = as_contiguous(*weight);
    const int64_t C = from.numel();
    data_.resize(whole_pairs(C));
    if (from.scalar_type() == ScalarType::Float)
      PYGPT_DISPATCH(to_row_order<T, float>)(from.const_data_ptr<float>(), data_.data(), C);
    else
      PYGPT_DISPATCH(to_row_order<T, bf16>)(static_cast<const bf16*>(from.const_data_ptr()), data_.data(), C);
  }
  const float* data() const { return data_.empty() ? nullptr : data_.data(); }

 private:
  std::vector<float> data_;
};

template <class T>
const T* input(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

struct Forward {
  Tensor y;
  std::optional<Tensor> sum;
  Tensor mean, rstd;
};

template <class T>
void forward(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, const std::optional<Tensor>& bias,
             Forward& out, int64_t rows, int64_t C, float eps) {
  const RowOrder<T> w(weight), b(bias);
  const T *in = input<T>(x), *res = input<T>(residual);
  T *y = static_cast<T*>(out.y.mutable_data_ptr()), *sum = out.sum ? static_cast<T*>(out.sum->mutable_data_ptr()) : nullptr;
  float *mean = out.mean.mutable_data_ptr<float>(), *rstd = out.rstd.mutable_data_ptr<float>();
  const auto kernel = PYGPT_DISPATCH(layer_norm_rows<T>);
  torch::stable::parallel_for(0, rows, row_grain(C), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C;
    kernel(in + at, res ? res + at : nullptr, w.data(), b.data(), sum ? sum + at : nullptr, y + at, mean + begin,
           rstd + begin, end - begin, C, eps);
  });
}

// residual absent: layer_norm, which has no sum.
Forward any_forward(Tensor x, std::optional<Tensor> residual, const Tensor& weight, const std::optional<Tensor>& bias,
                    double eps, const char* op) {
  check(x, weight, bias, op);
  x = as_contiguous(x);
  if (residual) {
    check_like(*residual, x, op);
    residual = as_contiguous(*residual);
  }
  const int64_t C = weight.size(0), rows = C ? x.numel() / C : 0;
  Forward out{new_like(x), std::nullopt, new_empty(x, {rows}, ScalarType::Float), new_empty(x, {rows}, ScalarType::Float)};
  if (residual) out.sum = new_like(x);
  (x.scalar_type() == ScalarType::Float ? forward<float> : forward<bf16>)(x, residual, weight, bias, out, rows, C,
                                                                          static_cast<float>(eps));
  return out;
}

template <class T>
Tensor add_chunks(const float* partial, int64_t chunks, int64_t C, const Tensor& weight) {
  Tensor total = new_empty(weight, {C}, weight.scalar_type());
  if (weight.scalar_type() == ScalarType::Float)
    PYGPT_DISPATCH(add_chunks<T, float>)(partial, chunks, whole_pairs(C), total.mutable_data_ptr<float>(), C);
  else
    PYGPT_DISPATCH(add_chunks<T, bf16>)(partial, chunks, whole_pairs(C), static_cast<bf16*>(total.mutable_data_ptr()), C);
  return total;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& x,
                                            const Tensor& weight, const Tensor& mean, const Tensor& rstd, bool has_bias) {
  const int64_t rows = mean.numel(), C = weight.size(0), stride = whole_pairs(C);
  const int64_t most = std::min(std::max<int64_t>(rows, 1), kMaxChunks);
  const int64_t chunks = std::clamp<int64_t>(x.numel() / kMinChunkElements, 1, most);
  const RowOrder<T> w(weight);
  Tensor grad_x = new_like(x);
  const T *dy = input<T>(grad), *dsum = input<T>(grad_sum), *in = input<T>(x);
  T* dx = static_cast<T*>(grad_x.mutable_data_ptr());
  const float *mu = mean.const_data_ptr<float>(), *r = rstd.const_data_ptr<float>();
  // Not filled here: each chunk's part is first written by the thread that has it in its cache then.
  const std::unique_ptr<float[]> dweight(new float[chunks * stride]), dbias(has_bias ? new float[chunks * stride] : nullptr);
  const auto kernel = PYGPT_DISPATCH(layer_norm_backward_rows<T>);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks, at = begin * C;
      kernel(dy + at, dsum ? dsum + at : nullptr, in + at, w.data(), mu + begin, r + begin, dx + at,
             dweight.get() + chunk * stride, has_bias ? dbias.get() + chunk * stride : nullptr, end - begin, C);
    }
  });
  return {grad_x, add_chunks<T>(dweight.get(), chunks, C, weight),
          has_bias ? add_chunks<T>(dbias.get(), chunks, C, weight) : new_empty(weight, {0}, weight.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> any_backward(Tensor grad, std::optional<Tensor> grad_sum, Tensor x, const Tensor& weight,
                                                Tensor mean, Tensor rstd, bool has_bias, const char* op) {
  check(x, weight, std::nullopt, op);
  check_like(grad, x, op);
  const int64_t C = weight.size(0), rows = C ? x.numel() / C : 0;
  check_statistics(mean, rows, op);
  check_statistics(rstd, rows, op);
  grad = as_contiguous(grad);
  x = as_contiguous(x);
  mean = as_contiguous(mean);
  rstd = as_contiguous(rstd);
  if (grad_sum) {
    check_like(*grad_sum, x, op);
    grad_sum = as_contiguous(*grad_sum);
  }
  return (x.scalar_type() == ScalarType::Float ? backward<float> : backward<bf16>)(grad, grad_sum, x, weight, mean, rstd,
                                                                                   has_bias);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps) {
  Forward out = any_forward(x, std::nullopt, weight, bias, eps, "layer_norm_forward");
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight,
                                                                  std::optional<Tensor> bias, double eps) {
  Forward out = any_forward(x, residual, weight, bias, eps, "add_layer_norm_forward");
  return {out.y, *out.sum, out.mean, out.rstd};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd,
                                                       bool has_bias) {
  return any_backward(grad, std::nullopt, x, weight, mean, rstd, has_bias, "layer_norm_backward");
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
