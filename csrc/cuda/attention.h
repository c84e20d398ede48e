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
  const int32_t* document_start;  // (B, T), contiguous, not decreasing along T; null: every query sees key 0
  int section;             // heads that are worked on at a time, so that their tiles stay in the second-level cache
  Heads q, k, v, out;
  float* lse;              // (B, H, T)
  // Forward, split over keys: partial results of each split, added up by a second kernel. Null and 1 otherwise.
  int splits;
  float *partial_out, *partial_lse;  // (splits, B, H, T, D) and (splits, B, H, T)
  // Backward.
  Heads grad, grad_q, grad_k, grad_v;
  float* delta;            // (B, H, T): scratch, the sum over D of grad * out
};

// The n-th block of a head, and which head, for a block of the grid: of a section's heads, all first blocks come first, then all
// second ones.
struct Place {
  int head, b, h, nth;
};
__device__ inline Place place(const Attention& p, int block, int blocks_of_head) {
  const int heads = p.B * p.H, in_section = p.section * blocks_of_head, begin = block / in_section * p.section;
  const int width = heads - begin < p.section ? heads - begin : p.section, within = block % in_section;
  const int head = begin + within % width;
  return {head, head / p.H, head % p.H, within / width};
}

// The first key that a query sees; a query beyond the last counts as the last. In range whatever document_start holds.
__device__ inline int first_key(const Attention& p, int b, int query) {
  if (!p.document_start) return 0;
  query = query < p.T ? query : p.T - 1;
  const int start = p.document_start[int64_t(b) * p.T + query], own = query + p.S - p.T;
  return start < 0 ? 0 : start < own ? start : own;
}

// How many queries have their first key before `key`: they come first, because starts do not decrease.
__device__ inline int queries_from_before(const Attention& p, int b, int key) {
  if (!p.document_start) return p.T;
  int low = 0, high = p.T;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (first_key(p, b, middle) < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Whether the tensor-core kernels serve this problem: 16-bit elements, D a multiple of 8 up to 128, and every row at a
// multiple of 16 bytes. attention_plain_* serve all others, up to kMaxHeadDim.
bool attention_on_tensor_cores(const Attention& p, bool backward);
constexpr int kMaxHeadDim = 256;

int heads_in_section(const Attention& p, int l2_bytes);

// Into how many parts the keys are split, so that few queries (decoding) still fill the device.
int attention_splits(const Attention& p, int multiprocessors);
void attention_join_splits(const Attention& p, const Launch& at);

void attention_forward(const Attention& p, const Launch& at);

// The kernels for compute capability 9.0, and whether they serve this problem; there only where the build is for 90a.
bool attention_on_hopper(const Attention& p, bool backward);
void attention_hopper_forward(const Attention& p, const Launch& at);
void attention_hopper_backward(const Attention& p, const Launch& at);

void attention_backward(const Attention& p, const Launch& at);
void attention_plain_forward(const Attention& p, const Launch& at);
void attention_plain_backward(const Attention& p, const Launch& at);
void attention_delta(const Attention& p, const Launch& at);

}  // namespace pygpt::cuda
