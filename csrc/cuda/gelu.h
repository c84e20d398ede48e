// gelu and bias_gelu on CUDA: what the host side hands to the kernels. All tensors are contiguous and of one dtype.
#pragma once

#include "cuda/launch.h"
#include "cuda/types.h"

namespace pygpt::cuda {

// y = gelu(x + bias); plain gelu has no bias, and any shape that holds its `count` elements.
struct Gelu {
  DType dtype;
  const void *x = nullptr, *bias = nullptr;  // (count,) as rows of C; (C,) or null
  void* y = nullptr;                         // as x; of the forward kernel alone, and what follows of the backward kernel
  const void* grad = nullptr;                // as x
  void *grad_x = nullptr, *grad_bias = nullptr;  // as x; as bias
  float* partial = nullptr;                  // (gelu_partials(...), C): scratch, where there is a bias
  int64_t count = 0, C = 0;
};

void gelu_forward(Gelu p, const Launch& at);
void gelu_backward(Gelu p, const Launch& at);

// Partial sums of the bias gradient: a function of the shape and the device alone, so that the bits are too.
int64_t gelu_partials(int64_t rows, int64_t C, DType dtype, int multiprocessors);

}  // namespace pygpt::cuda
