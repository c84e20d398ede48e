"""The operators. Each call checks its arguments and goes to the backend that `backends.choose` names."""

from pygpt.ops.adamw import adamw_
from pygpt.ops.attention import causal_attention, causal_attention_qkvpacked
from pygpt.ops.cross_entropy import linear_cross_entropy
from pygpt.ops.embedding import embedding, embedding_backward_
from pygpt.ops.gelu import gelu
from pygpt.ops.layer_norm import add_layer_norm, layer_norm
from pygpt.ops.linear import linear
from pygpt.ops.linear_int8 import linear_int8, quantize_int8

__all__ = [
    "adamw_",
    "add_layer_norm",
    "causal_attention",
    "causal_attention_qkvpacked",
    "embedding",
    "embedding_backward_",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "quantize_int8",
]
