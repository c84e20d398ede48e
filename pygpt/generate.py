"""Sampling from a GPT with a KV cache: each step computes one token, not the whole sequence again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pygpt.errors import InputError
from pygpt.nn import KVCache

if TYPE_CHECKING:
    from pygpt.model import GPT


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token id per row of logits (B, V) -> (B,) int64.

    temperature 0 takes the most likely token. top_k keeps the k most likely tokens; top_p the fewest whose probabilities
    sum to at least p (Holtzman et al., 2020). Both apply after the temperature, top_k first.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    p = logits.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p  # probability of all likelier tokens; the likeliest is always kept
        p = p.masked_fill(before >= top_p, 0.0)
    pick = torch.multinomial(p, 1, generator=generator)
    return order.gather(1, pick).squeeze(1)


@torch.no_grad()
def generate_tokens(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield up to max_new_tokens times the next token of each row of idx (B, T), as (B,) int64.

    A row that has produced `eos_id` goes on with it; generation ends when all rows have. With a `seed` the result depends
    on the arguments alone; without one torch's default generator is used. When the context fills block_size, the last
    half of it is encoded again and generation goes on from there. The model is in evaluation mode meanwhile.
    """
    _check(model, idx, max_new_tokens, temperature, top_k, top_p)
    generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        block_size = model.config.block_size
        weight = model.lm_head.weight
        cache = KVCache(model.config, idx.shape[0], weight.device, weight.dtype)
        context = step = idx
        done = torch.zeros(idx.shape[0], dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache.length + step.shape[1] > block_size:
                cache.length, step = 0, context[:, -max(1, block_size // 2) :]
            logits = model.lm_head(model.transformer(step, cache)[:, -1])  # (B, V)
            token = sample(logits, temperature, top_k, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(done, eos_id)
                done |= token == eos_id
            yield token
            if eos_id is not None and done.all():
                return
            step = token[:, None]
            context = torch.cat([context, step], dim=1)
    finally:
        model.train(was_training)


def _check(
    model: GPT, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise InputError(
            f"the prompt must be token ids (B, T) with T >= 1, got {tuple(idx.shape)}; start from end-of-text"
        )
    if idx.shape[1] > model.config.block_size:
        raise InputError(
            f"the prompt has {idx.shape[1]} tokens, more than the model's block_size ({model.config.block_size}); "
            f"keep its last {model.config.block_size} tokens or fewer"
        )
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must not be negative, got {max_new_tokens}")
    if temperature < 0:
        raise InputError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")
