"""Low-rank adapters (LoRA: Hu et al., 2021) on a model's linear layers, through Hugging Face's `peft`.

    add_lora(model, rank=8, alpha=16.0)      # everything is frozen but the adapters
    ... train ...
    merge_lora(model)                        # plain layers again, the adapters' updates added to their weights

A frozen weight W (N, K) gets a trained update alpha / rank * B A, B (N, rank) and A (rank, K). B starts at zero, so that
training starts from the model as it was. What is saved is always the merged model: `peft` is needed only for training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pygpt.errors import InputError

TARGETS = ["c_attn", "c_proj", "c_fc"]


def add_lora(model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
    """Put adapters on the linear layers of all blocks, in place, and freeze every other parameter.

    Their initial values are drawn from torch's default generator. dropout: probability of dropping an adapter's input
    while training. Raises InputError for settings out of range, for a model that has adapters already or has no block,
    and where `peft` is missing.
    """
    if rank < 1 or not alpha > 0 or not 0 <= dropout < 1:
        raise InputError(
            f"LoRA needs a rank of at least 1, an alpha above 0 and a dropout in [0, 1), got {rank}, {alpha}, {dropout}"
        )
    if has_lora(model):
        raise InputError("the model has LoRA adapters already: merge_lora(model) first")
    if not any(name.endswith(tuple(TARGETS)) for name, _ in model.named_modules()):
        raise InputError(f"LoRA goes onto layers named {', '.join(TARGETS)}, and the model has none")
    peft = _peft()
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, bias="none")
    peft.inject_adapter_in_model(settings, model)


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters that are not merged."""
    return any(".lora_" in name for name, _ in model.named_parameters())


def merge_lora(model: nn.Module) -> None:
    """Replace each layer with an adapter by a plain one with the same output, in place. Parameters stay frozen as they
    are; a model without adapters is left as it is."""
    for parent, name, _, plain in _merged_layers(model):
        setattr(parent, name, plain)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within it, `model` is merged, to be saved; afterwards its adapters are back, bit for bit."""
    layers = _merged_layers(model)
    for parent, name, _, plain in layers:
        setattr(parent, name, plain)
    try:
        yield
    finally:
        for parent, name, adapted, _ in layers:
            setattr(parent, name, adapted)


def _merged_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """Parent, name, the layer with its adapter, and a plain layer of the same output; for each layer with an adapter."""
    if not has_lora(model):
        return []
    _peft()
    from peft.tuners.lora import LoraLayer

    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, LoraLayer)
    ]
    layers: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
    for parent, name, layer in found:
        twin: Any = copy.deepcopy(layer)
        twin.merge()
        layers.append((parent, name, layer, twin.get_base_layer()))
    return layers


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("LoRA needs the library peft: pip install 'pygpt-kernels[lora]'") from None
    return peft
