"""AdamW in Triton: every tensor of a parameter group in one launch, one pass over the memory.

A bfloat16 weight has a float32 master, kept as the weight and a residual of 16 bits (see pygpt/ops/adamw.py); a pass reads
gradient, weight, residual and both averages and writes the last four: 26 bytes a parameter, where converting gradients and
weights around torch's fused kernel moves 40. A table on the device holds the tensors' addresses, and another says which
tensor a block belongs to, so that the number of tensors costs nothing (multi-tensor apply is Apex's idea). The gradients may
be multiplied by a factor on the way, which clips them without another pass and without the host knowing their norm.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, cdiv

BLOCK = 2048  # elements a program updates: 16 a thread
WARPS = 4
# Rows of the table; a column is a tensor.
STEP, WEIGHT, GRAD, RESIDUAL, MEAN, SQUARE, NUMEL, FIRST_BLOCK = (tl.constexpr(row) for row in range(8))

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["tensors"])
def _begin_kernel(table_ptr, correction_ptr, tensors, log_beta1, log_beta2):
    """Program i counts tensor i's step and leaves 1 / (1 - beta1^step) and 1 / sqrt(1 - beta2^step)."""
    i = tl.program_id(0)
    step_ptr = tl.load(table_ptr + STEP * tensors + i).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + 1.0
    tl.store(step_ptr, step)
    # In float64: beta2^step is so near 1 at first that a float32 difference would have 4 digits.
    first = 1.0 - tl.exp((step * log_beta1).to(tl.float64))
    second = 1.0 - tl.exp((step * log_beta2).to(tl.float64))
    tl.store(correction_ptr + i, (1.0 / first).to(tl.float32))
    tl.store(correction_ptr + tensors + i, (1.0 / tl.sqrt(second)).to(tl.float32))


@triton.jit
def _pointer(table_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _join(weight, residual):
    upper = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    bits = upper + residual.to(tl.int32)
    # Only a zero that somebody wrote over a weight can change its sign here: it stays zero.
    return tl.where((upper ^ bits) < 0, upper, bits).to(tl.float32, bitcast=True)


@triton.jit
def _split(master):
    """The nearest bfloat16, ties away from zero, and what the bits are beyond it."""
    bits = tl.where(master != master, 0x7FC00000, master.to(tl.int32, bitcast=True))
    return ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), bits.to(tl.int16)  # its lower half


@triton.jit
def _update(
    weight_ptr, grad_ptr, residual_ptr, mean_ptr, square_ptr, at, numel, factor, correction1, correction2,
    lr, decay, beta1, rest1, beta2, rest2, eps,
    MASKED: tl.constexpr,
):  # fmt: skip
    mask = None
    if MASKED:
        mask = at < numel
    grad = tl.load(grad_ptr + at, mask=mask).to(tl.float32) * factor
    mean = tl.load(mean_ptr + at, mask=mask) * beta1 + grad * rest1
    square = tl.load(square_ptr + at, mask=mask) * beta2 + grad * grad * rest2
    weight = tl.load(weight_ptr + at, mask=mask)
    if weight.dtype == tl.bfloat16:
        weight = _join(weight, tl.load(residual_ptr + at, mask=mask))
    weight = weight * decay - lr * correction1 * mean / (tl.sqrt(square) * correction2 + eps)
    tl.store(mean_ptr + at, mean, mask=mask)
    tl.store(square_ptr + at, square, mask=mask)
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        weight, residual = _split(weight)
        tl.store(residual_ptr + at, residual, mask=mask)
    tl.store(weight_ptr + at, weight, mask=mask)


