"""linear_cross_entropy in Triton: loss and gradients of hidden @ weight.T against targets, a chunk of tokens at a time.

The products are the library's GEMM. Between them one kernel reads a chunk's logits twice (the second time from the
cache) and leaves in their place the gradient of the loss, so that a chunk costs one buffer, and the logits are never
whole in memory. (Gradients in the forward pass and in place: Liger-Kernel, Hsu et al., 2024.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, cdiv, up_to

CHUNK_BYTES = 128 << 20  # of logits held at a time


class Config(NamedTuple):
    block: int  # columns of a tile
    warps: int


# Vocabulary up to this -> tile of 8 values a thread, a row of GPT-2's in 13; tests/test_triton_compile.py walks the table.
TILES = ((256, Config(256, 1)), (1024, Config(1024, 4)), (math.inf, Config(4096, 16)))


@triton.jit(do_not_specialize=["ignore_index"])
def _loss_and_gradient_kernel(
    logits_ptr, targets_ptr, loss_ptr,
    stride, V, ignore_index,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i: loss[i] = logsumexp(logits[i]) - logits[i, target]; logits[i] := softmax - one_hot(target)."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)  # a running maximum and sum for each lane of the block
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, x)
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - origin) + tl.exp(x - origin)
        top = new_top
    peak = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - peak), axis=0)
    log_total = peak + tl.log(total)
    inside = counted & (target >= 0) & (target < V)
    # A target outside the vocabulary gives NaN: a kernel cannot raise, and NaN shows.
    at_target = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(counted, log_total - at_target, 0.0))
    if WRITE:
        tl.debug_barrier()  # the logit of the target has been read by all before anyone overwrites it
        for start in range(0, V, BLOCK):
            at = start + columns
            x = tl.load(logits_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            gradient = tl.where(counted, tl.exp(x - log_total) - tl.where(at == target, 1.0, 0.0), 0.0)
            tl.store(logits_ptr + at, gradient.to(logits_ptr.dtype.element_ty), mask=at < V)


def loss_and_gradient_(logits: Tensor, targets: Tensor, gradient: bool, ignore_index: int = -100) -> Tensor:
    """Losses (N,) float32 of logits (N, V), rows contiguous, against targets (N,) int64; 0 where ignored.

    With `gradient` the logits are overwritten by d loss[i] / d logits[i].
    """
    N, V = logits.shape
    losses = logits.new_empty(N, dtype=torch.float32)
    tile = up_to(TILES, V)
    if N:
        _loss_and_gradient_kernel[(N,)](
            logits, targets, losses, logits.stride(0), V, ignore_index,
            WRITE=gradient, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    return losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    need_hidden: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden (N, C), weight (V, C), targets (N,) int64 -> mean loss, float32, and its gradients by hidden and weight.

    The mean is over targets other than ignore_index, NaN where there are none. No host synchronisation.
    """
    N, V = hidden.shape[0], weight.shape[0]
    targets = targets.contiguous()
    count = (targets != ignore_index).sum()
    # The mean's 1 / count is applied on the (N, C) side: 16-bit logits' gradients would underflow.
    scale = (1.0 / count.clamp(min=1).float()).to(hidden.dtype)
    scaled_hidden = hidden * scale if need_weight else hidden
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    losses = hidden.new_empty(N, dtype=torch.float32)
    rows = max(128, CHUNK_BYTES // (max(V, 1) * hidden.element_size()) // 128 * 128)
    rows = cdiv(N, cdiv(max(N, 1), rows))  # chunks of one size, so that the last is no sliver
    for start in range(0, N, max(rows, 1)):
        part = slice(start, start + rows)
        logits = hidden[part] @ weight.t()
        losses[part] = loss_and_gradient_(logits, targets[part], need_hidden or need_weight, ignore_index)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[part])
        if grad_weight is not None:
            grad_weight.addmm_(logits.t(), scaled_hidden[part])
    if grad_hidden is not None:
        grad_hidden *= scale
    return losses.sum() / count, grad_hidden, grad_weight
