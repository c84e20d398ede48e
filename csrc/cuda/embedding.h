// embedding on CUDA: what the host side hands to the kernels. All tensors are contiguous.
#pragma once

#include "cuda/launch.h"
#include "cuda/types.h"

namespace pygpt::cuda {

struct EmbeddingForward {
  DType dtype;
  const int64_t* idx;                             // (tokens,), tokens = B * T
  const void *token_table, *position_table;       // (V, C), (P, C); the second may be null
  void* out;                                      // (tokens, C)
  int64_t tokens, T, V, C, position_offset;
};

struct EmbeddingBackward {
  DType dtype, table_dtype;                       // of grad, and of the tables' gradients: the same or f32
  const int64_t* idx;                             // (tokens,)
  const void* grad;                               // (tokens, C)
  void *token_grad, *position_grad;               // (V, C), (P, C), added to; the second may be null
  int64_t tokens, T, V, C, position_offset;
  int32_t *keys[2], *places[2];                   // (tokens,) each: scratch of the sort
  int32_t* counts;                                // (embedding_counts(tokens),): scratch of the sort
  float* partial;                                 // (embedding_chunks(tokens), 2, C): sums of runs that cross chunks
};

void embedding_forward(const EmbeddingForward& p, const Launch& at);
void embedding_backward(const EmbeddingBackward& p, const Launch& at);
int64_t embedding_counts(int64_t tokens);
int64_t embedding_chunks(int64_t tokens);

}  // namespace pygpt::cuda
