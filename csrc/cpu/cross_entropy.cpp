// cross_entropy_rows_ on the CPU: checks, threads and registration. The arithmetic is cross_entropy_kernel.h.

#include "cpu/tensor.h"

#define PYGPT_KERNELS "cpu/cross_entropy_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

constexpr int64_t kGrain = 16384;  // logits a thread takes at least

Tensor cross_entropy_rows_(Tensor logits, Tensor targets, int64_t ignore_index, std::optional<Tensor> grad_factor) {
  PYGPT_CHECK(logits.dim() == 2 && logits.is_contiguous() && targets.dim() == 1 && targets.size(0) == logits.size(0),
              "cross_entropy_rows_: logits must be (rows, V), contiguous, and targets (rows,)");
  PYGPT_CHECK(logits.scalar_type() == ScalarType::Float || logits.scalar_type() == ScalarType::BFloat16,
              "cross_entropy_rows_: logits must be float32 or bfloat16");
  PYGPT_CHECK(targets.scalar_type() == ScalarType::Long, "cross_entropy_rows_: targets must be int64");
  PYGPT_CHECK(!grad_factor || (grad_factor->scalar_type() == ScalarType::Float && grad_factor->numel() == 1),
              "cross_entropy_rows_: grad_factor must be a float32 scalar");
  const float* factor = grad_factor ? grad_factor->const_data_ptr<float>() : nullptr;
  targets = as_contiguous(targets);
  const int64_t rows = logits.size(0), V = logits.size(1);
  const auto* target = targets.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row)
    PYGPT_CHECK(target[row] == ignore_index || (target[row] >= 0 && target[row] < V),
                "cross_entropy_rows_: a target is outside the vocabulary and is not ignore_index");
  Tensor losses = new_empty(logits, {rows}, ScalarType::Float);
  float* loss = losses.mutable_data_ptr<float>();
  const auto run = [&]<class T>(T) {
    const auto kernel = PYGPT_DISPATCH(cross_entropy_rows<T>);
    T* x = static_cast<T*>(logits.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, 1 + kGrain / std::max<int64_t>(V, 1), [&](int64_t begin, int64_t end) {
      kernel(x + begin * V, target + begin, loss + begin, end - begin, V, ignore_index, factor);
    });
  };
  logits.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16{});
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_)); }

}  // namespace pygpt
