"""linear_cross_entropy against F.linear + F.cross_entropy on whole logits. GPT-2's vocabulary and a character model's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, forward_backward

from pygpt import ops

SHAPES = {"N1024 V50257 C768": (1024, 50257, 768), "N768 V65 C128": (768, 65, 128)}


@pytest.mark.parametrize("case", SHAPES)
def bench_linear_cross_entropy(benchmark, case, dtype, passes):
    N, V, C = SHAPES[case]
    torch.manual_seed(0)
    hidden = torch.randn(N, C).to(dtype).requires_grad_()
    weight = torch.randn(V, C).mul_(0.02).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,))

    def ours():
        return ops.linear_cross_entropy(hidden, weight, targets)

    def peer():
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    work = 2 * N * V * C
    if passes == "forward+backward":
        ours, peer = (forward_backward(f, [hidden, weight], [torch.ones(())]) for f in (ours, peer))
        work *= 3
    compare(
        benchmark,
        ours,
        peer,
        op="cross_entropy",
        case=case,
        dtype=dtype,
        passes=passes,
        peer_name="F.linear + F.cross_entropy",
        work=work,
        unit="GFLOP/s",
    )
