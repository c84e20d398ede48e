"""pygpt's ops inside somebody else's model: `pygpt.accelerate(model)`.

Swaps modules one by one, in place, by giving each a subclass of its own class: parameters, hooks, names and isinstance
checks stay as they were, and nothing outside the given model changes. What is recognised:

- `torch.nn.LayerNorm` over one dimension, and `torch.nn.Embedding` without max_norm, padding or sparse gradients;
- `torch.nn.Linear` (and `transformers`' Conv1D, which is one with its weight transposed);
- attention of `transformers` models, through its own interface for attention functions (causal, as many key heads as
  query heads; calls with a mask, e.g. for padded batches, or with a term such as T5's position bias go on to transformers'
  SDPA). Models that say they do not support SDPA keep their attention;
- nanoGPT's `CausalSelfAttention`, by its attributes and by what it computes: a fork's, with rotary positions say, is kept.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pygpt import ops
from pygpt.errors import InputError


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(1, -1) if input.dim() != 2 else input
        return ops.embedding(flat, self.weight).reshape(*input.shape, self.embedding_dim)


def _conv1d(self: Any, x: Tensor) -> Tensor:
    return ops.linear(x, self.weight.t(), self.bias)


def _nanogpt_attention(self: Any, x: Tensor) -> Tensor:
    dropout_p = self.dropout if self.training else 0.0
    y = ops.causal_attention_qkvpacked(self.c_attn(x), self.n_head, dropout_p=dropout_p)
    return self.resid_dropout(self.c_proj(y))


def _is_nanogpt_attention(module: nn.Module, length: int) -> bool:
    names = ("c_attn", "c_proj", "attn_dropout", "resid_dropout", "n_head", "n_embd", "dropout")
    return (
        type(module).__name__ == "CausalSelfAttention"
        and all(hasattr(module, name) for name in names)
        and isinstance(module.dropout, (int, float))
        and list(inspect.signature(module.forward).parameters) == ["x"]
        and _computes_nanogpt_attention(module, length)
    )


@torch.no_grad()
def _computes_nanogpt_attention(module: Any, length: int) -> bool:
    """Whether a forward pass over `length` tokens gives what `_nanogpt_attention` gives.

    Seen on a copy with random parameters: those of a fresh module, small or zero, would hide what a fork has added.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    try:
        weight = module.c_attn.weight
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            probe = copy.deepcopy(module).eval()
            for parameter in probe.parameters():
                parameter.copy_(random(*parameter.shape) / math.sqrt(parameter.shape[-1] if parameter.dim() else 1))
            x = random(1, length, module.n_embd)
            theirs, ours = probe.forward(x).float(), _nanogpt_attention(probe, x).float()
        tolerance = 5e-3 if weight.dtype in (torch.float32, torch.float64) else 3e-2  # the former also with TF32
        return bool(((theirs - ours).norm(dim=-1) <= tolerance * theirs.norm(dim=-1)).all())
    except Exception:  # somebody else's code: whatever it raises, it is not nanoGPT's
        return False


@functools.cache
def _subclass(base: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """A subclass of `base` with another forward, whose instances can be pickled though no module holds the class."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _restore, (base, forward), *base.__reduce_ex__(self, protocol)[2:]

    return type(base.__name__, (base,), {"forward": forward, "__reduce_ex__": reduce})


def _swap(module: Any, forward: Callable[..., Tensor]) -> None:
    base: Any = type(module)
    module.__class__ = _subclass(base, forward)


def _restore(base: Any, forward: Callable[..., Tensor]) -> nn.Module:
    cls = _subclass(base, forward)
    return cls.__new__(cls)


def accelerate(model: nn.Module) -> nn.Module:
    """Swap pygpt's ops into `model`, in place, and return it. What has them already, such as a pygpt.GPT, stays as it is.

    Raises InputError if there is nothing in it that pygpt can speed up.
    """
    length = getattr(getattr(model, "config", None), "block_size", 64)
    found = 0
    for module in model.modules():
        if type(module).__module__.startswith("pygpt."):
            pass  # fast already
        elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.elementwise_affine:
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
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            _swap(module, _conv1d)
        elif _is_nanogpt_attention(module, length):
            _swap(module, _nanogpt_attention)
        else:
            continue
        found += 1
    if "transformers.modeling_utils" in sys.modules:  # else none of its models can be in there
        found += _swap_attention_of_transformers(model)
    if not found:
        raise InputError(
            f"found nothing in {type(model).__name__} that pygpt can speed up (Linear, LayerNorm, Embedding, attention of "
            f"transformers or nanoGPT); call pygpt.ops from its code instead"
        )
    return model


# What transformers' models hand to every attention function and its SDPA does not read either (without a mask).
_WITHOUT_EFFECT = {
    "cache_position",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


def _attention_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value: (B, H, T, D), as transformers has them -> (B, T, H, D)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    B, H, T, D = query.shape
    if (
        attention_mask is not None
        or not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        or T not in (1, key.shape[2])  # SDPA lets the first query see the first key only, pygpt the last one all keys
        or not key.shape == value.shape == (B, H, key.shape[2], D)
        or any(v is not None and v is not False for name, v in kwargs.items() if name not in _WITHOUT_EFFECT)
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return ops.causal_attention(q, k, v, scale=scaling, dropout_p=dropout), None


def _swap_attention_of_transformers(model: nn.Module) -> int:
    """In all its models in `model`, but for those whose class does not support SDPA. Returns in how many."""
    from transformers.modeling_utils import PreTrainedModel

    def inside(module: nn.Module) -> list[Any]:
        return [m for m in module.modules() if isinstance(m, PreTrainedModel)]

    if not inside(model):
        return 0
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("pygpt", _attention_for_transformers)
    AttentionMaskInterface.register("pygpt", sdpa_mask)
    # By config, since that is where the choice is kept, and models of different classes may share one.
    unsupported = {id(m.config) for m in inside(model) if not m._supports_sdpa}
    done: set[nn.Module] = set()
    for outer in inside(model):
        if outer not in done and unsupported.isdisjoint(id(m.config) for m in inside(outer)):
            outer.set_attn_implementation("pygpt")
            done.update(inside(outer))
    return len(done)
