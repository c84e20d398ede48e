"""layer_norm and add_layer_norm in Triton: schemas and semantics are those of csrc/schema.cpp.

Forward holds a row in registers: one read, one write. Backward holds one too, and keeps each program's share of the
weight gradients in float32 registers over all of its rows, so that they cost no second pass over x; a small kernel
then adds the programs' shares in a fixed order (the scheme of Apex and llm.c). Rows too wide for that go by column
blocks, a few rows at a time, so that the second look at them comes from the cache. The number of programs depends on
the shape and the device alone: same inputs, same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, cdiv, multiprocessors, up_to


class Config(NamedTuple):
    rows: int  # rows of a tile
    block: int  # columns of a tile
    warps: int


# Columns up to this -> tile; tests/test_triton_compile.py walks these tables. A tile holds whole rows, and in the last
# line of each table, where they do not fit in registers, a block of columns (the kernels named "wide").
FORWARD = (  # up to 1,024 columns a single warp has the row and reduces without shared memory; 32 values a thread
    (64, Config(16, 64, 1)),
    (128, Config(8, 128, 1)),
    (256, Config(4, 256, 1)),
    (512, Config(2, 512, 1)),
    (1024, Config(1, 1024, 1)),
    (2048, Config(1, 2048, 2)),
    (4096, Config(1, 4096, 4)),
    (8192, Config(1, 8192, 8)),
    (16384, Config(1, 16384, 16)),
    (math.inf, Config(1, 4096, 8)),
)
BACKWARD = (  # 16 values a thread of each of x, grad, weight and the two accumulators
    (64, Config(32, 64, 4)),
    (128, Config(16, 128, 4)),
    (256, Config(8, 256, 4)),
    (512, Config(4, 512, 4)),
    (1024, Config(2, 1024, 4)),
    (2048, Config(1, 2048, 4)),
    (4096, Config(1, 4096, 8)),
    (8192, Config(1, 8192, 16)),
    (math.inf, Config(4, 1024, 8)),
)
SUM_PARTIALS = Config(64, 32, 4)


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, C, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (col < C)
    at = row.to(tl.int64)[:, None] * C + col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask=inside)
        x = total.to(tl.float32)  # statistics are those of the rounded sum, which is all that backward sees
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = centred * rstd[:, None] * tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_wide_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, C, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row by blocks of columns, three times over: the second and third look come from the cache."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    x_ptr += row * C
    if residual_ptr is not None:
        residual_ptr += row * C
        sum_ptr += row * C
    mean = tl.zeros([BLOCK], tl.float32)
    for left in range(0, C, BLOCK):
        col = left + lane
        x = tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + col, mask=col < C, other=0.0).to(tl.float32)
            total = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + col, total, mask=col < C)  # read again below, after the barrier of the sum
            x = total.to(tl.float32)
        mean += x
    mean = tl.sum(mean, axis=0) / C
    if residual_ptr is not None:
        x_ptr = sum_ptr
    square = tl.zeros([BLOCK], tl.float32)
    for left in range(0, C, BLOCK):
        col = left + lane
        x = tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        centred = tl.where(col < C, x - mean, 0.0)
        square += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(square, axis=0) / C + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for left in range(0, C, BLOCK):
        col = left + lane
        x = tl.load(x_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask=col < C, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * C + col, y.to(y_ptr.dtype.element_ty), mask=col < C)


@triton.jit
def _backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, C,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    col = columns[None, :]
    weight = tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < C)
        at = row.to(tl.int64)[:, None] * C + col
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        grad_weight += grad * x_hat
        if HAS_BIAS:
            grad_bias += grad
        scaled = grad * weight
        mean_scaled = tl.sum(scaled, axis=1)[:, None] / C
        mean_scaled_x = tl.sum(scaled * x_hat, axis=1)[:, None] / C
        grad_x = rstd * (scaled - mean_scaled - x_hat * mean_scaled_x)
        if grad_sum_ptr is not None:
            grad_x += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    at = program.to(tl.int64) * C + columns
    tl.store(partial_ptr + at, tl.sum(grad_weight, axis=0), mask=columns < C)
    if HAS_BIAS:
        at += tl.num_programs(0).to(tl.int64) * C
        tl.store(partial_ptr + at, tl.sum(grad_bias, axis=0), mask=columns < C)


@triton.jit
def _backward_wide_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, C,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    start = program * ROWS
    for first in range(start, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        valid = row < rows
        at_row = row.to(tl.int64)[:, None] * C
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
        mean_scaled = tl.zeros([ROWS], tl.float32)
        mean_scaled_x = tl.zeros([ROWS], tl.float32)
        for left in range(0, C, BLOCK):
            columns = left + tl.arange(0, BLOCK)
            col = columns[None, :]
            inside = valid[:, None] & (col < C)
            grad = tl.load(grad_ptr + at_row + col, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at_row + col, mask=inside, other=0.0).to(tl.float32)
            scaled = grad * tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
            mean_scaled += tl.sum(scaled, axis=1) / C
            mean_scaled_x += tl.sum(scaled * (x - mean) * rstd, axis=1) / C
        for left in range(0, C, BLOCK):
            columns = left + tl.arange(0, BLOCK)
            col = columns[None, :]
            inside = valid[:, None] & (col < C)
            grad = tl.load(grad_ptr + at_row + col, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + at_row + col, mask=inside, other=0.0).to(tl.float32)
            x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
            scaled = grad * tl.load(weight_ptr + col, mask=col < C, other=0.0).to(tl.float32)
            grad_x = rstd * (scaled - mean_scaled[:, None] - x_hat * mean_scaled_x[:, None])
            if grad_sum_ptr is not None:
                grad_x += tl.load(grad_sum_ptr + at_row + col, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + at_row + col, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
            # This program's share so far is in the cache: it alone reads and writes it, from its second rows on.
            at = program.to(tl.int64) * C + columns
            again = tl.where(first > start, columns, C) < C
            share = tl.load(partial_ptr + at, mask=again, other=0.0) + tl.sum(grad * x_hat, axis=0)
            tl.store(partial_ptr + at, share, mask=columns < C)
            if HAS_BIAS:
                at += tl.num_programs(0).to(tl.int64) * C
                share = tl.load(partial_ptr + at, mask=again, other=0.0) + tl.sum(grad, axis=0)
                tl.store(partial_ptr + at, share, mask=columns < C)


@triton.jit
def sum_partials_kernel(partial_ptr, first_ptr, second_ptr, programs, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.program_id(1).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for top in range(0, programs, ROWS):
        row = top + tl.arange(0, ROWS)
        at = (share * programs + row)[:, None] * C + columns[None, :]
        total += tl.load(partial_ptr + at, mask=(row < programs)[:, None] & (columns < C)[None, :], other=0.0)
    out_ptr = first_ptr
    if second_ptr is not None:
        out_ptr = tl.where(share == 0, first_ptr, second_ptr)
    tl.store(out_ptr + columns, tl.sum(total, axis=0).to(first_ptr.dtype.element_ty), mask=columns < C)


def sum_partials(partial: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(1 or 2, programs, C) float32 -> that many (C,) in `dtype`: the sums over programs, in a fixed order."""
    shares, programs, C = partial.shape
    out = [partial.new_empty(C, dtype=dtype) for _ in range(shares)]
    second = out[1] if shares == 2 else None
    tile = SUM_PARTIALS
    sum_partials_kernel[(cdiv(C, tile.block), shares)](
        partial, out[0], second, programs, C, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED
    )
    return out


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    C = weight.shape[0]
    rows = x.numel() // C
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    mean = x.new_empty(rows, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if rows:
        tile = up_to(FORWARD, C)
        kernel = _forward_wide_kernel if tile.block < C else _forward_kernel
        kernel[(cdiv(rows, tile.rows),)](
            x, residual, weight, bias, total, y, mean, rstd, rows, C, eps,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    return y, total, mean, rstd


def _backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    C = weight.shape[0]
    rows = x.numel() // C
    grad_x = torch.empty_like(x)
    if rows == 0:
        return grad_x, torch.zeros_like(weight), weight.new_zeros(C if has_bias else 0)
    tile = up_to(BACKWARD, C)
    if C % 16:  # rows that are not aligned take more registers
        tile = BACKWARD[-1][1] if C > 4096 else tile._replace(warps=2 * tile.warps)
    # A program's share of the weight gradients takes 8 C bytes: with few tiles each, they would outweigh the rows.
    programs = min(multiprocessors(x) * max(1, 16 // tile.warps), cdiv(rows, tile.rows * 4))
    partial = x.new_empty(1 + has_bias, programs, C, dtype=torch.float32)
    kernel = _backward_wide_kernel if tile.block < C else _backward_kernel
    kernel[(programs,)](
        grad, grad_sum, x, weight, mean, rstd, grad_x, partial, rows, C,
        HAS_BIAS=has_bias, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    shares = sum_partials(partial, weight.dtype)
    return grad_x, shares[0], shares[1] if has_bias else weight.new_empty(0)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., C) -> y (..., C), mean (rows,), rstd (rows,)."""
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad_x (..., C), grad_weight (C,), grad_bias (C,) or of size 0."""
    return _backward(grad, None, x, weight, mean, rstd, has_bias)


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> layer_norm(x + residual), x + residual, mean, rstd."""
    y, total, mean, rstd = _forward(x, residual, weight, bias, eps)
    assert total is not None
    return y, total, mean, rstd


def add_layer_norm_backward(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradient of x and of residual alike, grad_weight, grad_bias."""
    return _backward(grad, grad_sum, total, weight, mean, rstd, has_bias)
