// What every CUDA operator's host side shares: the stable ABI's Tensor, device guard and stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/types.h"

// The tests build the same files for CPU tensors over an emulated device.
#ifndef PYGPT_CUDA_KEY
#define PYGPT_CUDA_KEY CUDA
#endif

namespace pygpt::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define PYGPT_CHECK STD_TORCH_CHECK

inline std::string shape_text(const char* op, const Tensor& x) {
  std::string text = std::string(op) + " of (";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

// Makes x's device the current one for as long as it lives, and holds torch's current stream there.
class __attribute__((visibility("hidden"))) OnDevice : public Launch {
 public:
  const int device;

  OnDevice(const char* op, const Tensor& x) : Launch{nullptr, 0, shape_text(op, x)}, device(device_of(x)), guard_(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), *this);
  }

 private:
  static int device_of(const Tensor& x) { return static_cast<int>(x.get_device_index()); }
  torch::stable::accelerator::DeviceGuard guard_;
};

inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

// Before torch 2.12 the shapes that the stable ABI hands out have no ==.
inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

inline DType dtype_of(const Tensor& x, const char* op) {
  const ScalarType type = x.scalar_type();
  PYGPT_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
              ": tensors must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? DType::f32 : type == ScalarType::BFloat16 ? DType::bf16 : DType::f16;
}

template <class T = void>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T = void>
const T* data(const std::optional<Tensor>& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

template <class T = void>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace pygpt::cuda
