// The cross-entropy of logits on the CPU: checks, threads and registration. The arithmetic is cross_entropy_kernel.h.

#include "cpu/tensor.h"

#include <algorithm>
#include <numeric>
#include <vector>

#define PYGPT_KERNELS "cpu/cross_entropy_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

constexpr int64_t kGrain = 16384;  // logits a thread takes at least

// The rows' losses, 0 where ignored; with a factor, logits become their gradients times it.
void run(const char* op, Tensor& logits, Tensor targets, int64_t ignore_index, const float* factor, float* losses) {
  const int64_t rows = logits.size(0), V = logits.size(1);
  const auto* target = targets.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    PYGPT_CHECK(target[row] == ignore_index || (target[row] >= 0 && target[row] < V), op,
                ": a target is outside the vocabulary and is not ignore_index");
  const auto over_rows = [&]<class T>(T) {
    const auto kernel = PYGPT_DISPATCH(cross_entropy_rows<T>);
    T* x = static_cast<T*>(logits.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, 1 + kGrain / std::max<int64_t>(V, 1), [&](int64_t begin, int64_t end) {
      kernel(x + begin * V, target + begin, losses + begin, end - begin, V, ignore_index, factor);
    });
  };
  logits.scalar_type() == ScalarType::Float ? over_rows(float{}) : over_rows(bf16{});
}

void check(const char* op, const Tensor& logits, const Tensor& targets) {
  PYGPT_CHECK(logits.dim() == 2 && logits.is_contiguous() && targets.dim() == 1 && targets.size(0) == logits.size(0), op,
              ": logits must be (rows, V), contiguous, and targets (rows,)");
  PYGPT_CHECK(logits.scalar_type() == ScalarType::Float || logits.scalar_type() == ScalarType::BFloat16, op,
              ": logits must be float32 or bfloat16");
  PYGPT_CHECK(targets.scalar_type() == ScalarType::Long, op, ": targets must be int64");
}

Tensor cross_entropy_rows_(Tensor logits, Tensor targets, int64_t ignore_index, std::optional<Tensor> grad_factor) {
  const char* op = "cross_entropy_rows_";
  check(op, logits, targets);
  PYGPT_CHECK(!grad_factor || (grad_factor->scalar_type() == ScalarType::Float && grad_factor->numel() == 1), op,
              ": grad_factor must be a float32 scalar");
  Tensor losses = new_empty(logits, {logits.size(0)}, ScalarType::Float);
  run(op, logits, as_contiguous(targets), ignore_index, grad_factor ? grad_factor->const_data_ptr<float>() : nullptr,
      losses.mutable_data_ptr<float>());
  return losses;
}

Tensor cross_entropy_(Tensor logits, Tensor targets, int64_t ignore_index, bool need_gradient) {
  const char* op = "cross_entropy_";
  check(op, logits, targets);
  targets = as_contiguous(targets);
  const auto* target = targets.const_data_ptr<int64_t>();
  const int64_t count = targets.size(0) - std::count(target, target + targets.size(0), ignore_index);
  const float factor = 1.0f / static_cast<float>(std::max<int64_t>(count, 1));
  std::vector<float> losses(targets.size(0));
  run(op, logits, targets, ignore_index, need_gradient ? &factor : nullptr, losses.data());
  Tensor mean = new_empty(logits, {}, ScalarType::Float);
  *mean.mutable_data_ptr<float>() =
      static_cast<float>(std::accumulate(losses.begin(), losses.end(), 0.0) / static_cast<double>(count));
  return mean;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
}

}  // namespace pygpt
