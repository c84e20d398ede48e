// Products of matrices on the CPU: checks, operands and registration. bfloat16 goes by AMX tiles where the processor has them,
// all else by vectors.

#include "cpu/matmul.h"

#include <type_traits>
#include <vector>

namespace pygpt {
namespace {

// Where no stride is 1, a copy of x. free_dim: the dimension that the result has too.
MatmulStrides strides_of(Tensor& x, int64_t free_dim) {
  if (x.stride(0) != 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
  MatmulStrides strides{x.stride(1 - free_dim), x.stride(free_dim)};
  if (strides.k != 1 && strides.free != 1) strides.free = 1;  // there is but one element
  return strides;
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

void multiply_by_tiles(Tensor& a, Tensor& b, const bf16* bias, bool add, Tensor& out) {
  MatmulOut to{out.size(0), out.size(1)};
  to.data = static_cast<bf16*>(out.mutable_data_ptr()), to.stride = out.stride(0), to.bias = bias, to.add = add;
  const MatmulStrides left = strides_of(a, 0), right = strides_of(b, 1);
  Workspace workspace(out);
  multiply({data<bf16>(a), left}, {data<bf16>(b), right}, a.size(1), to, workspace);
}

template <class T>
void multiply_by_vectors(Tensor& a, Tensor& b, const float* bias, bool add, Tensor& out) {
  VectorOut<T> to{out.size(0), out.size(1), static_cast<T*>(out.mutable_data_ptr()), out.stride(0), bias, add};
  const MatmulStrides left = strides_of(a, 0), right = strides_of(b, 1);
  Workspace workspace(out);
  multiply_by_vectors<T, T>({data<T>(a), left}, {data<T>(b), right}, a.size(1), to, workspace);
}

void run(Tensor a, Tensor b, std::optional<Tensor> bias, bool add, Tensor& out) {
  if (!out.numel()) return;
  const ScalarType dtype = a.scalar_type();
  if (bias) bias = as_contiguous(dtype == ScalarType::BFloat16 && has_tiles() ? *bias : to_dtype(*bias, ScalarType::Float));
  if (dtype == ScalarType::BFloat16 && has_tiles())
    return multiply_by_tiles(a, b, bias ? data<bf16>(*bias) : nullptr, add, out);
  (dtype == ScalarType::Float ? multiply_by_vectors<float> : multiply_by_vectors<bf16>)(
      a, b, bias ? data<float>(*bias) : nullptr, add, out);
}

void check(const char* op, const Tensor& a, const Tensor& b) {
  PYGPT_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": a must be (M, K) and b (K, N)");
  PYGPT_CHECK((a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::BFloat16) &&
                  b.scalar_type() == a.scalar_type(),
              op, ": a and b must both be float32, or both bfloat16");
  PYGPT_CHECK(a.size(1) > 0, op, ": there is nothing to sum");
}

Tensor matmul(Tensor a, Tensor b, std::optional<Tensor> bias) {
  check("matmul", a, b);
  PYGPT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == b.size(1) && bias->scalar_type() == a.scalar_type()),
              "matmul: bias must be (N,), of the dtype of a and b");
  Tensor out = new_empty(a, {a.size(0), b.size(1)}, a.scalar_type());
  run(a, b, bias, false, out);
  return out;
}

void matmul_(Tensor out, Tensor a, Tensor b, bool add) {
  check("matmul_", a, b);
  PYGPT_CHECK(out.dim() == 2 && out.size(0) == a.size(0) && out.size(1) == b.size(1) && out.is_contiguous() &&
                  out.scalar_type() == a.scalar_type(),
              "matmul_: out must be (M, N), contiguous, of the dtype of a and b");
  run(a, b, std::nullopt, add, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) {
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("matmul_", TORCH_BOX(&matmul_));
}

}  // namespace pygpt
