"""bias + GELU (tanh form, as GPT-2 has it) in Triton: y = gelu(x + bias), one read and one write.

Backward computes the derivative again from x, and on the way keeps each program's share of the bias gradient in float32
registers, as layer_norm does with its weight gradients: deterministic, and no second pass over the gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, cdiv, multiprocessors, up_to
from pygpt.kernels.layer_norm import sum_partials

SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
FAR = tl.constexpr(16.0)  # there tanh is -1 or 1 in float32


class Config(NamedTuple):
    rows: int  # rows of a tile
    block: int  # columns of a tile
    warps: int


# Columns up to this -> tile of 2,048 values, 16 a thread; tests/test_triton_compile.py walks the table.
TILES = ((64, Config(32, 64, 4)), (256, Config(8, 256, 4)), (math.inf, Config(4, 512, 4)))


@triton.jit
def _tanh_of_inner(x):
    # tanh(u) = 1 - 2 / (exp(2 u) + 1): right at both ends, where exp overflows to infinity or vanishes
    return 1.0 - 2.0 / (tl.exp((x + x * x * x * CUBIC) * SQRT_2_OVER_PI * 2.0) + 1.0)


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr,
    rows, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (col < C)
    at = row[:, None] * C + col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (0.5 * x * (1.0 + _tanh_of_inner(x))).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_x_ptr, partial_ptr,
    rows, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col = columns[None, :]
    bias = tl.zeros([1, BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < C)
        at = row.to(tl.int64)[:, None] * C + col
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        t = _tanh_of_inner(x)
        near = tl.minimum(tl.maximum(x, -FAR), FAR)  # t makes the product 0 beyond, where the square may overflow
        slope = 0.5 * (1.0 + t) + 0.5 * near * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + near * near * CUBIC * 3.0)
        grad_x = grad * slope
        grad_bias += grad_x
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if bias_ptr is not None:
        tl.store(partial_ptr + program.to(tl.int64) * C + columns, tl.sum(grad_bias, axis=0), mask=columns < C)


def _columns(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else 1


def bias_gelu_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., C), bias (C,) or None -> gelu(x + bias), in x's dtype."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        C = _columns(x)
        rows, tile = x.numel() // C, up_to(TILES, C)
        _forward_kernel[(cdiv(rows, tile.rows), cdiv(C, tile.block))](
            x, bias, y, rows, C, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED
        )
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> grad_x (..., C), grad_bias (C,), of size 0 without bias."""
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, x.new_zeros(0) if bias is None else torch.zeros_like(bias)
    C = _columns(x)
    rows, tile = x.numel() // C, up_to(TILES, C)
    columns = cdiv(C, tile.block)
    programs = min(cdiv(multiprocessors(x) * 8, columns), cdiv(rows, tile.rows))
    partial = x.new_empty(1, programs, 0 if bias is None else C, dtype=torch.float32)
    _backward_kernel[(programs, columns)](
        grad, x, bias, grad_x, partial, rows, C, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED
    )
    return grad_x, x.new_empty(0) if bias is None else sum_partials(partial, bias.dtype)[0]


def gelu_forward(x: Tensor) -> Tensor:
    """x (..., C) -> gelu(x)."""
    return bias_gelu_forward(x, None)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """-> the gradient of x."""
    return bias_gelu_backward(grad, x, None)[0]
