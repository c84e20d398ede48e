// linear of few rows on the CPU: checks, threads and registration. The arithmetic is linear_kernel.h.

#include "cpu/tensor.h"

#define PYGPT_KERNELS "cpu/linear_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

constexpr int64_t kGrainBytes = 65536;  // of weights, that a thread takes at least

Tensor linear_few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  PYGPT_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1),
              "linear_few_rows: weight must be (N, K) for x (..., K)");
  PYGPT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "linear_few_rows: bias must be (N,)");
  const ScalarType dtype = x.scalar_type();
  PYGPT_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && weight.scalar_type() == dtype &&
                  (!bias || bias->scalar_type() == dtype),
              "linear_few_rows: x, weight and bias must all be float32, or all bfloat16");
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  if (bias) bias = as_contiguous(*bias);
  const int64_t N = weight.size(0), K = weight.size(1);
  int64_t sizes[64], rows = 1;
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= sizes[i];
  sizes[x.dim() - 1] = N;
  Tensor y = new_empty(x, sizes, x.dim(), dtype);
  const auto run = [&]<class T>(T) {
    const auto kernel = PYGPT_DISPATCH(linear_few_rows<T>);
    const T *in = static_cast<const T*>(x.const_data_ptr()), *w = static_cast<const T*>(weight.const_data_ptr());
    const T* b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
    T* out = static_cast<T*>(y.mutable_data_ptr());
    const int64_t grain = 1 + kGrainBytes / std::max<int64_t>(K * sizeof(T), 1);
    torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
      kernel(in, w + begin * K, b ? b + begin : nullptr, out + begin, rows, end - begin, K, N);
    });
  };
  dtype == ScalarType::Float ? run(float{}) : run(bf16{});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { m.impl("linear_few_rows", TORCH_BOX(&linear_few_rows)); }

}  // namespace pygpt
