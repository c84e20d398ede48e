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

# Vocabulary up to this -> warps, each thread of which has 16 bytes of a tile: GPT-2's rows are 13 tiles in bfloat16. Few rows
# at a time, so that the second pass finds them in the cache. tests/test_triton_compile.py walks the table.
WARPS = ((256, 1), (1024, 4), (math.inf, 16))


@triton.jit
def _add_to_sum(top, total, x):
    new_top = tl.maximum(top, x)
    origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - origin) + tl.exp(x - origin)


@triton.jit
def _gradient(x, at, target, counted, log_total, factor):
    softmax = tl.exp(x.to(tl.float32) - log_total)
    return tl.where(counted, (softmax - tl.where(at == target, 1.0, 0.0)) * factor, 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["ignore_index"])
def _rows_kernel(
    logits_ptr, targets_ptr, loss_ptr, factor_ptr,
    V, stride, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i: loss[i] = logsumexp(logits[i]) - logits[i, target]; logits[i] := (softmax - one_hot(target)) * factor."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)  # a running maximum and sum for each lane of the block
    total = tl.zeros([BLOCK], tl.float32)
    whole = V // BLOCK * BLOCK  # what lies before has no mask: with one, the width of an access depends on V
    for start in range(0, whole, BLOCK):
        top, total = _add_to_sum(top, total, tl.load(logits_ptr + start + columns).to(tl.float32))
    rest = whole + columns
    if whole < V:
        x = tl.load(logits_ptr + rest, mask=rest < V, other=float("-inf")).to(tl.float32)
        top, total = _add_to_sum(top, total, x)
    peak = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - peak), axis=0)
    log_total = peak + tl.log(total)
    inside = counted & (target >= 0) & (target < V)
    # A target outside the vocabulary gives NaN: a kernel cannot raise, and NaN shows.
    at_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counted, log_total - at_target, 0.0))
    if factor_ptr is not None:
        factor = tl.load(factor_ptr)
        tl.debug_barrier()  # the logit of the target has been read by all before anyone overwrites it
        for start in range(0, whole, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at)
            tl.store(logits_ptr + at, _gradient(x, at, target, counted, log_total, factor))
        if whole < V:
            x = tl.load(logits_ptr + rest, mask=rest < V, other=float("-inf"))
            tl.store(logits_ptr + rest, _gradient(x, rest, target, counted, log_total, factor), mask=rest < V)


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
            BLOCK=warps * 32 * 16 // logits.itemsize, num_warps=warps, **FUSED,
        )  # fmt: skip
    return losses
