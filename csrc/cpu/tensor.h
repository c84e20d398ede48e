// Small helpers over the stable ABI's Tensor that every CPU operator uses.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

namespace pygpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A checked precondition. The Python seam checks what users can get wrong; these catch direct calls of torch.ops.pygpt.
#define PYGPT_CHECK STD_TORCH_CHECK

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

inline Tensor new_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, {sizes.begin(), sizes.size()}, dtype);
}

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace pygpt
