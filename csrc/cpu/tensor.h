// Small helpers over the stable ABI's Tensor that every CPU operator uses.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pygpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A checked precondition. The Python seam checks what users can get wrong; these catch direct calls of torch.ops.pygpt.
#define PYGPT_CHECK STD_TORCH_CHECK

// Rows of floats that kernels take and fill in the order of pairs (pair.h) are whole pairs, of every instruction set's.
constexpr int64_t whole_pairs(int64_t C) { return (C + 31) / 32 * 32; }

constexpr uintptr_t kHugePage = 2 << 20;  // bytes, the size that Linux has on x86-64 and mostly on ARM
constexpr uintptr_t kMostInHugePages = 64 << 20;

// Whether the C library keeps freed memory in the process (tune_allocator in module.cpp): then results are seldom fresh memory.
inline bool keeps_freed_memory = false;

// The C library maps fresh memory for large results, in every call if they come and go, and page faults can cost several times
// what filling them does: huge pages make them few. Advice only: where it is not taken, nothing but time is lost. Where memory
// stays, making room for huge pages costs the first steps of a training more than they bring; so it does, in virtual machines,
// for a table of a whole vocabulary: 16 ms at best for 77 MB, but 165 at worst, where small pages take 35 to 63.
inline void ask_for_huge_pages([[maybe_unused]] const Tensor& x) {
#ifdef MADV_HUGEPAGE
  const uintptr_t start = reinterpret_cast<uintptr_t>(x.const_data_ptr()), bytes = x.numel() * x.element_size();
  if (keeps_freed_memory || bytes > kMostInHugePages) return;
  const uintptr_t first = (start + kHugePage - 1) / kHugePage * kHugePage, last = (start + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Torch's own new_empty, empty_like and contiguous go through the dispatcher by name, a microsecond each; a small layer's
// whole arithmetic takes less. These do the same for contiguous tensors on the device of `like`.
inline Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[64], step = 1;  // the most dimensions that torch has
  for (int64_t i = dim - 1; i >= 0; step *= std::max<int64_t>(sizes[i--], 1)) strides[i] = step;
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, device_type, like.get_device_index(), &handle));
  Tensor result(handle);
  if (step >= static_cast<int64_t>(kHugePage)) ask_for_huge_pages(result);  // so many elements: two huge pages of bf16
  return result;
}

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_empty(like, sizes.begin(), sizes.size(), dtype);
}

inline Tensor new_like(const Tensor& like) {
  return new_empty(like, like.sizes().data(), like.dim(), like.scalar_type());
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace pygpt
