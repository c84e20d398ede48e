// layer_norm and add_layer_norm on CUDA: what the host side hands to the kernels. All tensors are contiguous.
#pragma once

#include "cuda/launch.h"
#include "cuda/types.h"

namespace pygpt::cuda {

struct LayerNormForward {
  DType dtype, weight_dtype;      // weight_dtype: of weight and bias, the same as dtype or f32
  const void *x, *residual;       // (rows, C); residual is null for plain layer_norm
  const void *weight, *bias;      // (C,); bias may be null
  void *sum, *y;                  // (rows, C); sum = x + residual, null for plain layer_norm
  float *mean, *rstd;             // (rows,)
  int64_t rows, C;
  float eps;
};

struct LayerNormBackward {
  DType dtype, weight_dtype;
  const void *grad, *grad_sum;    // (rows, C); grad_sum is null for plain layer_norm
  const void *x, *weight;         // x is what was normalised: for add_layer_norm the sum
  const float *mean, *rstd;
  void* grad_x;                   // (rows, C)
  void *grad_weight, *grad_bias;  // (C,) in weight_dtype; grad_bias may be null
  float* partial;                 // (layer_norm_partials(...), 2, C): scratch
  int64_t rows, C;
};

void layer_norm_forward(const LayerNormForward& p, const Launch& at);
void layer_norm_backward(const LayerNormBackward& p, const Launch& at);

// Partial sums of the weight gradients: a function of the shape and the device alone, so that the bits are too.
int64_t layer_norm_partials(int64_t rows, int64_t C, DType dtype, int multiprocessors);

}  // namespace pygpt::cuda
