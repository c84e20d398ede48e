"""AdamW of GPT-2 124M's tensors, and a step with the gradients clipped to norm 1, against torch's fused AdamW in float32."""

from __future__ import annotations

import pytest
import torch
from harness import compare
from torch import nn

from pygpt import GPT, GPTConfig
from pygpt.optim import AdamW, clip_factor

SIZES = {"124M": GPTConfig.preset("gpt2"), "C128, 4 layers": GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=65)}
BYTES = {
    torch.float32: 28,
    torch.bfloat16: 28,
}  # a parameter: gradient, weights, averages read; weights, averages written


@pytest.mark.parametrize("clipped", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("case", SIZES)
def bench_adamw(benchmark, case, dtype, clipped):
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(SIZES[case]).parameters()]
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape).mul_(0.02).to(dtype).float()) for shape in shapes]
    mine = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in theirs]
    for p, r in zip(mine, theirs, strict=True):
        p.grad = torch.randn(p.shape).mul_(1e-3).to(dtype)
        r.grad = p.grad.float()
    optimizer = AdamW(mine, lr=1e-5)
    reference = torch.optim.AdamW(theirs, lr=1e-5, fused=True)

    def ours():
        optimizer.step(grad_factor=clip_factor(mine, 1.0)[1] if clipped else None)
        return mine[0].detach()

    def peer():
        if clipped:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        reference.step()
        return theirs[0].detach()

    numel = sum(p.numel() for p in mine)
    compare(
        benchmark,
        ours,
        peer,
        op="adamw",
        case=case,
        dtype=dtype,
        passes="clip+step" if clipped else "step",
        peer_name="torch fused, float32",
        work=numel * (BYTES[dtype] + (dtype.itemsize if clipped else 0)),
        unit="GB/s",
    )
