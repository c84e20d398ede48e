"""A small training run in bfloat16 follows the one in float32; bench/precision.py is the longer one."""

from __future__ import annotations

import torch
from precision import losses, real_text

from pygpt import GPTConfig


def test_bfloat16_follows_float32():
    tokens = torch.tensor(list(real_text(200_000).encode())).clamp(max=127)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=128, block_size=64)
    exact, rounded = (losses(dtype, config, tokens, 8, 80, 1e-3) for dtype in (torch.float32, torch.bfloat16))
    assert exact[-10:].mean() < 0.65 * exact[0]  # it has learned something, so that there is something to follow
    away = rounded / exact - 1
    assert not torch.equal(exact, rounded)
    assert away.abs().max() < 0.01  # measured: 0.0007
    assert away.mean().abs() < 0.002
