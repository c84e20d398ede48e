// adamw_ and grad_norm on the CPU: checks, threads and registration. The arithmetic is adamw_kernel.h.

#include <algorithm>
#include <vector>

#include "cpu/tensor.h"

namespace pygpt {

// What one tensor's update needs beside its elements.
struct AdamWStep {
  float grad_factor, beta1, rest1, beta2, rest2, decay, rate, correction, eps;
};

}  // namespace pygpt

#define PYGPT_KERNELS "cpu/adamw_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

using Tensors = std::vector<Tensor>;

// Threads share the concatenation of all tensors, cut into blocks; a block does not cross the end of a tensor.
constexpr int64_t kBlock = 16384;
constexpr int64_t kBlocksPerThread = 4;  // at least: fewer do not pay for waking a second thread

class Blocks {
 public:
  explicit Blocks(const Tensors& tensors) {
    for (const Tensor& x : tensors) {
      numels_.push_back(x.numel());
      ends_.push_back(count() + (x.numel() + kBlock - 1) / kBlock);
    }
  }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  // Calls f(block, tensor, first element, number of elements) for each block.
  template <class F>
  void for_each(const F& f) const {
    torch::stable::parallel_for(0, count(), kBlocksPerThread, [&](int64_t begin, int64_t end) {
      size_t tensor = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
      for (int64_t block = begin; block < end; ++block) {
        while (block >= ends_[tensor]) ++tensor;
        const int64_t first = (block - (tensor ? ends_[tensor - 1] : 0)) * kBlock;
        f(block, tensor, first, std::min(kBlock, numels_[tensor] - first));
      }
    });
  }

 private:
  std::vector<int64_t> numels_, ends_;
};

bool is_served(const Tensor& x) { return x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16; }

float* state(const Tensor& x, int64_t numel) {
  PYGPT_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == numel,
              "adamw_: means, squares and steps must be float32, contiguous and of their weight's size");
  return x.mutable_data_ptr<float>();
}

struct Parameter {
  void* weight;
  int16_t* residual;
  const void* grad;
  float *mean, *square;
  AdamWStep step;
};

template <class W, class G>
void update(const Tensors& weights, const std::vector<Parameter>& parameters) {
  const auto kernel = PYGPT_DISPATCH(adamw_range<W, G>);
  Blocks(weights).for_each([&](int64_t, size_t i, int64_t at, int64_t n) {
    const Parameter& p = parameters[i];
    kernel(static_cast<const G*>(p.grad) + at, static_cast<W*>(p.weight) + at, p.residual ? p.residual + at : nullptr, p.mean + at,
           p.square + at, n, p.step);
  });
}

void adamw_(Tensors weights, Tensors grads, Tensors residuals, Tensors means, Tensors squares, Tensors steps,
            std::optional<Tensor> grad_factor, double lr, double beta1, double beta2, double eps, double weight_decay) {
  const size_t count = weights.size();
  PYGPT_CHECK(count > 0 && grads.size() == count, "adamw_: there must be a weight, and as many grads");
  const ScalarType dtype = weights[0].scalar_type(), grad_dtype = grads[0].scalar_type();
  const bool low = dtype == ScalarType::BFloat16, low_grad = grad_dtype == ScalarType::BFloat16;
  PYGPT_CHECK(residuals.size() == (low ? count : 0) && means.size() == count && squares.size() == count &&
                  steps.size() == count,
              "adamw_: the lists must be equally long, residuals empty for float32 weights");
  const float factor = grad_factor ? *state(*grad_factor, 1) : 1.0f;
  std::vector<Parameter> parameters;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[i], &grad = grads[i];
    const int64_t numel = weight.numel();
    PYGPT_CHECK(is_served(weight) && is_served(grad) && weight.scalar_type() == dtype && grad.scalar_type() == grad_dtype &&
                    weight.is_contiguous() && grad.is_contiguous() && grad.numel() == numel,
                "adamw_: weights, all of one dtype, and grads, too, must be float32 or bfloat16, contiguous and of one size");
    PYGPT_CHECK(!low || (residuals[i].scalar_type() == ScalarType::Short && residuals[i].is_contiguous() && residuals[i].numel() == numel),
                "adamw_: residuals must be int16, contiguous and of their weight's size");
    const double t = *state(steps[i], 1) + 1;
    parameters.push_back({weight.mutable_data_ptr(), low ? static_cast<int16_t*>(residuals[i].mutable_data_ptr()) : nullptr,
                          grad.const_data_ptr(), state(means[i], numel), state(squares[i], numel),
                          {factor, float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(1 - lr * weight_decay),
                           float(lr / (1 - std::pow(beta1, t))), float(1 / std::sqrt(1 - std::pow(beta2, t))), float(eps)}});
  }
  for (Tensor& step : steps) *step.mutable_data_ptr<float>() += 1;
  (low ? low_grad ? update<bf16, bf16> : update<bf16, float> : low_grad ? update<float, bf16> : update<float, float>)(weights, parameters);
}

// The blocks' sums are added in order, so the bits do not depend on the number of threads.
Tensor grad_norm(Tensors grads) {
  PYGPT_CHECK(!grads.empty(), "grad_norm: there must be a gradient");
  for (Tensor& grad : grads) {
    PYGPT_CHECK(is_served(grad), "grad_norm: gradients must be float32 or bfloat16");
    grad = as_contiguous(grad);
  }
  const Blocks blocks(grads);
  std::vector<double> sums(blocks.count());
  const auto of_float = PYGPT_DISPATCH(sum_of_squares<float>);
  const auto of_bf16 = PYGPT_DISPATCH(sum_of_squares<bf16>);
  blocks.for_each([&](int64_t block, size_t i, int64_t at, int64_t n) {
    const void* data = grads[i].const_data_ptr();
    sums[block] = grads[i].scalar_type() == ScalarType::Float ? of_float(static_cast<const float*>(data) + at, n)
                                                              : of_bf16(static_cast<const bf16*>(data) + at, n);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  Tensor norm = new_empty(grads[0], {}, ScalarType::Float);
  *norm.mutable_data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
}

}  // namespace pygpt
