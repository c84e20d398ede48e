"""embedding in Triton: token + position gather, and a backward with no atomics, no host synchronisation, no hot rows.

Backward sorts the tokens' positions by token id and cuts the sorted list into pieces of a fixed length. A program
adds up its piece by token: the sum of a token that lies wholly inside the piece is final and goes straight into the
gradient; the sums of a token that reaches past an edge go to a buffer, which a second kernel adds in the order of the
pieces. A token that makes up half of the batch is thus spread over as many programs as any other half. Sums are
float32 in a fixed order, so the same inputs give the same bits, and the host never waits for a value: a CUDA graph
can capture it. (Deterministic sums over sorted buckets are llm.c's; the fixed pieces bound the longest.)

Ids outside [0, V) give rows of NaN in forward and are left out in backward: a kernel cannot raise, and NaN shows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, cdiv, up_to


class Config(NamedTuple):
    rows: int  # tokens of a tile
    block: int  # columns of a tile
    warps: int


# Columns up to this -> tile; tests/test_triton_compile.py walks the tables.
FORWARD = (  # 16-byte accesses by whole warps, a few rows in flight
    (64, Config(32, 64, 4)),
    (256, Config(8, 256, 4)),
    (math.inf, Config(2, 1024, 4)),
)
PIECES = (  # rows: the sorted positions that one program adds up
    (64, Config(16, 64, 4)),
    (math.inf, Config(16, 128, 4)),
)
FINISH = ((64, Config(16, 64, 4)), (math.inf, Config(16, 128, 4)))
POSITIONS = ((64, Config(16, 64, 4)), (math.inf, Config(4, 256, 4)))


@triton.jit
def _forward_kernel(
    ids_ptr, token_ptr, position_ptr, out_ptr,
    tokens, T, C, V, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < tokens)[:, None] & (col < C)
    token = tl.load(ids_ptr + row, mask=row < tokens, other=0)
    known = ((token >= 0) & (token < V))[:, None]
    out = tl.load(token_ptr + token[:, None] * C + col, mask=inside & known, other=float("nan")).to(tl.float32)
    if position_ptr is not None:
        position = (offset + row % T)[:, None]
        out += tl.load(position_ptr + position * C + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row[:, None] * C + col, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_same_token(ends_a, sum_a, ends_b, sum_b):
    # Running sum that starts anew where a token starts: the second operand wins if a start lies in it.
    return ends_a | ends_b, tl.where(ends_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def _pieces_kernel(
    grad_ptr, ids_ptr, order_ptr, token_grad_ptr, partial_ptr,
    tokens, C, V,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    at = piece * PIECE + tl.arange(0, PIECE)
    valid = at < tokens
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col = columns[None, :]
    token = tl.load(ids_ptr + at, mask=valid, other=-1).to(tl.int64)
    before = tl.load(ids_ptr + at - 1, mask=valid & (at > 0), other=-1).to(tl.int64)
    after = tl.load(ids_ptr + at + 1, mask=at + 1 < tokens, other=-1).to(tl.int64)
    source = tl.load(order_ptr + at, mask=valid, other=0)
    known = valid & (token >= 0) & (token < V)
    grad = tl.load(grad_ptr + source[:, None] * C + col, mask=known[:, None] & (col < C), other=0.0).to(tl.float32)

    starts = token != before
    in_piece = tl.arange(0, PIECE)
    restart = (starts | (in_piece == 0)).to(tl.int32)
    _, total = tl.associative_scan((tl.broadcast_to(restart[:, None], [PIECE, BLOCK]), grad), 0, _add_same_token)
    # `total` is whole, as far as this piece goes, at a token's last row here. Did that token start in this piece?
    starts_before = starts[None, :] & (in_piece[None, :] <= in_piece[:, None])
    started_here = tl.max(starts_before.to(tl.int32), axis=1) > 0
    ends = token != after
    last_here = known & (ends | (in_piece == PIECE - 1))

    final = (last_here & started_here & ends)[:, None] & (col < C)
    target = token_grad_ptr + token[:, None] * C + col
    total_so_far = tl.load(target, mask=final, other=0.0).to(tl.float32) + total
    tl.store(target, total_so_far.to(token_grad_ptr.dtype.element_ty), mask=final)
    # Slot 0: the sum of the token that came in over the left edge; slot 1: of the one that starts here and goes on.
    slot = started_here.to(tl.int64)
    share = (last_here & ~(started_here & ends))[:, None] & (col < C)
    tl.store(partial_ptr + ((piece.to(tl.int64) * 2 + slot) * C)[:, None] + col, total, mask=share)


@triton.jit
def _finish_kernel(
    ids_ptr, token_grad_ptr, partial_ptr,
    tokens, C, V,
    PIECE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    edge = (piece + 1) * PIECE  # first position of the next piece; the grid leaves out the last piece
    token = tl.load(ids_ptr + edge - 1).to(tl.int64)
    goes_on = tl.load(ids_ptr + edge).to(tl.int64) == token
    head = tl.load(ids_ptr + piece * PIECE).to(tl.int64) == token
    came_in = head & (tl.load(ids_ptr + piece * PIECE - 1, mask=piece > 0, other=-1).to(tl.int64) == token)
    if goes_on & (came_in == 0) & (token >= 0) & (token < V):
        low = edge + 1  # the token's end: the first position, past the edge, that holds another id
        high = tokens + 0
        while low < high:
            middle = (low + high) // 2
            if tl.load(ids_ptr + middle).to(tl.int64) == token:
                low = middle + 1
            else:
                high = middle + 0
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < C
        last = (low - 1) // PIECE
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for top in range(piece + 1, last + 1, ROWS):
            row = (top + tl.arange(0, ROWS)).to(tl.int64)
            mask = (row <= last)[:, None] & inside[None, :]
            sums += tl.load(partial_ptr + (row * 2 * C)[:, None] + columns[None, :], mask=mask, other=0.0)
        total = tl.load(partial_ptr + (piece.to(tl.int64) * 2 + 1) * C + columns, mask=inside, other=0.0)
        total += tl.sum(sums, axis=0)
        target = token_grad_ptr + token * C + columns
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, total.to(token_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _position_kernel(
    grad_ptr, position_grad_ptr,
    B, T, C, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < T)[:, None] & (col < C)
    target = position_grad_ptr + (offset + row).to(tl.int64)[:, None] * C + col
    total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    source = grad_ptr + row.to(tl.int64)[:, None] * C + col
    for _ in tl.range(0, B, loop_unroll_factor=4):  # that many loads in flight
        total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        source += tl.cast(T, tl.int64) * C  # T is no tensor where it is 1
    tl.store(target, total.to(position_grad_ptr.dtype.element_ty), mask=inside)


def embedding_forward(idx: Tensor, token_table: Tensor, position_table: Tensor | None, position_offset: int) -> Tensor:
    """idx (B, T) int64; token_table (V, C); position_table (P, C) -> (B, T, C) in token_table's dtype."""
    idx, token_table = idx.contiguous(), token_table.contiguous()
    position_table = None if position_table is None else position_table.contiguous()
    (B, T), (V, C) = idx.shape, token_table.shape
    out = token_table.new_empty(B, T, C)
    if out.numel():
        tile = up_to(FORWARD, C)
        _forward_kernel[(cdiv(B * T, tile.rows), cdiv(C, tile.block))](
            idx, token_table, position_table, out, B * T, T, C, V, position_offset,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    return out


def embedding_backward_(
    grad: Tensor, idx: Tensor, token_grad: Tensor, position_grad: Tensor | None, position_offset: int
) -> None:
    """Adds the gradient of (B, T, C) into token_grad (V, C) and position_grad (P, C), both contiguous."""
    grad = grad.contiguous()
    (B, T), (V, C) = idx.shape, token_grad.shape
    if not (token_grad.is_contiguous() and (position_grad is None or position_grad.is_contiguous())):
        raise ValueError("embedding_backward_: the gradients that are added into must be contiguous")
    tokens = B * T
    if tokens == 0 or C == 0:
        return
    # 32-bit keys halve the radix sort's passes; ids that do not fit are clamped, and so stay outside the vocabulary.
    keys = idx.flatten().clamp(-1, V).to(torch.int32) if V < 2**31 else idx.flatten()
    ids, order = torch.sort(keys, stable=True)
    tile = up_to(PIECES, C)
    piece, pieces = tile.rows, cdiv(tokens, tile.rows)
    partial = grad.new_empty(pieces, 2, C, dtype=torch.float32)
    _pieces_kernel[(pieces, cdiv(C, tile.block))](
        grad, ids, order, token_grad, partial, tokens, C, V,
        PIECE=piece, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
    )  # fmt: skip
    if pieces > 1:
        tile = up_to(FINISH, C)
        _finish_kernel[(pieces - 1, cdiv(C, tile.block))](
            ids, token_grad, partial, tokens, C, V,
            PIECE=piece, BLOCK=tile.block, ROWS=tile.rows, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    if position_grad is not None:
        tile = up_to(POSITIONS, C)
        _position_kernel[(cdiv(T, tile.rows), cdiv(C, tile.block))](
            grad, position_grad, B, T, C, position_offset,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
        )  # fmt: skip


def embedding_backward(
    grad: Tensor, idx: Tensor, token_rows: int, position_rows: int | None, position_offset: int
) -> tuple[Tensor, Tensor]:
    """-> token_grad (token_rows, C), position_grad (position_rows, C; of 0 rows where position_rows is None)."""
    token_grad = grad.new_zeros(token_rows, grad.shape[-1])
    position_grad = grad.new_zeros(position_rows or 0, grad.shape[-1])
    embedding_backward_(grad, idx, token_grad, None if position_rows is None else position_grad, position_offset)
    return token_grad, position_grad