@triton.jit(do_not_specialize=["tensors"])
def _update_kernel(
    table_ptr, owner_ptr, correction_ptr, factor_ptr, tensors,
    lr, decay, beta1, rest1, beta2, rest2, eps,
    WEIGHT_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    i = tl.load(owner_ptr + block)
    table_ptr += i
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
    correction1 = tl.load(correction_ptr + i)
    correction2 = tl.load(correction_ptr + tensors + i)
    numel = tl.load(table_ptr + NUMEL * tensors)
    start = (block - tl.load(table_ptr + FIRST_BLOCK * tensors)) * BLOCK
    at = start + tl.arange(0, BLOCK)
    weight_ptr = _pointer(table_ptr + WEIGHT * tensors, WEIGHT_TYPE, ALIGNED)
    grad_ptr = _pointer(table_ptr + GRAD * tensors, GRAD_TYPE, ALIGNED)
    residual_ptr = _pointer(table_ptr + RESIDUAL * tensors, tl.int16, ALIGNED)
    mean_ptr = _pointer(table_ptr + MEAN * tensors, tl.float32, ALIGNED)
    square_ptr = _pointer(table_ptr + SQUARE * tensors, tl.float32, ALIGNED)
    if start + BLOCK <= numel:  # without masks, whose ends are nowhere known to be even, accesses are 16 bytes wide
        _update(
            weight_ptr, grad_ptr, residual_ptr, mean_ptr, square_ptr, at, numel, factor, correction1, correction2,
            lr, decay, beta1, rest1, beta2, rest2, eps, False,
        )  # fmt: skip
    else:
        _update(
            weight_ptr, grad_ptr, residual_ptr, mean_ptr, square_ptr, at, numel, factor, correction1, correction2,
            lr, decay, beta1, rest1, beta2, rest2, eps, True,
        )  # fmt: skip


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@functools.lru_cache(maxsize=16)
def _table(pointers: tuple[int, ...], numels: tuple[int, ...], device: torch.device) -> Tensor:
    blocks = [cdiv(n, BLOCK) for n in numels]
    firsts = itertools.accumulate(blocks[:-1], initial=0)
    return _to_device(torch.tensor([*pointers, *numels, *firsts]).view(8, len(numels)), device)


@functools.lru_cache(maxsize=16)
def _owners(numels: tuple[int, ...], device: torch.device) -> Tensor:
    blocks = torch.tensor([cdiv(n, BLOCK) for n in numels])
    return _to_device(torch.arange(len(numels), dtype=torch.int32).repeat_interleave(blocks), device)


def adamw_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], residuals: Sequence[Tensor], means: Sequence[Tensor],
    squares: Sequence[Tensor], steps: Sequence[Tensor],
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, grad_factor: Tensor | None = None,
) -> None:  # fmt: skip
    """One step for contiguous tensors of one device, weights of one dtype and gradients of one dtype.

    residuals: int16 for bfloat16 weights, empty for float32 ones. means, squares: float32; steps: float32 scalars, counted
    up; grad_factor: float32 scalar by which gradients are multiplied.
    """
    device, tensors = weights[0].device, len(weights)
    rows = (steps, weights, grads, residuals or weights, means, squares)
    pointers = tuple(x.data_ptr() for row in rows for x in row)
    numels = tuple(x.numel() for x in weights)
    table, owners = _table(pointers, numels, device), _owners(numels, device)
    corrections = torch.empty(2, tensors, dtype=torch.float32, device=device)
    log_betas = [math.log(beta) if beta else -math.inf for beta in betas]
    with torch.cuda.device_of(weights[0]):
        _begin_kernel[(tensors,)](table, corrections, tensors, *log_betas, num_warps=1, **FUSED)
        if owners.numel():
            _update_kernel[(owners.numel(),)](
                table, owners, corrections, grad_factor, tensors,
                lr, 1 - lr * weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps,
                WEIGHT_TYPE=TYPES[weights[0].dtype], GRAD_TYPE=TYPES[grads[0].dtype],
                ALIGNED=all(p % 16 == 0 for p in pointers[tensors:]), BLOCK=BLOCK, num_warps=WARPS, **FUSED,
            )  # fmt: skip
