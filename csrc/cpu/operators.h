// CPU operators that other operators are made of. Shapes and dtypes: schema.cpp.
#pragma once

#include "cpu/tensor.h"

namespace pygpt {

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, Tensor weight, std::optional<Tensor> bias, double eps);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight,
                                                                  std::optional<Tensor> bias, double eps);
std::tuple<Tensor, Tensor> causal_attention_forward(Tensor q, Tensor k, Tensor v, double scale, double dropout_p,
                                                    std::optional<Tensor> seed, std::optional<Tensor> document_start);
Tensor gelu_forward(Tensor x);
Tensor linear_few_rows(Tensor x, Tensor weight, std::optional<Tensor> bias);
Tensor linear_int8(Tensor x, Tensor weight, Tensor scale, std::optional<Tensor> bias);

}  // namespace pygpt
