"""pygpt's ops inside somebody else's model: `pygpt.accelerate(model)`.

Swaps modules one by one, in place, by giving each a subclass of its own class: parameters, hooks, names and isinstance
checks stay as they were, and nothing outside the given model changes. What is recognised:

- `torch.nn.LayerNorm` over one dimension, and `torch.nn.Embedding` without max_norm, padding or sparse gradients;
- `torch.nn.Linear` (and `transformers`' Conv1D, which is one with its weight transposed);
- attention of `transformers` models, through its own interface for attention functions (causal, as many key heads as
  query heads; calls with a mask, e.g. for padded batches, go on to transformers' SDPA);
- nanoGPT's `CausalSelfAttention`, by its attributes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pygpt import ops
from pygpt.errors import InputError


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class _Embedding(nn.Embedding):
    def forward(self, idx: Tensor) -> Tensor:
        flat = idx.reshape(1, -1) if idx.dim() != 2 else idx
        return ops.embedding(flat, self.weight).reshape(*idx.shape, self.embedding_dim)


def _conv1d(self: Any, x: Tensor) -> Tensor:
    return ops.linear(x, self.weight.t(), self.bias)


def _nanogpt_attention(self: Any, x: Tensor) -> Tensor:
    dropout_p = self.dropout if self.training else 0.0
    y = ops.causal_attention_qkvpacked(self.c_attn(x), self.n_head, dropout_p=dropout_p)
    return self.resid_dropout(self.c_proj(y))


def _is_nanogpt_attention(module: nn.Module) -> bool:
    names = ("c_attn", "c_proj", "attn_dropout", "resid_dropout", "n_head", "n_embd", "dropout")
    return type(module).__name__ == "CausalSelfAttention" and all(hasattr(module, name) for name in names)


def accelerate(model: nn.Module) -> nn.Module:
    """Swap pygpt's ops into `model`, in place, and return it. Raises InputError if there is nothing in it to swap."""
    swapped = 0
    for module in model.modules():
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.elementwise_affine:
            module.__class__ = _LayerNorm
        elif type(module) is nn.Linear:
            module.__class__ = _Linear
        elif (
            type(module) is nn.Embedding
            and module.max_norm is None
            and module.padding_idx is None
            and not module.sparse
        ):
            module.__class__ = _Embedding
        elif _is_nanogpt_attention(module):
            module.__class__ = type("CausalSelfAttention", (type(module),), {"forward": _nanogpt_attention})
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            module.__class__ = type("Conv1D", (type(module),), {"forward": _conv1d})
        else:
            continue
        swapped += 1
    set_attention = getattr(model, "set_attn_implementation", None)
    if callable(set_attention):  # a transformers model
        _register_with_transformers()
        set_attention("pygpt")
        swapped += 1
    if not swapped:
        raise InputError(
            f"found nothing in {type(model).__name__} that pygpt can speed up (Linear, LayerNorm, Embedding, attention of "
            f"transformers or nanoGPT); call pygpt.ops from its code instead"
        )
    return model


def _register_with_transformers() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query, key, value: (B, H, T, D), as transformers has them -> (B, T, H, D)."""
        causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
        if attention_mask is not None or not causal or query.shape[1] != key.shape[1]:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return ops.causal_attention(q, k, v, scale=scaling, dropout_p=dropout), None

    AttentionInterface.register("pygpt", attention)
    AttentionMaskInterface.register("pygpt", sdpa_mask)
