// Every operator's schema and nothing else: the table of contents of csrc.
//
// Forward and backward are operators of their own. Their fake (meta) functions and autograd formulas are Python, in
// pygpt/ops/, because the LibTorch stable ABI has no C++ autograd. Statistics kept for backward are float32.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pygpt, m) {
  // idx (B, T) int64; token_table (V, C); position_table (P, C): out[b, t] = token_table[idx[b, t]]
  // + position_table[position_offset + t]
  m.def("embedding_forward(Tensor idx, Tensor token_table, Tensor? position_table, SymInt position_offset) -> Tensor");
  // -> token_grad (token_rows, C), position_grad (position_rows, C; of 0 rows where position_rows is absent)
  m.def(
      "embedding_backward(Tensor grad, Tensor idx, SymInt token_rows, SymInt? position_rows, SymInt position_offset) "
      "-> (Tensor, Tensor)");
  // Adds into token_grad (V, C) and position_grad (P, C), which may already hold gradients.
  m.def(
      "embedding_backward_(Tensor grad, Tensor idx, Tensor(a!) token_grad, Tensor(b!)? position_grad, "
      "SymInt position_offset) -> ()");

  // x (..., C); weight, bias (C,) -> y (..., C), mean (rows,), rstd (rows,)
  m.def("layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  // -> grad_x, grad_weight, grad_bias (of size 0 unless has_bias)
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) "
      "-> (Tensor, Tensor, Tensor)");

  // y = layer_norm(x + residual) -> y, x + residual, mean, rstd
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // grad_sum is the gradient of the second output; sum is that output. -> grad_sum_in (of x and of residual alike),
  // grad_weight, grad_bias
  m.def(
      "add_layer_norm_backward(Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight, Tensor mean, Tensor rstd, "
      "bool has_bias) -> (Tensor, Tensor, Tensor)");

  // q (B, T, H, D); k, v (B, S, H, D), S >= T: query i sees keys 0 .. i + S - T -> out (B, T, H, D), lse (B, H, T)
  // seed: int64 (1,), the key of the counter-based dropout generator; absent when dropout_p is 0
  // document_start: int32 (B, T), not decreasing along T: query i of batch b sees no key before document_start[b, i],
  // which counts as 0 if it is less and as i + S - T if it is more
  m.def(
      "causal_attention_forward(Tensor q, Tensor k, Tensor v, float scale, float dropout_p, Tensor? seed, "
      "Tensor? document_start=None) -> (Tensor, Tensor)");
  // -> grad_q, grad_k, grad_v
  m.def(
      "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
      "float dropout_p, Tensor? seed, Tensor? document_start=None) -> (Tensor, Tensor, Tensor)");
  // The same of a packed projection, qkv (B, T, 3C) with C = n_head * D -> out (B, T, C), lse (B, H, T)
  m.def(
      "causal_attention_qkvpacked_forward(Tensor qkv, int n_head, float scale, float dropout_p, Tensor? seed, "
      "Tensor? document_start=None) -> (Tensor, Tensor)");
  // -> grad_qkv
  m.def(
      "causal_attention_qkvpacked_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int n_head, float scale, "
      "float dropout_p, Tensor? seed, Tensor? document_start=None) -> Tensor");

  // GELU with the tanh approximation, elementwise
  m.def("gelu_forward(Tensor x) -> Tensor");
  m.def("gelu_backward(Tensor grad, Tensor x) -> Tensor");
  // x (..., C), bias (C,) of one dtype: gelu(x + bias); on GPUs alone
  m.def("bias_gelu_forward(Tensor x, Tensor bias) -> Tensor");
  // -> grad_x, grad_bias
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");

  // x (..., K), weight (N, K), bias (N,) of one dtype -> x @ weight.T + bias, (..., N): for the few rows of generation; no
  // backward
  m.def("linear_few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("column_sum(Tensor x) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor");

  // A model's blocks and last LayerNorm for the few tokens of a step of generation: x (B, T, C) -> (B, T, C). norms: the
  // weights of each block's LayerNorms and of the last one; linears: of each block's (3C, C), (C, C), (4C, C), (C, 4C); both
  // followed by as many biases, or none; scales: as linear_int8, or none. The caches (layers, rows, columns, H, D) hold
  // `past` tokens, and get those of x.
  m.def(
      "decode_blocks(Tensor x, Tensor[] norms, Tensor[] linears, Tensor[] scales, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "int past, float eps, Tensor? document_start) -> Tensor");

  // a (M, K), b (K, N), bias (N,), of one dtype -> a @ b + bias, summed in float32
  m.def("matmul(Tensor a, Tensor b, Tensor? bias) -> Tensor");
  // out (M, N) = a @ b, or with `add` += it
  m.def("matmul_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");

  // logits (rows, V) contiguous; targets (rows,) int64 -> the rows' losses (rows,) float32, 0 where the target is
  // ignore_index. With grad_factor, a float32 scalar, logits become (softmax - one_hot) * grad_factor, or 0.
  m.def("cross_entropy_rows_(Tensor(a!) logits, Tensor targets, int ignore_index, Tensor? grad_factor) -> Tensor");
  // -> the mean loss of the rows that are not ignored, a float32 scalar, NaN without any. Logits become its gradient, if needed.
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, int ignore_index, bool need_gradient) -> Tensor");

  // hidden (N, C), weight (V, C), bfloat16; targets int64 (N,) -> the mean loss, float32; gradients of hidden and of weight,
  // of 0 rows where they are not needed: on processors with AMX
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, bool need_hidden, "
      "bool need_weight) -> (Tensor, Tensor, Tensor)");

  // One step of AdamW for contiguous tensors, weights of one dtype and grads of one. residuals: int16, what float32 weights
  // have beyond bfloat16 ones; empty for float32 weights. means and squares: float32. steps: float32 scalars that are counted
  // up. Gradients are multiplied by grad_factor, a float32 scalar.
  m.def(
      "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] residuals, Tensor(c!)[] means, Tensor(d!)[] squares, "
      "Tensor(e!)[] steps, Tensor? grad_factor, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
  // -> the Euclidean norm of all tensors together, a float32 scalar
  m.def("grad_norm(Tensor[] grads) -> Tensor");
}
