"""embedding against F.embedding, with and without the position table. GPT-2 124M and nanoGPT's character model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, forward_backward

from pygpt import ops

SHAPES = {"B4 T1024 V50257 C768": (4, 1024, 50257, 768), "B12 T64 V65 C128": (12, 64, 65, 128)}


@pytest.mark.parametrize("positions", [False, True], ids=["token", "token+position"])
@pytest.mark.parametrize("case", SHAPES)
def bench_embedding(benchmark, case, dtype, passes, positions):
    B, T, V, C = SHAPES[case]
    torch.manual_seed(0)
    idx = torch.randint(0, V, (B, T))
    token, grad = torch.randn(V, C).to(dtype), torch.randn(B, T, C).to(dtype)
    tables = (
        [token.requires_grad_(), torch.randn(T, C).to(dtype).requires_grad_()]
        if positions
        else [token.requires_grad_()]
    )

    def ours():
        return ops.embedding(idx, *tables)

    def peer():
        out = F.embedding(idx, token)
        return out + F.embedding(torch.arange(T), tables[1]) if positions else out

    rows = B * T
    elements = 2 * rows * C + (T * C if positions else 0)  # rows gathered, result, positions
    if passes == "forward+backward":
        ours, peer = (forward_backward(f, tables, [grad]) for f in (ours, peer))
        elements += rows * C + V * C + (T * C if positions else 0)  # grad; the tables' gradients
    compare(
        benchmark,
        ours,
        peer,
        op="embedding",
        case=case,
        dtype=dtype,
        passes=passes,
        peer_name="F.embedding" + (" + F.embedding" if positions else ""),
        work=elements * dtype.itemsize + 8 * rows,
        unit="GB/s",
    )
