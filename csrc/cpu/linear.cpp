// linear of few rows, with weights of 8 bits of any number, and the gradient of a bias, on the CPU: checks, threads and
// registration. The arithmetic is linear_kernel.h, and of many rows matmul_vector.cpp.

#include "cpu/matmul.h"
#include "cpu/operators.h"

#include <bit>
#include <memory>
#include <type_traits>
#include <vector>

#define PYGPT_KERNELS "cpu/linear_kernel.h"
#include "cpu/foreach_isa.h"

namespace pygpt {
namespace {

constexpr int64_t kGrainBytes = 65536;  // of weights, that a thread takes at least
constexpr int64_t kTilesFrom = 2;       // rows up to which vectors read weights faster than AMX tiles
constexpr int64_t kMatrixFrom = 32;     // rows with which weights of 8 bits are packed, where products go by vectors

const float* as_float(const float* p, int64_t, std::vector<float>&) { return p; }
const float* as_float(const bf16* p, int64_t count, std::vector<float>& to) {
  to.resize(count);
  for (int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(static_cast<uint32_t>(p[i].bits) << 16);
  return to.data();
}

// x (..., K) in T, weight (N, K) in W, scale float32 (N,) or none, bias (N,) in T or none -> (..., N) in T.
template <class T, class W>
Tensor run(Tensor x, Tensor weight, const std::optional<Tensor>& scale, std::optional<Tensor> bias) {
  x = as_contiguous(x);
  weight = as_contiguous(weight);
  if (bias) bias = as_contiguous(*bias);
  const int64_t N = weight.size(0), K = weight.size(1);
  int64_t sizes[64], rows = 1;
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= sizes[i];
  sizes[x.dim() - 1] = N;
  Tensor y = new_empty(x, sizes, x.dim(), x.scalar_type());
  const W* w = static_cast<const W*>(weight.const_data_ptr());
  const float* s = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr;
  const T* b = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const auto over_columns = [&]<class X>(const X* in) {
    // With so few rows an instruction for bfloat16 is worth its while even at half of the rate.
    const auto kernel =
        rows <= kTilesFrom ? PYGPT_DISPATCH(linear_few_rows<X, W, T>) : PYGPT_DISPATCH_PRODUCTS(linear_few_rows<X, W, T>);
    const int64_t grain = 1 + kGrainBytes / std::max<int64_t>(K * sizeof(W), 1);
    torch::stable::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
      kernel(in, w + begin * K, s ? s + begin : nullptr, b ? b + begin : nullptr, out + begin, rows, end - begin, K, N);
    });
  };
  const T* in = static_cast<const T*>(x.const_data_ptr());
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<W, bf16>)
    if (rows > kTilesFrom && multiply_few_rows(in, rows, K, w, N, b, out)) return y;
  if constexpr (std::is_same_v<W, T>) {
    over_columns(in);
  } else {
    std::vector<float> converted;
    if (rows >= kMatrixFrom && N && K && multiplies_by_vectors()) {
      Workspace workspace(y);
      const VectorOut<T> to{rows, N, out, N, b ? as_float(b, N, converted) : nullptr};
      multiply_by_vectors<T, W>({in, {1, K}}, {w, {1, K}, s}, K, to, workspace);
    } else {
      over_columns(as_float(in, rows * K, converted));
    }
  }
  return y;
}

void check(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  PYGPT_CHECK(x.dim() >= 1 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1), op,
              ": weight must be (N, K) for x (..., K)");
  PYGPT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), op, ": bias must be (N,)");
}

}  // namespace

Tensor linear_few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check("linear_few_rows", x, weight, bias);
  const ScalarType dtype = x.scalar_type();
  PYGPT_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && weight.scalar_type() == dtype &&
                  (!bias || bias->scalar_type() == dtype),
              "linear_few_rows: x, weight and bias must all be float32, or all bfloat16");
  return (dtype == ScalarType::Float ? run<float, float> : run<bf16, bf16>)(x, weight, std::nullopt, bias);
}

Tensor linear_int8(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias) {
  check("linear_int8", x, weight, bias);
  const ScalarType dtype = x.scalar_type();
  PYGPT_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && (!bias || bias->scalar_type() == dtype),
              "linear_int8: x and bias must both be float32, or both bfloat16");
  PYGPT_CHECK(weight.scalar_type() == ScalarType::Char && scale.scalar_type() == ScalarType::Float && scale.dim() == 1 &&
                  scale.size(0) == weight.size(0),
              "linear_int8: weight must be int8 (N, K), and scale float32 (N,)");
  return (dtype == ScalarType::Float ? run<float, int8_t> : run<bf16, int8_t>)(x, weight, as_contiguous(scale), bias);
}

namespace {

// The gradient of a bias. Sums of kRows rows, then the sum of those: the same bits for any number of threads.
template <class T>
Tensor sum_columns(const Tensor& x) {
  constexpr int64_t kRows = 128;
  const int64_t rows = x.size(0), columns = x.size(1), blocks = (rows + kRows - 1) / kRows;
  const int64_t stride = whole_pairs(columns);
  Tensor y = new_empty(x, {columns}, x.scalar_type());
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const std::unique_ptr<float[]> sums(new float[(blocks + 1) * stride]);
  float* total = sums.get() + blocks * stride;
  const auto kernel = PYGPT_DISPATCH(sum_rows<T>);
  const int64_t grain = 1 + kGrainBytes / std::max<int64_t>(kRows * columns * sizeof(T), 1);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kRows;
      kernel(in + first * columns, sums.get() + block * stride, std::min(kRows, rows - first), columns);
    }
  });
  PYGPT_DISPATCH(sum_rows<float>)(sums.get(), total, blocks, stride);
  PYGPT_DISPATCH(round_to<T>)(total, static_cast<T*>(y.mutable_data_ptr()), columns);
  return y;
}

Tensor column_sum(Tensor x) {
  PYGPT_CHECK(x.dim() == 2 && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16),
              "column_sum: x must be (M, N), float32 or bfloat16");
  return (x.scalar_type() == ScalarType::Float ? sum_columns<float> : sum_columns<bf16>)(as_contiguous(x));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("linear_few_rows", TORCH_BOX(&linear_few_rows));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("column_sum", TORCH_BOX(&column_sum));
}

}  // namespace pygpt
