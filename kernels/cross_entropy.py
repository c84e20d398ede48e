"""The rows of linear_cross_entropy in Triton: a chunk's logits become their losses and, in place, their gradients.

The kernel reads the logits twice, the second time from the cache. The products around it are the library's GEMM, and the
loop over chunks is pygpt/ops/cross_entropy.py. (Gradients in the forward pass and in place: Liger-Kernel, Hsu et al., 2024.)
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, up_to

# Vocabulary up to this -> warps, each thread of which has 16 bytes of a tile: GPT-2's rows are 7 tiles in bfloat16. Few rows
# at a time, so that the second pass finds them in the cache. tests/test_triton_compile.py walks the table.
# (AMD's warps are twice as wide, and blocks no larger.)
WARPS = ((256, 1), (1024, 4), (32768, 16), (math.inf, 16 if torch.version.hip else 32))
# What a thread of the widest blocks has at most: told so, the compiler spills none to make room for a second block.
REGISTERS = {32: {"maxnreg": 64}}


@triton.jit
def _add_to_sum(top, total, x, LANES: tl.constexpr):
    """The running maxima and sums of lanes, (LANES,), with as many more values for each: one exponential a value."""
    x = tl.reshape(x.to(tl.float32), (LANES, x.shape[0] // LANES))
    new_top = tl.maximum(top, tl.max(x, axis=1))
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - origin) + tl.sum(tl.exp(x - origin[:, None]), axis=1)


@triton.jit
def _gradient(x, counted, log_total, factor):
    return tl.where(counted, tl.exp(x.to(tl.float32) - log_total) * factor, 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["ignore_index"])
def _rows_kernel(
    logits_ptr, targets_ptr, loss_ptr, factor_ptr,
    V, stride, ignore_index,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i: loss[i] = logsumexp(logits[i]) - logits[i, target]; logits[i] := (softmax - one_hot(target)) * factor."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    columns = tl.arange(0, BLOCK)
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    whole = V // BLOCK * BLOCK  # what lies before has no mask: with one, the width of an access depends on V
    for start in range(0, whole, BLOCK):
        top, total = _add_to_sum(top, total, tl.load(logits_ptr + start + columns), LANES)
    rest = whole + columns
    if whole < V:
        x = tl.load(logits_ptr + rest, mask=rest < V, other=float("-inf"))
        top, total = _add_to_sum(top, total, x, LANES)
    peak = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - peak), axis=0)
    log_total = peak + tl.log(total)
    inside = counted & (target >= 0) & (target < V)
    # A target outside the vocabulary gives NaN: a kernel cannot raise, and NaN shows.
    at_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counted, log_total - at_target, 0.0))
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
        one_less = (tl.exp(at_target - log_total) - 1.0) * factor
        tl.debug_barrier()  # the logit of the target has been read by all before anyone overwrites it
        for start in range(0, whole, BLOCK):
            at = start + columns
            tl.store(logits_ptr + at, _gradient(tl.load(logits_ptr + at), counted, log_total, factor))
        if whole < V:
            x = tl.load(logits_ptr + rest, mask=rest < V, other=float("-inf"))
            tl.store(logits_ptr + rest, _gradient(x, counted, log_total, factor), mask=rest < V)
        tl.debug_barrier()  # all of the softmax is written: what is one less at the target comes after it
        tl.store(logits_ptr + target, one_less.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_rows_(
    logits: Tensor, targets: Tensor, ignore_index: int, grad_factor: Tensor | None = None
) -> Tensor:
    """Losses (rows,) float32 of logits (rows, V), of last stride 1, against targets (rows,) int64; 0 where ignored.

    With grad_factor, a float32 scalar, the logits are overwritten by d loss[i] / d logits[i] times it.
    """
    rows, V = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    warps = up_to(WARPS, V)
    if rows:
        _rows_kernel[(rows,)](
            logits, targets.contiguous(), losses, grad_factor, V, logits.stride(0), ignore_index,
            LANES=warps * 32, BLOCK=warps * 32 * 16 // logits.itemsize, num_warps=warps,
            **REGISTERS.get(warps, {}), **FUSED,
        )  # fmt: skip
    return losses
