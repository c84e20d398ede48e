"""causal_attention in Triton: softmax(q k' * scale) v causally masked, the scores never in memory.

Forward is FlashAttention-2's (Dao, 2023): a program owns a block of queries and walks over the key blocks that it may
see, with a running maximum and sum; blocks above the diagonal are skipped and only those on it are masked. Backward
recomputes the probabilities from the log-sum-exp, once by query blocks (grad_q) and once by key blocks (grad_k,
grad_v), so that each gradient has a single writer: no atomics, same inputs, same bits. Long rows start first, so that
short ones fill the tail; heads go in sections whose keys and values fit the second-level cache. With few queries and
many keys (decoding) the keys are split among programs, and a second kernel combines the shares. A float32 head too wide
for the registers goes to several programs: each writes a part of its columns, and computes the scores, over all of them,
anew.

Dropout is counter-based: whether element (b, h, i, j) is kept depends on the seed and on its place alone, so that
every pass, tile shape and backend drops the same ones. See `_keep`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, architecture, cdiv, l2_bytes, multiprocessors, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    queries: int  # rows of a tile
    keys: int  # columns of a tile: 16, 32, or a multiple of 64 (one dropout counter covers 64)
    warps: int
    stages: int  # blocks in flight
    registers: int | None = None  # most a thread may use, where fewer let one more program run beside this one


class Row(NamedTuple):
    """A line of the tables below: the first that fits is taken."""

    bits: int  # of a value: 16 or 32
    D: int  # head dimensions up to this
    T: int  # queries up to this
    arch: range  # compute capabilities
    dropout: bool | None  # None: with and without
    config: Config


MANY = 1 << 31
ANY, HOPPER, LATER = range(80, 1000), range(90, 100), range(100, 1000)
# Every configuration that can be chosen; tests/test_triton_compile.py walks these tables and accepts no spilled register.
FORWARD = (
    Row(16, 256, 16, LATER, True, Config(16, 32, 4, 1)),
    Row(16, 256, 16, ANY, None, Config(16, 64, 4, 2)),
    Row(16, 128, 64, LATER, True, Config(64, 64, 8, 1)),
    Row(16, 128, 64, ANY, None, Config(64, 64, 4, 1)),
    Row(16, 256, 64, ANY, None, Config(32, 32, 4, 1)),
    # At 128 registers two programs share a multiprocessor: one's softmax hides the other's products.
    Row(16, 64, MANY, HOPPER, False, Config(128, 64, 8, 3, 128)),
    Row(16, 64, MANY, LATER, None, Config(128, 64, 8, 3)),
    Row(16, 64, MANY, ANY, False, Config(128, 64, 4, 3)),
    Row(16, 64, MANY, ANY, True, Config(128, 64, 8, 3)),
    Row(16, 128, MANY, HOPPER, None, Config(128, 64, 8, 2)),
    Row(16, 128, MANY, ANY, False, Config(128, 64, 8, 2)),
    Row(16, 128, MANY, ANY, True, Config(64, 64, 8, 2)),
    Row(16, 256, MANY, HOPPER, False, Config(64, 32, 4, 1)),
    Row(16, 256, MANY, LATER, None, Config(32, 32, 8, 1)),
    Row(16, 256, MANY, ANY, None, Config(32, 32, 4, 1)),
    Row(32, 128, 16, ANY, None, Config(16, 32, 4, 1)),
    Row(32, 64, MANY, ANY, None, Config(32, 32, 4, 1)),
    Row(32, 128, MANY, ANY, None, Config(32, 32, 8, 1)),
    Row(32, 256, MANY, ANY, None, Config(32, 32, 8, 1)),
)
GRAD_Q = (  # the kernel that owns query blocks in backward
    Row(16, 64, MANY, HOPPER, False, Config(128, 64, 8, 2, 128)),
    Row(16, 64, MANY, ANY, None, Config(128, 64, 8, 2)),
    Row(16, 128, MANY, HOPPER, False, Config(128, 64, 8, 2)),
    Row(16, 128, MANY, LATER, None, Config(64, 64, 8, 1)),
    Row(16, 128, MANY, ANY, None, Config(64, 64, 8, 2)),
    Row(16, 256, MANY, ANY, None, Config(32, 64, 8, 1)),
    Row(32, 64, MANY, ANY, None, Config(32, 32, 8, 1)),
    Row(32, 128, MANY, ANY, None, Config(16, 32, 4, 1)),
    Row(32, 256, MANY, LATER, True, Config(16, 32, 4, 1)),
    Row(32, 256, MANY, ANY, None, Config(32, 32, 8, 1)),
)
GRAD_KV = (  # the kernel that owns key blocks in backward
    Row(16, 64, MANY, HOPPER, None, Config(64, 128, 8, 2)),
    Row(16, 64, MANY, ANY, False, Config(64, 128, 8, 2)),
    Row(16, 64, MANY, ANY, True, Config(32, 128, 8, 2)),
    Row(16, 128, MANY, HOPPER, None, Config(32, 128, 8, 2)),
    Row(16, 128, MANY, ANY, False, Config(32, 64, 4, 2)),
    Row(16, 128, MANY, ANY, True, Config(32, 64, 8, 2)),
    Row(16, 256, MANY, ANY, None, Config(32, 32, 8, 1)),
    Row(32, 64, MANY, LATER, None, Config(32, 32, 4, 1)),
    Row(32, 64, MANY, ANY, None, Config(32, 32, 8, 1)),
    Row(32, 128, MANY, ANY, None, Config(32, 16, 8, 1)),
    Row(32, 256, MANY, ANY, None, Config(32, 16, 4, 1)),
)


def choose(table: tuple[Row, ...], q: Tensor, dropout: bool) -> Config:
    """The configuration of `table` for queries q (B, T, H, D) on their device."""
    (_, T, _, D), bits, arch = q.shape, q.dtype.itemsize * 8, architecture(q)
    for row in table:
        fits = row.bits == bits and D <= row.D and T <= row.T and arch in row.arch
        if fits and row.dropout in (None, dropout):
            return row.config
    raise AssertionError(f"no configuration for heads of {D} {q.dtype}: pygpt.ops.causal_attention lets none through")


@triton.jit
def _keep(seed_ptr, threshold, head, row, first_key, KEYS: tl.constexpr):
    """(rows, KEYS) booleans: which probabilities dropout keeps.

    Element (b, h, i, j) uses Philox4x32-10 (Salmon et al., 2011) with the seed as key and the counter
    ((j // 64) * 16 + j % 16, i, b * H + h, 0), of which it takes word (j // 16) % 4, and is kept if word >= threshold.
    """
    groups: tl.constexpr = (KEYS + 63) // 64
    counter = first_key // 64 * 16 + tl.arange(0, groups * 16)
    words = tl.philox(tl.load(seed_ptr), counter[None, :], row[:, None], head, 0)
    limit = threshold.to(tl.uint32)
    shape: tl.constexpr = [row.shape[0], groups, 16]
    a = tl.reshape((words[0] >= limit).to(tl.int8), shape)
    b = tl.reshape((words[1] >= limit).to(tl.int8), shape)
    c = tl.reshape((words[2] >= limit).to(tl.int8), shape)
    d = tl.reshape((words[3] >= limit).to(tl.int8), shape)
    if KEYS == 16:  # one of the four words
        word = first_key // 16 % 4
        ab, cd = tl.where(word == 1, b, a), tl.where(word == 3, d, c)
        together = tl.where(word >= 2, cd, ab)
    elif KEYS == 32:  # half a group: two of the four words
        second = first_key % 64 != 0
        halves = tl.join(tl.where(second, c, a), tl.where(second, d, b))
        together = tl.permute(halves, (0, 1, 3, 2))
    else:  # (row, group of 64, 16, low bit of the word, high bit) -> (row, group, high bit, low bit, 16)
        together = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 4, 3, 2))
    return tl.reshape(together, [row.shape[0], KEYS]) != 0


@triton.jit
def _program(sections, heads, blocks):
    """(head, n-th block to start) of this program: within a section of heads, all their first blocks come first."""
    program = tl.program_id(0)
    per_section = sections * blocks
    section = program // per_section
    width = tl.minimum(sections, heads - section * sections)
    within = program % per_section
    return section * sections + within % width, within // width


@triton.jit
def _tile(matrix, first, column, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK x BLOCK_D values from (first, column) on of a matrix, (pointer, rows, stride), of D columns; zero outside."""
    pointer, rows, stride = matrix
    d = column + tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK)
    # 64 bits for the tile's start alone: offsets within a tile are small, and the same for every tile of a loop.
    at = pointer + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if MASKED:
        return tl.load(at, mask=(row < rows - first)[:, None] & (d < D)[None, :], other=0.0)
    if D % BLOCK_D != 0:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _first_column(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first of the head's columns that this program writes: heads wider than a tile go to several programs, which
    all write the same statistics."""
    if D <= BLOCK_D:
        return 0
    return tl.program_id(2) * BLOCK_D


@triton.jit
def _product(
    a, b, a_matrix, b_matrix, a_first, b_first, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """a b' of two tiles; where these hold a part of the head's columns, over all of them, read again from the cache."""
    if D <= BLOCK_D:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    product = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    for column in range(0, D, BLOCK_D):
        a_part = _tile(a_matrix, a_first, column, D, BLOCK_D, a.shape[0], True)
        b_part = _tile(b_matrix, b_first, column, D, BLOCK_D, b.shape[0], True)
        product = tl.dot(a_part, tl.trans(b_part), product, input_precision=PRECISION)
    return product


@triton.jit
def _first_key(document_ptr, row, T, shift):
    """The first key that a query sees, in range whatever was given; a row beyond the last reads the last one's."""
    start = tl.load(document_ptr + tl.minimum(row, T - 1))
    return tl.minimum(tl.maximum(start, 0), row + shift)


@triton.jit
def _walk_keys(
    acc, total, top, q, queries, keys, values, first, column, row, document, low, high, shift, scale,
    seed_ptr, threshold, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, SPARSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes keys [low, high) into the running (acc, total, top). SPARSE: a row may see none of a block."""
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _tile(keys, start, column, D, BLOCK_D, KEYS, MASKED)
        scores = _product(q, k, queries, keys, first, start, D, BLOCK_D, PRECISION)
        if MASKED:
            seen = key[None, :] <= row[:, None] + shift
            if document is not None:
                seen = seen & (key[None, :] >= document[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
        origin = new_top
        if SPARSE:
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(scores * scale - origin[:, None])
        decay = tl.math.exp2(top - origin)
        total = total * decay + tl.sum(p, axis=1)
        acc = acc * decay[:, None]
        if seed_ptr is not None:
            p = tl.where(_keep(seed_ptr, threshold, head, row, start, KEYS), p, 0.0)
        v = _tile(values, start, column, D, BLOCK_D, KEYS, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["T", "S", "threshold", "sections", "keys_per_split"])
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, document_ptr, seed_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    B, H, T, S, scale, threshold, keep_scale, sections, keys_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, QUERIES)
    head, nth = _program(sections, B * H, blocks)
    first = (blocks - 1 - nth) * QUERIES  # the last queries see most keys
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = first + tl.arange(0, QUERIES)
    shift = S - T
    column = _first_column(D, BLOCK_D)
    queries = (q_ptr + (b * q_b + h * q_h), T, q_t)
    keys = (k_ptr + (b * k_b + h * k_h), S, k_t)
    values = (v_ptr + (b * v_b + h * v_h), S, v_t)
    q = _tile(queries, first, column, D, BLOCK_D, QUERIES, True)

    low = 0
    high = tl.minimum(first + QUERIES, T) + shift
    document = None
    if document_ptr is not None:
        document = _first_key(document_ptr + b * T, row, T, shift)
        low = _first_key(document_ptr + b * T, first, T, shift) // KEYS * KEYS
    split = tl.program_id(1)
    if SPLIT:
        low = tl.maximum(low, split * keys_per_split)
        high = tl.minimum(high, (split + 1) * keys_per_split)
    # Keys before `diagonal` are seen by every query of the block.
    diagonal = tl.minimum((first + shift + 1) // KEYS * KEYS, high)
    if document_ptr is not None:
        diagonal = low
    SPARSE: tl.constexpr = SPLIT or document_ptr is not None

    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    if document_ptr is None:
        acc, total, top = _walk_keys(
            acc, total, top, q, queries, keys, values, first, column, row, None, low, diagonal, shift, scale,
            seed_ptr, threshold, head, D, BLOCK_D, KEYS, False, False, PRECISION,
        )  # fmt: skip
    acc, total, top = _walk_keys(
        acc, total, top, q, queries, keys, values, first, column, row, document, tl.maximum(low, diagonal), high, shift,
        scale, seed_ptr, threshold, head, D, BLOCK_D, KEYS, True, SPARSE, PRECISION,
    )  # fmt: skip

    acc = acc * (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    lse = (top + tl.math.log2(total)) * LN_2
    d = column + tl.arange(0, BLOCK_D)
    out_row = ((split * B + b) * T + row.to(tl.int64)) * H + h
    tl.store(out_ptr + out_row[:, None] * D + d[None, :], acc.to(out_ptr.dtype.element_ty),
             mask=(row < T)[:, None] & (d < D)[None, :])  # fmt: skip
    tl.store(lse_ptr + (split.to(tl.int64) * B * H + head) * T + row, lse, mask=row < T)


@triton.jit(do_not_specialize=["T", "splits"])
def _combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr,
    B, H, T, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per row (b, h, t): the splits' outputs, weighted by their share of the softmax's sum."""
    program = tl.program_id(0).to(tl.int64)
    b, h, t = program // T // H, program // T % H, program % T
    d = tl.arange(0, BLOCK_D)
    rows = tl.num_programs(0).to(tl.int64)
    out_row = (b * T + t) * H + h
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    top = float("-inf")
    for split in range(splits):
        lse = tl.load(partial_lse_ptr + split * rows + program)
        new_top = tl.maximum(top, lse)
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, weight = tl.exp(top - origin), tl.exp(lse - origin)
        part = tl.load(partial_ptr + (split * rows + out_row) * D + d, mask=d < D, other=0.0)
        acc = acc * decay + part * weight
        total = total * decay + weight
        top = new_top
    tl.store(out_ptr + out_row * D + d, (acc / total).to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + program, top + tl.log(total))


@triton.jit
def _grad_q_blocks(
    acc, q, grad, lse, delta, queries, keys, values, grads, first, column, row, document, low, high, shift, scale,
    seed_ptr, threshold, keep_scale, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _tile(keys, start, column, D, BLOCK_D, KEYS, MASKED)
        v = _tile(values, start, column, D, BLOCK_D, KEYS, MASKED)
        scores = _product(q, k, queries, keys, first, start, D, BLOCK_D, PRECISION)
        p = tl.math.exp2(scores * scale - lse[:, None])
        if MASKED:
            seen = key[None, :] <= row[:, None] + shift
            if document is not None:
                seen = seen & (key[None, :] >= document[:, None])
            p = tl.where(seen, p, 0.0)
        grad_p = _product(grad, v, grads, values, first, start, D, BLOCK_D, PRECISION)
        if seed_ptr is not None:
            grad_p = tl.where(_keep(seed_ptr, threshold, head, row, start, KEYS), grad_p * keep_scale, 0.0)
        grad_scores = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "S", "threshold", "sections"])
def _attention_grad_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, document_ptr, seed_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, g_b, g_t, g_h,
    B, H, T, S, scale, threshold, keep_scale, sections,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q, and on the way delta = sum over D of out * grad, which the other kernel needs too."""
    blocks = tl.cdiv(T, QUERIES)
    head, nth = _program(sections, B * H, blocks)
    first = (blocks - 1 - nth) * QUERIES
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = first + tl.arange(0, QUERIES)
    shift = S - T
    column = _first_column(D, BLOCK_D)
    queries = (q_ptr + (b * q_b + h * q_h), T, q_t)
    keys = (k_ptr + (b * k_b + h * k_h), S, k_t)
    values = (v_ptr + (b * v_b + h * v_h), S, v_t)
    grads = (grad_ptr + (b * g_b + h * g_h), T, g_t)
    outs = (out_ptr + (b * o_b + h * o_h), T, o_t)
    q = _tile(queries, first, column, D, BLOCK_D, QUERIES, True)
    grad = _tile(grads, first, column, D, BLOCK_D, QUERIES, True)
    at = head.to(tl.int64) * T + row
    delta = tl.zeros([QUERIES], tl.float32)
    for part in tl.static_range(0, D, BLOCK_D):
        out = _tile(outs, first, part, D, BLOCK_D, QUERIES, True).to(tl.float32)
        delta += tl.sum(out * _tile(grads, first, part, D, BLOCK_D, QUERIES, True).to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=row < T)
    lse = tl.load(lse_ptr + at, mask=row < T, other=0.0) * LOG2_E

    high = tl.minimum(first + QUERIES, T) + shift
    diagonal = (first + shift + 1) // KEYS * KEYS
    document = None
    if document_ptr is not None:
        document = _first_key(document_ptr + b * T, row, T, shift)
        diagonal = _first_key(document_ptr + b * T, first, T, shift) // KEYS * KEYS
    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    if document_ptr is None:
        acc = _grad_q_blocks(
            acc, q, grad, lse, delta, queries, keys, values, grads, first, column, row, None, 0, diagonal, shift, scale,
            seed_ptr, threshold, keep_scale, head, D, BLOCK_D, KEYS, False, PRECISION,
        )  # fmt: skip
    acc = _grad_q_blocks(
        acc, q, grad, lse, delta, queries, keys, values, grads, first, column, row, document, diagonal, high, shift, scale,
        seed_ptr, threshold, keep_scale, head, D, BLOCK_D, KEYS, True, PRECISION,
    )  # fmt: skip
    d = column + tl.arange(0, BLOCK_D)
    out_row = (b * T + row.to(tl.int64)) * H + h
    tl.store(grad_q_ptr + out_row[:, None] * D + d[None, :], (acc * (scale * LN_2)).to(grad_q_ptr.dtype.element_ty),
             mask=(row < T)[:, None] & (d < D)[None, :])  # fmt: skip


@triton.jit
def _grad_kv_blocks(
    grad_k, grad_v, k, v, queries, keys, values, grads, lse_ptr, delta_ptr, document_ptr, key, first_key, column,
    low, high, shift, T, scale, seed_ptr, threshold, keep_scale, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries [low, high). Scores are transposed, (keys, queries), so that their products need no other transpose."""
    for start in range(low, high, QUERIES):
        row = start + tl.arange(0, QUERIES)
        q = _tile(queries, start, column, D, BLOCK_D, QUERIES, True)
        lse = tl.load(lse_ptr + row, mask=row < T, other=0.0) * LOG2_E
        scores = _product(k, q, keys, queries, first_key, start, D, BLOCK_D, PRECISION)
        p = tl.math.exp2(scores * scale - lse[None, :])
        if MASKED:
            seen = key[:, None] <= row[None, :] + shift
            if document_ptr is not None:
                document = _first_key(document_ptr, row, T, shift)
                seen = seen & (key[:, None] >= document[None, :])
            p = tl.where(seen, p, 0.0)
        grad = _tile(grads, start, column, D, BLOCK_D, QUERIES, True)
        delta = tl.load(delta_ptr + row, mask=row < T, other=0.0)
        grad_p = _product(v, grad, values, grads, first_key, start, D, BLOCK_D, PRECISION)
        kept_p = p
        if seed_ptr is not None:
            keep = tl.trans(_keep(seed_ptr, threshold, head, row, first_key, key.shape[0]))
            kept_p = tl.where(keep, p, 0.0)
            grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
        grad_v = tl.dot(kept_p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["T", "S", "threshold", "sections"])
def _attention_grad_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, document_ptr, seed_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    B, H, T, S, scale, threshold, keep_scale, sections,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, nth = _program(sections, B * H, tl.cdiv(S, KEYS))
    first = nth * KEYS  # the first keys are seen by most queries
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    key = first + tl.arange(0, KEYS)
    shift = S - T
    column = _first_column(D, BLOCK_D)
    queries = (q_ptr + (b * q_b + h * q_h), T, q_t)
    keys = (k_ptr + (b * k_b + h * k_h), S, k_t)
    values = (v_ptr + (b * v_b + h * v_h), S, v_t)
    grads = (grad_ptr + (b * g_b + h * g_h), T, g_t)
    k = _tile(keys, first, column, D, BLOCK_D, KEYS, True)
    v = _tile(values, first, column, D, BLOCK_D, KEYS, True)
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T

    low = tl.maximum(first - shift, 0) // QUERIES * QUERIES
    # From query `diagonal` on, every query sees every key of the block.
    diagonal = tl.cdiv(tl.maximum(first + KEYS - 1 - shift, 0), QUERIES) * QUERIES
    if document_ptr is not None:
        document_ptr += b * T
        left = low  # the first query whose document starts after this block: starts never decrease
        right = T + 0
        while left < right:
            middle = (left + right) // 2
            if _first_key(document_ptr, middle, T, shift) < first + KEYS:
                left = middle + 1
            else:
                right = middle + 0
        diagonal = left
    grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_k, grad_v = _grad_kv_blocks(
        grad_k, grad_v, k, v, queries, keys, values, grads, lse_ptr, delta_ptr, document_ptr, key, first, column, low,
        tl.minimum(diagonal, T), shift, T, scale, seed_ptr, threshold, keep_scale, head,
        D, BLOCK_D, QUERIES, True, PRECISION,
    )  # fmt: skip
    if document_ptr is None:
        grad_k, grad_v = _grad_kv_blocks(
            grad_k, grad_v, k, v, queries, keys, values, grads, lse_ptr, delta_ptr, None, key, first, column, diagonal,
            T, shift, T, scale, seed_ptr, threshold, keep_scale, head,
            D, BLOCK_D, QUERIES, False, PRECISION,
        )  # fmt: skip
    d = column + tl.arange(0, BLOCK_D)
    at = (((b * S + key.to(tl.int64)) * H + h) * D)[:, None] + d[None, :]
    inside = (key < S)[:, None] & (d < D)[None, :]
    tl.store(grad_k_ptr + at, (grad_k * (scale * LN_2)).to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_v_ptr + at, (grad_v * keep_scale).to(grad_v_ptr.dtype.element_ty), mask=inside)


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _whole(*tensors: Tensor) -> list[Tensor]:
    """With heads padded by zeros to a multiple of 16."""
    return [F.pad(x, (0, -x.shape[3] % 16)) for x in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _section(q: Tensor, k: Tensor) -> int:
    """Heads whose keys and values together take up at most half of the second-level cache."""
    S, D = k.shape[1], k.shape[3]
    return max(1, min(q.shape[0] * q.shape[2], l2_bytes(q) // 2 // max(1, 2 * S * D * k.element_size())))


def _splits(q: Tensor, k: Tensor, tile: Config) -> int:
    """Into how many parts the keys go: more than one where the query blocks alone leave the device idle."""
    programs = q.shape[0] * q.shape[2] * cdiv(q.shape[1], tile.queries)
    if programs >= multiprocessors(q) or k.shape[1] < 4 * tile.keys:
        return 1
    return min(2 * multiprocessors(q) // programs, k.shape[1] // (2 * tile.keys))


def _block_d(q: Tensor) -> int:
    """Columns of a tile: the whole head, but of wide float32 heads, of which no tile fits the registers, a part."""
    D, widest = q.shape[3], 64 if architecture(q) in LATER else 128
    return 64 if q.dtype == torch.float32 and widest < D else max(16, next_power_of_2(D))


def _dropout(dropout_p: float) -> tuple[int, float]:
    """(threshold as the bits of an int32, 1 / (1 - p))."""
    threshold = min(int(dropout_p * 2**32), 2**32 - 1)
    return (threshold if threshold < 2**31 else threshold - 2**32), (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


def _shared_options(q: Tensor, tile: Config) -> dict[str, Any]:
    D = q.shape[3]
    options = dict(
        D=D, BLOCK_D=_block_d(q), QUERIES=tile.queries, KEYS=tile.keys,
        PRECISION=("ieee" if torch.version.hip else "tf32x3") if q.dtype == torch.float32 else "tf32",  # good as float32
        num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
    return options if tile.registers is None else options | {"maxnreg": tile.registers}


def causal_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, T, H, D); k, v (B, S, H, D), S >= T; any strides -> out (B, T, H, D), lse (B, H, T) float32.

    document_start: int32 (B, T), not decreasing along T: a query's first key, for documents packed in a row; clamped to
    0 .. i + S - T for query i.
    """
    if q.shape[3] % 16:  # slow, but right: rows that are not aligned make the kernels spill
        out, lse = causal_attention_forward(*_whole(q, k, v), scale, dropout_p, seed, document_start)
        return out[..., : q.shape[3]].contiguous(), lse
    if scale <= 0:  # the kernel takes the maximum of the scores before it scales them
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = _unit_last(q), _unit_last(k), _unit_last(v)
    (B, T, H, D), S = q.shape, k.shape[1]
    out, lse = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse.fill_(float("-inf"))
    tile = choose(FORWARD, q, seed is not None)
    splits = _splits(q, k, tile)
    keys_per_split = cdiv(cdiv(S, splits), tile.keys) * tile.keys
    splits = cdiv(S, keys_per_split)
    into, into_lse = out, lse
    if splits > 1:
        into, into_lse = q.new_empty(splits, *out.shape, dtype=torch.float32), lse.new_empty(splits, *lse.shape)
    threshold, keep_scale = _dropout(dropout_p) if seed is not None else (0, 1.0)
    _attention_forward_kernel[(B * H * cdiv(T, tile.queries), splits, cdiv(D, _block_d(q)))](
        q, k, v, into, into_lse, None if document_start is None else document_start.contiguous(), seed,
        *_strides(q, k, v), B, H, T, S, scale * LOG2_E.value, threshold, keep_scale, _section(q, k), keys_per_split,
        SPLIT=splits > 1, **_shared_options(q, tile),
    )  # fmt: skip
    if splits > 1:
        block = max(16, next_power_of_2(D))
        _combine_kernel[(B * H * T,)](
            into, into_lse, out, lse, B, H, T, splits, D=D, BLOCK_D=block, num_warps=1, **FUSED
        )
    return out, lse


def causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float,
    seed: Tensor | None, document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> grad_q, grad_k, grad_v, contiguous, in the inputs' dtype."""
    if q.shape[3] % 16:
        grads = causal_attention_backward(*_whole(grad, q, k, v, out), lse, scale, dropout_p, seed, document_start)
        return tuple(x[..., : q.shape[3]].contiguous() for x in grads)  # type: ignore[return-value]
    grad, q, k, v, out = (_unit_last(x) for x in (grad, q, k, v, out))
    (B, T, H, D), S = q.shape, k.shape[1]
    grad_q, grad_k, grad_v = q.new_empty(B, T, H, D), k.new_empty(B, S, H, D), v.new_empty(B, S, H, D)
    if out.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    document_start = None if document_start is None else document_start.contiguous()
    threshold, keep_scale = _dropout(dropout_p) if seed is not None else (0, 1.0)
    numbers = (B, H, T, S, scale * LOG2_E.value, threshold, keep_scale, _section(q, k))
    tile = choose(GRAD_Q, q, seed is not None)
    _attention_grad_q_kernel[(B * H * cdiv(T, tile.queries), 1, cdiv(D, _block_d(q)))](
        q, k, v, out, grad, lse, delta, grad_q, document_start, seed,
        *_strides(q, k, v, out, grad), *numbers, **_shared_options(q, tile),
    )  # fmt: skip
    tile = choose(GRAD_KV, q, seed is not None)
    _attention_grad_kv_kernel[(B * H * cdiv(S, tile.keys), 1, cdiv(D, _block_d(q)))](
        q, k, v, grad, lse, delta, grad_k, grad_v, document_start, seed,
        *_strides(q, k, v, grad), *numbers, **_shared_options(q, tile),
    )  # fmt: skip
    return grad_q, grad_k, grad_v
