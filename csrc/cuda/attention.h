// Causal attention on CUDA: what the host side hands to the kernels.
#pragma once

#include "cuda/launch.h"
#include "cuda/philox.h"
#include "cuda/types.h"

namespace pygpt::cuda {

// (B, T or S, H, D) with the last stride 1; the others in elements.
struct Heads {
  void* data;
  int64_t batch, token, head;
};

struct Attention {
  DType dtype;
  int B, T, S, H, D;       // query i sees the keys 0 .. i + S - T
  float scale;
  Dropout dropout;
  Heads q, k, v, out;
  float* lse;              // (B, H, T)
  // Forward, split over keys: partial results of each split, added up by a second kernel. Null and 1 otherwise.
  int splits;
  float *partial_out, *partial_lse;  // (splits, B, H, T, D) and (splits, B, H, T)
  // Backward.
  Heads grad, grad_q, grad_k, grad_v;
  float* delta;            // (B, H, T): scratch, the sum over D of grad * out
};

// Whether the tensor-core kernels serve this problem: 16-bit elements, D a multiple of 8 up to 128, and every row at a
// multiple of 16 bytes. attention_plain_* serve all others, up to kMaxHeadDim.
bool attention_on_tensor_cores(const Attention& p, bool backward);
constexpr int kMaxHeadDim = 256;

// Into how many parts the keys are split, so that few queries (decoding) still fill the device.
int attention_splits(const Attention& p, int multiprocessors);

void attention_forward(const Attention& p, const Launch& at);
void attention_backward(const Attention& p, const Launch& at);
void attention_plain_forward(const Attention& p, const Launch& at);
void attention_plain_backward(const Attention& p, const Launch& at);
void attention_delta(const Attention& p, const Launch& at);

}  // namespace pygpt::cuda
