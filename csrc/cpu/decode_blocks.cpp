// A model's blocks for the few tokens of a step of generation: their operators one after the other, without Python between
// them, in which the memory that weights come from would lie idle.

#include <cstring>
#include <vector>

#include "cpu/operators.h"

namespace pygpt {
namespace {

using Tensors = std::vector<Tensor>;

// Copies rows (B, T, C), `stride` elements from one to the next, to columns past .. past + T of a layer of the cache.
void append(const Tensor& qkv, int64_t offset, const Tensor& cache, int64_t layer, int64_t past) {
  const int64_t T = qkv.size(1), stride = qkv.size(2), size = qkv.element_size(), bytes = stride / 3 * size;
  const char* from = static_cast<const char*>(qkv.const_data_ptr()) + offset * size;
  char* to = static_cast<char*>(cache.mutable_data_ptr()) + layer * cache.stride(0) * size;
  for (int64_t b = 0; b < qkv.size(0); ++b)
    for (int64_t t = 0; t < T; ++t, from += stride * size)
      std::memcpy(to + (b * cache.stride(1) + (past + t) * cache.stride(2)) * size, from, bytes);
}

Tensor decode_blocks(Tensor x, Tensors norms, Tensors linears, Tensors scales, Tensor k_cache, Tensor v_cache, int64_t past,
                     double eps, std::optional<Tensor> document_start) {
  const char* op = "decode_blocks";
  PYGPT_CHECK(x.dim() == 3 && k_cache.dim() == 5, op, ": x must be (B, T, C), the caches (layers, rows, columns, H, D)");
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), H = k_cache.size(3), D = k_cache.size(4);
  const size_t layers = k_cache.size(0), lists = norms.size() == 2 * layers + 1 ? 1 : 2;  // weights; and biases
  PYGPT_CHECK(norms.size() == (2 * layers + 1) * lists && linears.size() == 4 * layers * lists &&
                  (scales.empty() || scales.size() == 4 * layers),
              op, ": there must be weights of 2 LayerNorms and 4 linear layers for each block and of 1 LayerNorm more, and as ",
              "many biases or none");
  for (const Tensor* cache : {&k_cache, &v_cache}) {
    PYGPT_CHECK(cache->scalar_type() == x.scalar_type() && cache->dim() == 5, op, ": the caches must have x's dtype");
    for (int i = 0; i < 5; ++i) PYGPT_CHECK(cache->size(i) == k_cache.size(i), op, ": the caches must have one shape");
    PYGPT_CHECK(cache->stride(4) == 1 && cache->stride(3) == D, op, ": a token's heads must be neighbours in the caches");
  }
  PYGPT_CHECK(H >= 1 && D >= 1 && D <= 256 && H * D == C && B <= k_cache.size(1) && past >= 0 && past <= k_cache.size(2) - T,
              op, ": x does not fit into the caches");

  const auto bias_of = [&](const Tensors& of, size_t i) {
    return lists == 2 ? std::optional<Tensor>(of[of.size() / 2 + i]) : std::nullopt;
  };
  const auto linear = [&](const Tensor& in, size_t i) {
    return scales.empty() ? linear_few_rows(in, linears[i], bias_of(linears, i))
                          : linear_int8(in, linears[i], scales[i], bias_of(linears, i));
  };
  document_start = first_keys({B, T, H, past + T, D}, document_start, op);
  std::optional<Tensor> residual;  // x is not yet added to it
  const auto norm = [&](size_t i) {
    if (residual) {
      std::tie(x, *residual, std::ignore, std::ignore) = add_layer_norm_forward(x, *residual, norms[i], bias_of(norms, i), eps);
    } else {
      residual = x;
      x = std::get<0>(layer_norm_forward(x, norms[i], bias_of(norms, i), eps));
    }
  };

  for (size_t layer = 0; layer < layers; ++layer) {
    norm(2 * layer);
    const Tensor qkv = linear(x, 4 * layer);
    PYGPT_CHECK(qkv.size(2) == 3 * C, op, ": a block's first linear layer must have 3 C outputs");
    append(qkv, C, k_cache, layer, past);
    append(qkv, 2 * C, v_cache, layer, past);
    x = linear(causal_attention_of_cache(qkv, k_cache, v_cache, layer, past, document_start), 4 * layer + 1);
    norm(2 * layer + 1);
    x = linear(gelu_forward(linear(x, 4 * layer + 2)), 4 * layer + 3);
  }
  norm(2 * layers);
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pygpt, CPU, m) { m.impl("decode_blocks", TORCH_BOX(&decode_blocks)); }

}  // namespace pygpt
