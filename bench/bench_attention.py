"""causal_attention against F.scaled_dot_product_attention, on q, k, v that are views of one projection. GPT-2 124M."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, forward_backward

from pygpt import ops

SHAPES = {
    "B4 T1024 H12 D64": (4, 1024, 12, 64),
    "B1 T1024 H12 D64": (1, 1024, 12, 64),
    "B1 T4096 H12 D64": (1, 4096, 12, 64),
    "B12 T64 H4 D32": (12, 64, 4, 32),
}


@pytest.mark.parametrize("case", SHAPES)
def bench_causal_attention(benchmark, case, dtype, passes):
    B, T, H, D = SHAPES[case]
    torch.manual_seed(0)
    qkv, grad = torch.randn(B, T, 3 * H * D).to(dtype).requires_grad_(), torch.randn(B, T, H, D).to(dtype)

    def split():
        return qkv.view(B, T, 3, H, D).unbind(2)  # (B, T, H, D) each

    def ours():
        return ops.causal_attention(*split())

    def peer():
        q, k, v = (t.transpose(1, 2) for t in split())
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    flops = 2 * B * H * T * T * D  # two products of 2 T^2 D each, of which half is visible
    if passes == "forward+backward":
        ours, peer = (forward_backward(f, [qkv], [grad]) for f in (ours, peer))
        flops *= 3.5  # backward has five such products
    compare(
        benchmark,
        ours,
        peer,
        op="causal_attention",
        case=case,
        dtype=dtype,
        passes=passes,
        peer_name="F.scaled_dot_product_attention",
        work=flops,
        unit="GFLOP/s",
    )
