"""The model's head and its loss in one op: cross-entropy of hidden @ weight.T, with the logits never whole in memory.

Tokens go through in chunks. A chunk's logits are turned into its loss and, where gradients are wanted, at once into the
gradients of hidden and weight, so that nothing of size tokens x vocabulary outlives its chunk and backward has no second
product with the vocabulary to do. The idea of computing the gradient in the forward pass is Liger-Kernel's (Hsu et al.,
2024). The products go through the library's GEMM; on CPUs a compiled kernel turns a chunk's logits into their gradient in
place, and where there is but one chunk into their mean as well. In bfloat16 on processors with AMX all of it is one compiled
operator, csrc/cpu/linear_cross_entropy.cpp.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError, InputTypeError
from pygpt.ops import backends
from pygpt.ops.autograd import first_order
from pygpt.ops.checks import check_device
from pygpt.ops.linear import (
    SLICE_BYTES,
    has_tiles,
    in_float32,
    linear,
    matmul_nt,
    matmul_tn_,
)

# Where neither answers, the chunks below in torch's own ops are the implementation.
backends.register("linear_cross_entropy", cpp=(torch.float32, torch.bfloat16))

# Logits held at a time, the largest part of a workspace of less than 64 MB: 256 rows of GPT-2's vocabulary in float32.
CHUNK_BYTES = 50 << 20
GPU_CHUNK_BYTES = 128 << 20  # a chunk reads and writes all of the gradient of weight: fewer, where memory allows
MIN_VOCABULARY = 2048  # of the operator for AMX, whose threads share out the vocabulary
TILE = 16  # rows of which the library's products go through their fast path


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Plain PyTorch with the whole logits, in float32 for half-precision inputs."""
    logits = F.linear(hidden, weight)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy of the logits hidden @ weight.T against targets.

    hidden: (N, C) and weight: (V, C), floating point, one dtype. targets: (N,) int64, each in [0, V) or `ignore_index`.
    Returns a float32 scalar (float64 for float64): the mean over targets that are not ignored, NaN when all are. Once
    differentiable. In forward mode and under torch.func's transforms it is the reference, with the whole logits in memory;
    on the CPU fewer than 65,536 logits are whole as well, and in training but for bfloat16 torch's own, unless a backend is
    forced.
    Raises InputError for shapes, devices and targets out of range, InputTypeError for dtypes.
    """
    if backends.is_autocast(hidden):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets, ignore_index)
    if (
        backends.automatic_on_cpu(hidden)
        and hidden.dim() == weight.dim() == 2
        and 0 < hidden.shape[0] * weight.shape[0] < backends.SMALL
        and targets.dtype == torch.int64
        and (hidden.dtype != torch.bfloat16 or backends.choose("linear_cross_entropy", hidden) == "eager")
    ):
        try:
            logits = linear(hidden, weight)
            own = not torch.is_grad_enabled() and targets.is_cpu
            if own and backends.choose("linear_cross_entropy", hidden) == "cpp":
                return torch.ops.pygpt.cross_entropy_.default(logits, targets, ignore_index, False)
            return F.cross_entropy(
                logits if logits.itemsize > 2 else logits.float(), targets, ignore_index=ignore_index
            )
        except (RuntimeError, IndexError, ValueError):  # the checks below name what was wrong
            pass
    _check(hidden, weight, targets)
    if backends.needs_reference():
        backends.choose("linear_cross_entropy", hidden)  # an error where a backend is forced
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index)
    try:
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)
        return _loss_and_gradients(hidden, weight, targets, ignore_index, False, False)[0]
    except (RuntimeError, IndexError):
        if targets.device.type == "cpu":  # where to look would have cost time in every call
            _check_range(targets, weight.shape[0], ignore_index)
        raise


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    op = "linear_cross_entropy"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(
            f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, C) and (V, C)"
        )
    if targets.shape != hidden.shape[:1]:
        raise InputError(f"{op}: targets {tuple(targets.shape)} must be (N,) for hidden {tuple(hidden.shape)}")
    if not hidden.dtype.is_floating_point or weight.dtype != hidden.dtype:
        raise InputTypeError(
            f"{op}: hidden ({hidden.dtype}) and weight ({weight.dtype}) must share a floating-point dtype"
        )
    if targets.dtype != torch.int64:
        raise InputTypeError(f"{op}: targets are {targets.dtype}; they must be int64")
    check_device(op, hidden, weight=weight, targets=targets)


def _check_range(targets: Tensor, V: int, ignore_index: int) -> None:
    wrong = ((targets < 0) & (targets != ignore_index)) | (targets >= V)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise InputError(
            f"linear_cross_entropy: target {int(targets[at])} at position {at} is outside the vocabulary [0, {V}) "
            f"and is not ignore_index ({ignore_index})"
        )


def _chunks(tokens: int, row_bytes: int, on_cpu: bool) -> list[tuple[int, int]]:
    """Begin and end of chunks about equally long, in whole tiles: other numbers of rows cost a product up to a third more."""
    bytes_ = CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES
    tiles = -(-tokens // TILE)
    chunks = -(-tiles // max(1, bytes_ // (TILE * max(row_bytes, 1))))
    return list(itertools.pairwise([*(TILE * (tiles * i // chunks) for i in range(chunks)), tokens]))


# A chunk's rows: logits (rows, V), targets (rows,), factor of the gradients or None where none are wanted -> losses, 0 where
# ignored; softmax - one_hot, 0 where ignored; and what that is still to be multiplied by.
Rows = tuple[Tensor, Tensor, Tensor | None]


def _rows(logits: Tensor, targets: Tensor, ignore_index: int, factor: Tensor | None) -> Rows:
    valid = targets != ignore_index
    at = targets.where(valid, 0).unsqueeze(1)
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -log_p.gather(1, at).squeeze(1) * valid
    if factor is None:
        return losses, logits, None
    grad = log_p.exp_().scatter_add_(1, at, log_p.new_full((), -1).expand_as(at)).mul_(valid.unsqueeze(1))
    # In place where the rows of logits begin where a GPU's products want them to.
    grad = grad.to(logits.dtype) if logits.is_contiguous() else logits.copy_(grad)
    return losses, grad, factor  # times 1 / count float16 could not hold it


def _rows_compiled(logits: Tensor, targets: Tensor, ignore_index: int, factor: Tensor | None) -> Rows:
    left = None
    if factor is not None and logits.dtype == torch.float16:
        factor, left = torch.ones_like(factor), factor
    losses = torch.ops.pygpt.cross_entropy_rows_.default(logits, targets, ignore_index, factor)
    return losses, logits, left


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    """x times a number of a precision that the dtype of x need not have, rounded once."""
    if factor is None:
        return x
    if x.is_cpu or factor.dtype == x.dtype:
        return x * factor
    # Of a GPU's number without dimensions `*` would take what x's dtype makes of it: in float16 of 65,536 infinity.
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x))


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


if backends.extension is not None:
    torch.library.register_fake(
        "pygpt::linear_cross_entropy",
        lambda hidden, weight, targets, ignore_index, need_hidden, need_weight: (
            hidden.new_empty((), dtype=torch.float32),
            hidden.new_empty(hidden.shape[0] if need_hidden else 0, hidden.shape[1]),
            weight.new_empty(weight.shape[0] if need_weight else 0, weight.shape[1]),
        ),
    )
    torch.library.register_fake(
        "pygpt::cross_entropy_rows_",
        lambda logits, targets, ignore_index, grad_factor: logits.new_empty(targets.shape, dtype=torch.float32),
    )
    torch.library.register_fake(
        "pygpt::cross_entropy_",
        lambda logits, targets, ignore_index, need_gradient: logits.new_empty((), dtype=torch.float32),
    )


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mean loss, and its gradients by hidden and weight where they are needed."""
    backend = backends.choose("linear_cross_entropy", hidden)
    if backend == "cpp" and has_tiles(hidden) and 0 not in hidden.shape and weight.shape[0] >= MIN_VOCABULARY:
        loss, *of_inputs = torch.ops.pygpt.linear_cross_entropy.default(
            hidden, weight, targets, ignore_index, need_hidden, need_weight
        )
        return loss, of_inputs[0] if need_hidden else None, of_inputs[1] if need_weight else None
    (V, C), compiled = weight.shape, backend in ("cpp", "triton")
    row_bytes = V * (hidden.itemsize if compiled else 4)
    if backend == "cpp" and not torch.compiler.is_compiling() and in_float32(hidden):
        if hidden.numel() + weight.numel() <= SLICE_BYTES // 4:  # all at once, and the logits remain what they are
            wide = hidden.float(), weight.float()
            loss, of_hidden, of_weight = _loss_and_gradients(*wide, targets, ignore_index, need_hidden, need_weight)
            return loss, _to(of_hidden, hidden.dtype), _to(of_weight, weight.dtype)
        # Slices of the products, their operands and sums; twice, because what was freed leaves holes.
        row_bytes += 16 * min(V, SLICE_BYTES // (4 * max(C, 1))) + 32 * C
    chunks = _chunks(hidden.shape[0], row_bytes, hidden.is_cpu)
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    if grad_weight is not None and 0 in hidden.shape:
        grad_weight.zero_()
    if backend == "cpp" and len(chunks) == 1:
        logits = matmul_nt(hidden, weight)
        loss = torch.ops.pygpt.cross_entropy_.default(logits, targets, ignore_index, need_hidden or need_weight)
        if grad_weight is not None:
            matmul_tn_(grad_weight, logits, hidden, add=False)
        return loss, matmul_nt(logits, weight.t()) if need_hidden else None, grad_weight
    of_rows = _rows_compiled if compiled else _rows
    count = (targets != ignore_index).sum().to(torch.promote_types(hidden.dtype, torch.float32))
    factor = count.clamp(min=1).reciprocal() if need_hidden or need_weight else None
    total = torch.zeros_like(count)
    # Of one chunk it is the product itself.
    grad_hidden = hidden.new_empty(hidden.shape) if need_hidden and len(chunks) != 1 else None
    for start, end in chunks:
        x = hidden[start:end]
        losses, grad, left = of_rows(matmul_nt(x, weight), targets[start:end], ignore_index, factor)
        total += losses.sum()
        if need_hidden:
            part = _times(matmul_nt(grad, weight.t()), left)
            if grad_hidden is None:
                grad_hidden = part
            else:
                grad_hidden[start:end] = part
        if grad_weight is not None:
            matmul_tn_(grad_weight, grad, _times(x, left), add=start > 0)
        del grad  # not two chunks at a time
    return total / count, grad_hidden, grad_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        loss, *grads = _loss_and_gradients(hidden, weight, targets, ignore_index, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads, hidden, weight)  # the inputs for `first_order` alone
        return loss

    @staticmethod
    @first_order("linear_cross_entropy", "call linear_cross_entropy_reference of pygpt.ops.cross_entropy")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight, *_ = ctx.saved_tensors
        # The usual upstream gradient is exactly 1; looking is free on a CPU and would stop the stream on a GPU.
        if torch.compiler.is_compiling() or grad.device.type != "cpu" or grad.item() != 1.0:
            grad_hidden = None if grad_hidden is None else _times(grad_hidden, grad)
            grad_weight = None if grad_weight is None else _times(grad_weight, grad)
        return grad_hidden, grad_weight, None, None
