// Token and position embedding on CUDA: checks, scratch and registration. The kernels are embedding.cu.

#include "cuda/embedding.h"

#include <algorithm>
#include <limits>

#include "cuda/tensor.h"

namespace pygpt::cuda {
namespace {

void check_tables(const Tensor& idx, const Tensor& token, const std::optional<Tensor>& position, int64_t offset, const char* op) {
  PYGPT_CHECK(idx.dim() == 2 && idx.scalar_type() == ScalarType::Long, op, ": idx must be (B, T) int64");
  PYGPT_CHECK(token.dim() == 2 && token.is_contiguous(), op, ": the token table must be (V, C), contiguous");
  PYGPT_CHECK(token.size(0) < std::numeric_limits<int32_t>::max() && idx.numel() < std::numeric_limits<int32_t>::max(), op,
              ": V and B * T must be below 2^31");
  if (!position) return;
  PYGPT_CHECK(position->dim() == 2 && position->size(1) == token.size(1) && position->is_contiguous() &&
                  position->scalar_type() == token.scalar_type(),
              op, ": the position table must be (P, C), contiguous, in the token table's dtype");
  PYGPT_CHECK(offset >= 0 && offset + idx.size(1) <= position->size(0), op,
              ": position_offset and T go beyond the position table");
}

Tensor forward(Tensor idx, Tensor token_table, std::optional<Tensor> position_table, int64_t position_offset) {
  const char* op = "embedding_forward";
  token_table = torch::stable::contiguous(token_table);
  if (position_table) position_table = torch::stable::contiguous(*position_table);
  check_tables(idx, token_table, position_table, position_offset, op);
  const OnDevice device(op, token_table);
  idx = torch::stable::contiguous(idx);
  const int64_t B = idx.size(0), T = idx.size(1), C = token_table.size(1);
  Tensor out = new_empty(token_table, {B, T, C}, token_table.scalar_type());
  embedding_forward({.dtype = dtype_of(token_table, op),
                     .idx = data<int64_t>(idx),
                     .token_table = data(token_table),
                     .position_table = data(position_table),
                     .out = mutable_data(out),
                     .tokens = B * T,
                     .T = T,
                     .V = token_table.size(0),
                     .C = C,
                     .position_offset = position_offset},
                    device);
  return out;
}

void backward(Tensor grad, Tensor idx, Tensor token_grad, std::optional<Tensor> position_grad, int64_t position_offset) {
  const char* op = "embedding_backward_";
  check_tables(idx, token_grad, position_grad, position_offset, op);
  const OnDevice device(op, grad);
  const int64_t tokens = idx.numel(), C = token_grad.size(1);
  PYGPT_CHECK(grad.numel() == tokens * C, op, ": grad must be (B, T, C)");
  PYGPT_CHECK(token_grad.scalar_type() == grad.scalar_type() || token_grad.scalar_type() == ScalarType::Float, op,
              ": token_grad must have grad's dtype, or float32");
  grad = torch::stable::contiguous(grad);
  idx = torch::stable::contiguous(idx);
  Tensor sort = new_empty(grad, {4 * tokens + embedding_counts(tokens)}, ScalarType::Int);
  Tensor partial = new_empty(grad, {embedding_chunks(tokens), 2, C}, ScalarType::Float);
  int32_t* scratch = mutable_data<int32_t>(sort);
  embedding_backward({.dtype = dtype_of(grad, op),
                      .table_dtype = dtype_of(token_grad, op),
                      .idx = data<int64_t>(idx),
                      .grad = data(grad),
                      .token_grad = mutable_data(token_grad),
                      .position_grad = position_grad ? mutable_data(*position_grad) : nullptr,
                      .tokens = tokens,
                      .T = idx.size(1),
                      .V = token_grad.size(0),
                      .C = C,
                      .position_offset = position_offset,
                      .keys = {scratch, scratch + tokens},
                      .places = {scratch + 2 * tokens, scratch + 3 * tokens},
                      .counts = scratch + 4 * tokens,
                      .partial = mutable_data<float>(partial)},
                     device);
}

std::tuple<Tensor, Tensor> backward_of_size(Tensor grad, Tensor idx, int64_t token_rows, std::optional<int64_t> position_rows,
                                            int64_t position_offset) {
  PYGPT_CHECK(grad.dim() == 3, "embedding_backward: grad must be (B, T, C)");
  const int64_t sizes[] = {token_rows, grad.size(2)}, position_sizes[] = {position_rows.value_or(0), grad.size(2)};
  Tensor token_grad = torch::stable::new_zeros(grad, {sizes, 2}), position_grad = torch::stable::new_zeros(grad, {position_sizes, 2});
  std::optional<Tensor> position;
  if (position_rows) position = position_grad;
  backward(grad, idx, token_grad, position, position_offset);
  return {token_grad, position_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, PYGPT_CUDA_KEY, m) {
  m.impl("embedding_forward", TORCH_BOX(&forward));
  m.impl("embedding_backward", TORCH_BOX(&backward_of_size));
  m.impl("embedding_backward_", TORCH_BOX(&backward));
}

}  // namespace pygpt::cuda
