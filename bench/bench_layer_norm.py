"""layer_norm against F.layer_norm, and add_layer_norm against an addition and F.layer_norm. GPT-2 124M and smaller."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, forward_backward

from pygpt import ops

SHAPES = {"4096x768": (4, 1024, 768), "1024x768": (1, 1024, 768), "768x128": (12, 64, 128), "1x768": (1, 1, 768)}


@pytest.mark.parametrize("case", SHAPES)
def bench_layer_norm(benchmark, case, dtype, passes):
    *_, C = shape = SHAPES[case]
    x, weight, bias, grad = _inputs(shape, dtype)

    def ours():
        return ops.layer_norm(x, weight, bias)

    def peer():
        return F.layer_norm(x, (C,), weight, bias)

    tensors = 2  # x, y
    if passes == "forward+backward":
        ours, peer = (forward_backward(f, [x, weight, bias], [grad]) for f in (ours, peer))
        tensors += 3  # grad, x, grad_x
    compare(
        benchmark,
        ours,
        peer,
        op="layer_norm",
        case=case,
        dtype=dtype,
        passes=passes,
        peer_name="F.layer_norm",
        work=tensors * x.numel() * dtype.itemsize,
        unit="GB/s",
    )


@pytest.mark.parametrize("case", SHAPES)
def bench_add_layer_norm(benchmark, case, dtype, passes):
    *_, C = shape = SHAPES[case]
    x, weight, bias, grad = _inputs(shape, dtype)
    residual = torch.randn(shape).to(dtype).requires_grad_()

    def ours():
        return ops.add_layer_norm(x, residual, weight, bias)

    def peer():
        total = x + residual
        return F.layer_norm(total, (C,), weight, bias), total

    tensors = 4  # x, residual, y, sum
    if passes == "forward+backward":
        ours, peer = (forward_backward(f, [x, residual, weight, bias], [grad, grad]) for f in (ours, peer))
        tensors += 4  # both gradients, sum, the gradient of x and of residual
    compare(
        benchmark,
        ours,
        peer,
        op="add_layer_norm",
        case=case,
        dtype=dtype,
        passes=passes,
        peer_name="x + r, F.layer_norm",
        work=tensors * x.numel() * dtype.itemsize,
        unit="GB/s",
    )


def _inputs(shape, dtype):
    torch.manual_seed(0)
    *_, C = shape
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(C).to(dtype) for _ in range(2))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), grad
