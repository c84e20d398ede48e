"""Token embedding with the learned position embedding added in the same pass (Radford et al., 2018: GPT)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError, InputTypeError
from pygpt.ops import backends
from pygpt.ops.autograd import differentiable, first_order
from pygpt.ops.checks import check_device

# Elements from which on torch, which writes zeros to all of the table's gradient, is the slower one.
LARGE_TABLE = 1 << 23
backends.register("embedding", cpp=(torch.float32, torch.bfloat16), cuda=(torch.float32, torch.bfloat16, torch.float16))


def embedding_reference(
    idx: Tensor, token_table: Tensor, position_table: Tensor | None = None, position_offset: int = 0
) -> Tensor:
    """Plain PyTorch, differentiable, any dtype and device."""
    x = F.embedding(idx, token_table)
    if position_table is not None:
        x = x + position_table[position_offset : position_offset + idx.shape[1]]
    return x


def embedding(
    idx: Tensor, token_table: Tensor, position_table: Tensor | None = None, position_offset: int = 0
) -> Tensor:
    """Rows of `token_table` for the token ids `idx`, plus the rows of `position_table` for where they stand.

    idx: (B, T) int64; int32 is converted. token_table: (V, C), and position_table: (P, C) or None, of one floating-point
    dtype. position_offset: the position of idx[:, 0]. Returns (B, T, C):
    token_table[idx[b, t]] + position_table[position_offset + t].

    Raises InputError (a ValueError) for shapes, devices, a token id outside 0 .. V - 1 and a sequence that reaches beyond
    position P - 1; InputTypeError (a TypeError) for dtypes. On a CUDA device a bad token id is a device-side assertion of
    torch, because a check would make the host wait for the device.

    Without positions and gradients it is a plain gather, which is torch's own unless a backend is forced; with gradients as
    well where the result has fewer than 262,144 elements of float32, and the table fewer than 8,388,608.
    """
    if (
        position_table is None
        and idx.dim() == 2
        and (not (token_table.requires_grad and torch.is_grad_enabled()) or _is_small(idx, token_table))
        and token_table.is_floating_point()
        and backends.automatic_on_cpu(token_table)
    ):
        try:
            return torch.embedding(token_table, idx)
        except (IndexError, RuntimeError, TypeError):  # the checks below name what was wrong
            pass
    idx = _check(idx, position_offset, "token_table", token_table, "position_table", position_table)
    try:
        if backends.choose("embedding", token_table) == "eager":
            return embedding_reference(idx, token_table, position_table, position_offset)
        return _embedding(idx, token_table, position_table, position_offset)
    except IndexError:
        raise _unknown_token(idx, token_table.shape[0]) from None


def _is_small(idx: Tensor, table: Tensor) -> bool:
    return (
        table.dtype == torch.float32
        and table.dim() == 2
        and idx.numel() * table.shape[-1] < backends.SMALL_IN_FLOAT32
        and table.numel() < LARGE_TABLE
    )


def tied_embedding(
    idx: Tensor, token_table: Tensor, position_table: Tensor | None = None, position_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """`embedding`, and the token table once more: (x, table). `table` is for the head of the same forward pass.

    Autograd then brings both gradients of the table to one place, where the embedding's few rows are added to the head's
    gradient in place. Apart, they cost a second gradient of the whole table, mostly zeros, and its addition. So it is on the
    CPU where the compiled backend answers; elsewhere `table` is token_table itself.
    Only for ops whose gradient of `table` nobody else holds, such as linear_cross_entropy: it is overwritten. That is why
    `pygpt.ops` does not offer it. Arguments and errors are those of `embedding`.
    """
    if (
        torch.compiler.is_compiling()
        or not token_table.is_cpu
        or not (token_table.requires_grad and torch.is_grad_enabled())
        or backends.choose("embedding", token_table) != "cpp"
    ):
        return embedding(idx, token_table, position_table, position_offset), token_table
    idx = _check(idx, position_offset, "token_table", token_table, "position_table", position_table)
    try:
        return _TiedEmbedding.apply(idx, token_table, position_table, position_offset)
    except IndexError:
        raise _unknown_token(idx, token_table.shape[0]) from None


def embedding_backward_(
    grad: Tensor, idx: Tensor, token_grad: Tensor, position_grad: Tensor | None = None, position_offset: int = 0
) -> None:
    """Add the gradient of `embedding` into gradients that exist already, in place.

    Autograd has to make a gradient of the whole table, (V, C), for the few rows that a batch touches. Someone who owns
    the gradient buffers saves that: `embedding_backward_(grad, idx, wte.weight.grad, wpe.weight.grad)`.

    grad: (B, T, C), the gradient of embedding's result. token_grad: (V, C), position_grad: (P, C) or None, contiguous, of
    grad's dtype. The other arguments and the errors are those of `embedding`. A row is summed in float32 and rounded once.
    """
    idx = _check(idx, position_offset, "token_grad", token_grad, "position_grad", position_grad)
    if grad.shape != (*idx.shape, token_grad.shape[1]):
        expected = (*idx.shape, token_grad.shape[1])
        raise InputError(f"embedding_backward_: grad must be (B, T, C) = {expected}, got {tuple(grad.shape)}")
    if grad.dtype != token_grad.dtype:
        raise InputTypeError(f"embedding_backward_: grad is {grad.dtype} but token_grad is {token_grad.dtype}")
    check_device("embedding_backward_", idx, grad=grad)
    for name, table in (("token_grad", token_grad), ("position_grad", position_grad)):
        if table is not None and not table.is_contiguous():
            raise InputError(f"embedding_backward_: {name} must be contiguous, because it is written in place")
    try:
        if backends.choose("embedding", grad) == "eager":
            _backward_reference_(grad, idx, token_grad, position_grad, position_offset)
        else:
            torch.ops.pygpt.embedding_backward_.default(grad, idx, token_grad, position_grad, position_offset)
    except IndexError:
        raise _unknown_token(idx, token_grad.shape[0]) from None


@torch.no_grad()
def _backward_reference_(
    grad: Tensor, idx: Tensor, token_grad: Tensor, position_grad: Tensor | None, position_offset: int
) -> None:
    # Through autograd, so that repeated tokens are summed as torch does it for nn.Embedding.
    leaves = [table.detach().requires_grad_() for table in (token_grad, position_grad) if table is not None]
    with torch.enable_grad():
        out = embedding_reference(idx, leaves[0], leaves[1] if len(leaves) > 1 else None, position_offset)
    grads = torch.autograd.grad(out, leaves, grad)
    token_grad.add_(grads[0])
    if position_grad is not None:
        position_grad.add_(grads[1])


def _check(
    idx: Tensor, position_offset: int, token_name: str, token: Tensor, position_name: str, position: Tensor | None
) -> Tensor:
    """idx as int64; raises for anything that does not fit."""
    if idx.dim() != 2:
        raise InputError(f"embedding: token ids must be (B, T), got {tuple(idx.shape)}")
    if idx.dtype != torch.int64:
        if idx.dtype != torch.int32:
            raise InputTypeError(f"embedding: token ids must be int64, got {idx.dtype}")
        idx = idx.long()
    if token.dim() != 2:
        raise InputError(f"embedding: {token_name} must be (V, C), got {tuple(token.shape)}")
    if not token.dtype.is_floating_point:
        raise InputTypeError(f"embedding: {token_name} must be floating-point, got {token.dtype}")
    if token.device != idx.device:
        raise InputError(
            f"embedding: {token_name} is on {token.device} but the token ids are on {idx.device}; move one"
        )
    if position is None:
        return idx
    if position.dim() != 2 or position.shape[1] != token.shape[1]:
        raise InputError(
            f"embedding: {position_name} {tuple(position.shape)} must be (P, C) with the C of {token_name} {tuple(token.shape)}"
        )
    if position.dtype != token.dtype:
        raise InputTypeError(f"embedding: {position_name} is {position.dtype} but {token_name} is {token.dtype}")
    check_device("embedding", idx, **{position_name: position})
    if position_offset < 0:
        raise InputError(f"embedding: position_offset must not be negative, got {position_offset}")
    if position_offset + idx.shape[1] > position.shape[0]:
        raise InputError(
            f"embedding: {idx.shape[1]} tokens from position {position_offset} on do not fit {position_name}, "
            f"which has {position.shape[0]} positions (block_size); shorten the sequence"
        )
    return idx


def _unknown_token(idx: Tensor, V: int) -> InputError:
    row, position = ((idx < 0) | (idx >= V)).nonzero()[0].tolist()
    return InputError(
        f"embedding: token id {idx[row, position].item()} at row {row}, position {position} is outside the vocabulary "
        f"of {V}; was the text encoded with another tokenizer?"
    )


# --- fake functions and autograd formula of the compiled operators ---------------------------------------------------


def _forward_fake(idx: Tensor, token_table: Tensor, position_table: Tensor | None, position_offset: int) -> Tensor:
    return token_table.new_empty(*idx.shape, token_table.shape[1])


def _backward_fake(
    grad: Tensor, idx: Tensor, token_rows: int, position_rows: int | None, position_offset: int
) -> tuple[Tensor, Tensor]:
    C = grad.shape[2]
    return grad.new_empty(token_rows, C), grad.new_empty(0 if position_rows is None else position_rows, C)


def _backward_fake_(
    grad: Tensor, idx: Tensor, token_grad: Tensor, position_grad: Tensor | None, position_offset: int
) -> None:
    return None


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    idx, token_table, position_table, ctx.position_offset = inputs
    ctx.save_for_backward(idx)
    ctx.token_rows = token_table.shape[0]
    ctx.position_rows = None if position_table is None else position_table.shape[0]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (idx,) = ctx.saved_tensors
    rows, C = (ctx.token_rows, ctx.position_rows), grad.shape[2]
    if (
        grad.device.type == "cpu"
    ):  # has an operator of its own, because filling a fresh table with zeros is the main cost
        grads = torch.ops.pygpt.embedding_backward.default(grad, idx, *rows, ctx.position_offset)
        return None, grads[0], None if rows[1] is None else grads[1], None
    token_grad, position_grad = (None if n is None else grad.new_zeros(n, C) for n in rows)
    torch.ops.pygpt.embedding_backward_.default(grad, idx, token_grad, position_grad, ctx.position_offset)
    return None, token_grad, position_grad, None


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        _setup(ctx, inputs, None)
        # detach: of the same memory and version, so that a change in place between forward and backward is still an error
        return torch.ops.pygpt.embedding_forward.default(*inputs), inputs[1].detach()

    @staticmethod
    @first_order("the compiled embedding")
    def backward(
        ctx: Any, grad: Tensor | None, of_head: Tensor | None
    ) -> tuple[None, Tensor | None, Tensor | None, None]:
        """grad: by x. of_head: by table. Either is None where what is differentiated does not depend on it."""
        if grad is None:
            return None, of_head, None, None
        if of_head is None:
            return _backward(ctx, grad)
        # linear_cross_entropy returns what it saved, and where the graph is kept the next backward gets the same tensor.
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        if keeps or of_head.requires_grad or not of_head.is_contiguous():
            of_head = of_head.clone(memory_format=torch.contiguous_format)
        (idx,) = ctx.saved_tensors
        position_grad = None if ctx.position_rows is None else grad.new_zeros(ctx.position_rows, grad.shape[2])
        torch.ops.pygpt.embedding_backward_.default(grad, idx, of_head, position_grad, ctx.position_offset)
        return None, of_head, position_grad, None


if backends.extension is not None:
    torch.library.register_fake("pygpt::embedding_backward", _backward_fake)
    torch.library.register_fake("pygpt::embedding_backward_", _backward_fake_)
    _embedding = differentiable("embedding_forward", _forward_fake, _setup, _backward)
