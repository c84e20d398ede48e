"""causal_attention in Triton: softmax(q k' * scale) v causally masked, the scores never in memory.

FlashAttention-2's (Dao, 2023): a program owns a block of queries and walks over the key blocks that it may see, with a
running maximum and sum; blocks above the diagonal are skipped and only those on it are masked. Long rows start first, so
that short ones fill the tail; heads go in sections whose keys and values stay in the second-level cache. With few queries and
many keys (decoding) the keys are split among programs, and a second kernel combines the shares. A float32 head too wide
for the registers goes to several programs: each writes a part of its columns, and computes the scores, over all of them,
anew. Backward is attention_backward.py, what both share attention_tile.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.attention_backward import causal_attention_backward as causal_attention_backward
from pygpt.kernels.attention_backward import causal_attention_qkvpacked_backward as causal_attention_qkvpacked_backward
from pygpt.kernels.attention_tile import (
    ANY,
    HOPPER,
    LATER,
    LN_2,
    LOG2_E,
    MANY,
    Config,
    Row,
    block_d,
    by_head,
    choose,
    dot_rows,
    dropout_numbers,
    first_column,
    first_key_of,
    heads_in_section,
    kept,
    load_tile,
    padded,
    place,
    shared_options,
    strides,
    unit_last,
)
from pygpt.kernels.device import FUSED, cdiv, multiprocessors, next_power_of_2

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
        k = load_tile(keys, start, column, D, BLOCK_D, KEYS, MASKED)
        scores = dot_rows(q, k, queries, keys, first, start, D, BLOCK_D, PRECISION)
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
            p = tl.where(kept(seed_ptr, threshold, head, row, start, KEYS), p, 0.0)
        v = load_tile(values, start, column, D, BLOCK_D, KEYS, MASKED)
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
    head, nth = place(sections, B * H, blocks)
    first = (blocks - 1 - nth) * QUERIES  # the last queries see most keys
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = first + tl.arange(0, QUERIES)
    shift = S - T
    column = first_column(D, BLOCK_D)
    queries = (q_ptr + (b * q_b + h * q_h), T, q_t)
    keys = (k_ptr + (b * k_b + h * k_h), S, k_t)
    values = (v_ptr + (b * v_b + h * v_h), S, v_t)
    q = load_tile(queries, first, column, D, BLOCK_D, QUERIES, True)

    low = 0
    high = tl.minimum(first + QUERIES, T) + shift
    document = None
    if document_ptr is not None:
        document = first_key_of(document_ptr + b * T, row, T, shift)
        low = first_key_of(document_ptr + b * T, first, T, shift) // KEYS * KEYS
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


def _splits(q: Tensor, k: Tensor, tile: Config) -> int:
    """Into how many parts the keys go: more than one where the query blocks alone leave the device idle."""
    programs = q.shape[0] * q.shape[2] * cdiv(q.shape[1], tile.queries)
    if programs >= multiprocessors(q) or k.shape[1] < 4 * tile.keys:
        return 1
    return min(2 * multiprocessors(q) // programs, k.shape[1] // (2 * tile.keys))


def causal_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, T, H, D); k, v (B, S, H, D), S >= T; any strides -> out (B, T, H, D), lse (B, H, T) float32.

    document_start: int32 (B, T), not decreasing along T: a query's first key, for documents packed in a row; clamped to
    0 .. i + S - T for query i.
    """
    if q.shape[3] % 16:  # slow, but right: rows that are not aligned make the kernels spill
        out, lse = causal_attention_forward(*padded(q, k, v), scale, dropout_p, seed, document_start)
        return out[..., : q.shape[3]].contiguous(), lse
    if scale <= 0:  # the kernel takes the maximum of the scores before it scales them
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    q, k, v = unit_last(q), unit_last(k), unit_last(v)
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
    threshold, keep_scale = dropout_numbers(dropout_p) if seed is not None else (0, 1.0)
    _attention_forward_kernel[(B * H * cdiv(T, tile.queries), splits, cdiv(D, block_d(q)))](
        q, k, v, into, into_lse, None if document_start is None else document_start.contiguous(), seed,
        *strides(q, k, v), B, H, T, S, scale * LOG2_E.value, threshold, keep_scale, heads_in_section(q, k), keys_per_split,
        SPLIT=splits > 1, **shared_options(q, tile),
    )  # fmt: skip
    if splits > 1:
        block = max(16, next_power_of_2(D))
        _combine_kernel[(B * H * T,)](
            into, into_lse, out, lse, B, H, T, splits, D=D, BLOCK_D=block, num_warps=1, **FUSED
        )
    return out, lse


def causal_attention_qkvpacked_forward(
    qkv: Tensor, n_head: int, scale: float, dropout_p: float, seed: Tensor | None, document_start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same of a packed projection: qkv (B, T, 3C) -> out (B, T, C), lse (B, H, T) float32."""
    out, lse = causal_attention_forward(*by_head(qkv, n_head), scale, dropout_p, seed, document_start)
    return out.flatten(2), lse
