// CPU operators that other operators are made of. Shapes and dtypes: schema.cpp.
#pragma once

#include "cpu/attention.h"
#include "cpu/tensor.h"

namespace pygpt {

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight,
                                                                  std::optional<Tensor> bias, double eps);
std::tuple<Tensor, Tensor> causal_attention_forward(Tensor q, Tensor k, Tensor v, double scale, double dropout_p,
                                                    std::optional<Tensor> seed, std::optional<Tensor> document_start);
// Each query's first key, int32 (B, T), clamped to those it may see; absent where there are no documents.
std::optional<Tensor> first_keys(const AttentionShape& sizes, const std::optional<Tensor>& document_start, const char* op);
// Of the queries in qkv (B, T, 3C), contiguous, against the `past` tokens and the T new ones that a layer of the caches
// (layers, rows, columns, H, D) holds, a token's heads being neighbours -> (B, T, C).
Tensor causal_attention_of_cache(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, int64_t layer,
                                 int64_t past, const std::optional<Tensor>& first_keys);
Tensor gelu_forward(Tensor x);
Tensor linear_few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias);
Tensor linear_int8(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias);

}  // namespace pygpt
