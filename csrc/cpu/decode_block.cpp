// A transformer block for the few tokens of a step of generation: its operators one after the other, without Python between
// them, in which the memory that weights come from would lie idle.

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/operators.h"

namespace pygpt {
namespace {

using Tensors = std::vector<Tensor>;

// Copies rows (B, T, C), `stride` elements from one to the next, to columns past .. past + T of a layer of the cache.
void append(const Tensor& qkv, int64_t offset, const Tensor& cache, int64_t past) {
  const int64_t T = qkv.size(1), stride = qkv.size(2), size = qkv.element_size(), bytes = stride / 3 * size;
  const char* from = static_cast<const char*>(qkv.const_data_ptr()) + offset * size;
  char* to = static_cast<char*>(cache.mutable_data_ptr());
  for (int64_t b = 0; b < qkv.size(0); ++b)
    for (int64_t t = 0; t < T; ++t, from += stride * size)
      std::memcpy(to + (b * cache.stride(0) + (past + t) * cache.stride(1)) * size, from, bytes);
}

std::tuple<Tensor, Tensor> decode_block(Tensor x, std::optional<Tensor> residual, Tensors norms, Tensors linears,
                                        Tensors scales, Tensor k_cache, Tensor v_cache, int64_t layer, int64_t past,
                                        double eps, std::optional<Tensor> document_start) {
  const char* op = "decode_block";
  const bool bias = linears.size() == 8;
  PYGPT_CHECK(x.dim() == 3 && k_cache.dim() == 5, op, ": x must be (B, T, C), the caches (layers, rows, columns, H, D)");
  PYGPT_CHECK(norms.size() == (bias ? 4u : 2u) && (bias || linears.size() == 4) && (scales.empty() || scales.size() == 4), op,
              ": there must be 2 weights of LayerNorms and 4 of linear layers, and as many biases or none");
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), H = k_cache.size(3), D = k_cache.size(4), end = past + T;
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    PYGPT_CHECK(cache->scalar_type() == x.scalar_type() && cache->dim() == 5, op, ": the caches must have x's dtype");
    for (int i = 0; i < 5; ++i) PYGPT_CHECK(cache->size(i) == k_cache.size(i), op, ": the caches must have one shape");
    PYGPT_CHECK(cache->stride(4) == 1 && cache->stride(3) == D, op, ": a token's heads must be neighbours in the caches");
  }
  PYGPT_CHECK(H * D == C && layer >= 0 && layer < k_cache.size(0) && B <= k_cache.size(1) && past >= 0 &&
                  end <= k_cache.size(2),
              op, ": x does not fit into the caches");

  const auto bias_of = [&](const Tensors& of, size_t i) {
    return bias ? std::optional<Tensor>(of[of.size() / 2 + i]) : std::nullopt;
  };
  const auto linear = [&](const Tensor& in, size_t i) {
    return scales.empty() ? linear_few_rows(in, linears[i], bias_of(linears, i))
                          : linear_int8(in, linears[i], scales[i], bias_of(linears, i));
  };
  const auto norm = [&](size_t i) {  // x + residual is the new residual
    if (residual) {
      std::tie(x, *residual, std::ignore, std::ignore) = add_layer_norm_forward(x, *residual, norms[i], bias_of(norms, i), eps);
    } else {
      residual = x;
      x = std::get<0>(layer_norm_forward(x, norms[i], bias_of(norms, i), eps));
    }
  };
  const auto seen = [&](const Tensor& cache) {
    return torch::stable::narrow(const_cast<Tensor&>(cache), 1, 0, end);
  };

  norm(0);
  const Tensor qkv = linear(x, 0);
  PYGPT_CHECK(qkv.size(2) == 3 * C, op, ": the first linear layer must have 3 C outputs");
  Tensor k = torch::stable::select(k_cache, 0, layer), v = torch::stable::select(v_cache, 0, layer);
  append(qkv, C, k, past);
  append(qkv, 2 * C, v, past);
  if (B < k.size(0)) k = torch::stable::narrow(k, 0, 0, B), v = torch::stable::narrow(v, 0, 0, B);
  const Tensor q = torch::stable::select(torch::stable::view(qkv, {B, T, 3, H, D}), 2, 0);
  const Tensor y = std::get<0>(causal_attention_forward(q, seen(k), seen(v), 1 / std::sqrt(static_cast<double>(D)), 0.0,
                                                        std::nullopt, document_start));
  x = linear(torch::stable::view(y, {B, T, C}), 1);
  norm(1);
  return {linear(gelu_forward(linear(x, 2)), 3), *residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { m.impl("decode_block", TORCH_BOX(&decode_block)); }

}  // namespace pygpt
