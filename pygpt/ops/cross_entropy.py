"""The model's head and its loss in one op: cross-entropy of hidden @ weight.T, with the logits never whole in memory.

Tokens go through in chunks. A chunk's logits are turned into its loss and, where gradients are wanted, at once into the
gradients of hidden and weight, so that nothing of size tokens x vocabulary outlives its chunk and backward has no second
product with the vocabulary to do. The idea of computing the gradient in the forward pass is Liger-Kernel's (Hsu et al.,
2024). The products go through the library's GEMM; on CPUs a compiled kernel turns a chunk's logits into their gradient in
place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError, InputTypeError
from pygpt.ops import backends
from pygpt.ops.autograd import first_order
from pygpt.ops.checks import check_device
from pygpt.ops.linear import matmul_nt

# Where neither answers, the chunks below in torch's own ops are the implementation.
backends.register("linear_cross_entropy", cpp=(torch.float32, torch.bfloat16))

CHUNK_BYTES = 52 << 20  # logits held at a time, the largest part of a workspace of less than 64 MB


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
    differentiable. In forward mode and under torch.func's transforms it is the reference, with the whole logits in memory.
    Raises InputError for shapes, devices and targets out of range, InputTypeError for dtypes.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, targets, ignore_index)
    if backends.needs_reference():
        backends.choose("linear_cross_entropy", hidden)  # an error where a backend is forced
        return linear_cross_entropy_reference(hidden, weight, targets, ignore_index)
    if not torch.is_grad_enabled():  # or the forward pass would compute the gradients of whatever requires one
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> None:
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
    hidden_values = torch.compiler.is_compiling() or backends.needs_reference()  # under vmap nobody may look at them
    if targets.device.type == "cpu" and targets.numel() and not hidden_values:
        # On a GPU the check would stop the stream; there the gather below asserts.
        wrong = ((targets < 0) & (targets != ignore_index)) | (targets >= weight.shape[0])
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise InputError(
                f"{op}: target {int(targets[at])} at position {at} is outside the vocabulary [0, {weight.shape[0]}) "
                f"and is not ignore_index ({ignore_index})"
            )


def _chunks(tokens: int, V: int, itemsize: int) -> list[tuple[int, int]]:
    """Begin and end of chunks about equally long."""
    most = max(16, CHUNK_BYTES // (itemsize * max(V, 1)))
    chunks = -(-tokens // most)
    return [(tokens * i // chunks, tokens * (i + 1) // chunks) for i in range(chunks)]


def _logits_to_grad(logits: Tensor, targets: Tensor, ignore_index: int, want_grad: bool) -> tuple[Tensor, Tensor]:
    """logits (rows, V), targets (rows,) -> the rows' losses, 0 where ignored, and softmax - one_hot where wanted."""
    valid = targets != ignore_index
    safe = targets.where(valid, 0).unsqueeze(1)
    log_p = torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    losses = -log_p.gather(1, safe).squeeze(1) * valid
    if not want_grad:
        return losses, logits
    grad = log_p.exp_().scatter_add_(1, safe, log_p.new_full((), -1).expand_as(safe))
    return losses, grad.to(logits.dtype)


def _logits_to_grad_compiled(
    logits: Tensor, targets: Tensor, ignore_index: int, want_grad: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.pygpt.cross_entropy_rows_.default(logits, targets, ignore_index, want_grad), logits


if backends.extension is not None:
    torch.library.register_fake(
        "pygpt::cross_entropy_rows_",
        lambda logits, targets, ignore_index, replace: logits.new_empty(targets.shape, dtype=torch.float32),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            need_hidden, need_weight = ctx.needs_input_grad[:2]
            backend = backends.choose("linear_cross_entropy", hidden)
            if backend == "triton":
                from pygpt.kernels.cross_entropy import linear_cross_entropy as kernel  # imports Triton

                loss, *grads = kernel(hidden, weight, targets, ignore_index, need_hidden, need_weight)
                ctx.save_for_backward(*grads, hidden, weight)
                return loss
            logits_to_grad = _logits_to_grad_compiled if backend == "cpp" else _logits_to_grad
            valid = targets != ignore_index
            count = valid.sum()
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight) if need_weight else None
            total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
            # d loss / d logits = softmax - one_hot, each row times row_weight: that factor is applied on the (rows, C) side.
            row_weight = (valid.to(total.dtype) / count.clamp(min=1)).to(hidden.dtype).unsqueeze(1)
            for start, end in _chunks(hidden.shape[0], weight.shape[0], hidden.itemsize if backend == "cpp" else 4):
                part = slice(start, end)
                logits = matmul_nt(hidden[part], weight)  # (rows, V)
                losses, grad_logits = logits_to_grad(logits, targets[part], ignore_index, need_hidden or need_weight)
                del logits  # not two chunks at a time
                total += losses.sum()
                if grad_hidden is not None:
                    torch.mul(matmul_nt(grad_logits, weight.t()), row_weight[part], out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.t(), hidden[part] * row_weight[part])
                del grad_logits
            ctx.save_for_backward(grad_hidden, grad_weight, hidden, weight)  # the inputs for `first_order` alone
            return total / count

    @staticmethod
    @first_order("linear_cross_entropy", "call linear_cross_entropy_reference of pygpt.ops.cross_entropy")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight, *_ = ctx.saved_tensors
        # The usual upstream gradient is exactly 1; looking is free on a CPU and would stop the stream on a GPU.
        if torch.compiler.is_compiling() or grad.device.type != "cpu" or grad.item() != 1.0:
            grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
            grad_weight = None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype)
        return grad_hidden, grad_weight, None, None
