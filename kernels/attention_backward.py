"""causal_attention's gradients in Triton (see attention.py), FlashAttention-2's (Dao, 2023).

The probabilities are recomputed from the log-sum-exp, once by query blocks (grad_q) and once by key blocks (grad_k,
grad_v), so that each gradient has a single writer: no atomics, same inputs, same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from pygpt.kernels.device import cdiv

# Every configuration that can be chosen; tests/test_triton_compile.py walks these tables and accepts no spilled register.
GRAD_Q = (  # the kernel that owns query blocks in backward
    Row(16, 64, MANY, HOPPER, False, Config(64, 64, 4, 3)),
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
    Row(16, 64, MANY, HOPPER, False, Config(64, 64, 4, 3)),
    Row(16, 64, MANY, HOPPER, True, Config(64, 128, 8, 2)),
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


@triton.jit
def _grad_q_blocks(
    acc, q, grad, lse, delta, queries, keys, values, grads, first, column, row, document, low, high, shift, scale,
    seed_ptr, threshold, keep_scale, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_tile(keys, start, column, D, BLOCK_D, KEYS, MASKED)
        v = load_tile(values, start, column, D, BLOCK_D, KEYS, MASKED)
        scores = dot_rows(q, k, queries, keys, first, start, D, BLOCK_D, PRECISION)
        p = tl.math.exp2(scores * scale - lse[:, None])
        if MASKED:
            seen = key[None, :] <= row[:, None] + shift
            if document is not None:
                seen = seen & (key[None, :] >= document[:, None])
            p = tl.where(seen, p, 0.0)
        grad_p = dot_rows(grad, v, grads, values, first, start, D, BLOCK_D, PRECISION)
        if seed_ptr is not None:
            grad_p = tl.where(kept(seed_ptr, threshold, head, row, start, KEYS), grad_p * keep_scale, 0.0)
        grad_scores = p * (grad_p - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["T", "S", "threshold", "sections"])
def _attention_grad_q_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, delta_ptr, grad_q_ptr, document_ptr, seed_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h, g_b, g_t, g_h, dq_b, dq_t, dq_h,
    B, H, T, S, scale, threshold, keep_scale, sections,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q, and on the way delta = sum over D of out * grad, which the other kernel needs too."""
    blocks = tl.cdiv(T, QUERIES)
    head, nth = place(sections, B * H, blocks)
    first = (blocks - 1 - nth) * QUERIES
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    row = first + tl.arange(0, QUERIES)
    shift = S - T
    column = first_column(D, BLOCK_D)
    queries = (q_ptr + (b * q_b + h * q_h), T, q_t)
    keys = (k_ptr + (b * k_b + h * k_h), S, k_t)
    values = (v_ptr + (b * v_b + h * v_h), S, v_t)
    grads = (grad_ptr + (b * g_b + h * g_h), T, g_t)
    outs = (out_ptr + (b * o_b + h * o_h), T, o_t)
    q = load_tile(queries, first, column, D, BLOCK_D, QUERIES, True)
    grad = load_tile(grads, first, column, D, BLOCK_D, QUERIES, True)
    at = head.to(tl.int64) * T + row
    delta = tl.zeros([QUERIES], tl.float32)
    for part in tl.static_range(0, D, BLOCK_D):
        out = load_tile(outs, first, part, D, BLOCK_D, QUERIES, True).to(tl.float32)
        delta += tl.sum(out * load_tile(grads, first, part, D, BLOCK_D, QUERIES, True).to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=row < T)
    lse = tl.load(lse_ptr + at, mask=row < T, other=0.0) * LOG2_E

    high = tl.minimum(first + QUERIES, T) + shift
    diagonal = (first + shift + 1) // KEYS * KEYS
    document = None
    if document_ptr is not None:
        document = first_key_of(document_ptr + b * T, row, T, shift)
        diagonal = first_key_of(document_ptr + b * T, first, T, shift) // KEYS * KEYS
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
    at = (b * dq_b + h * dq_h + row.to(tl.int64) * dq_t)[:, None] + d[None, :]
    tl.store(grad_q_ptr + at, (acc * (scale * LN_2)).to(grad_q_ptr.dtype.element_ty),
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
        q = load_tile(queries, start, column, D, BLOCK_D, QUERIES, True)
        lse = tl.load(lse_ptr + row, mask=row < T, other=0.0) * LOG2_E
        scores = dot_rows(k, q, keys, queries, first_key, start, D, BLOCK_D, PRECISION)
        p = tl.math.exp2(scores * scale - lse[None, :])
        if MASKED:
            seen = key[:, None] <= row[None, :] + shift
            if document_ptr is not None:
                document = first_key_of(document_ptr, row, T, shift)
                seen = seen & (key[:, None] >= document[None, :])
            p = tl.where(seen, p, 0.0)
        grad = load_tile(grads, start, column, D, BLOCK_D, QUERIES, True)
        delta = tl.load(delta_ptr + row, mask=row < T, other=0.0)
        grad_p = dot_rows(v, grad, values, grads, first_key, start, D, BLOCK_D, PRECISION)
        kept_p = p
        if seed_ptr is not None:
            keep = tl.trans(kept(seed_ptr, threshold, head, row, first_key, key.shape[0]))
            kept_p = tl.where(keep, p, 0.0)
            grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
        grad_v = tl.dot(kept_p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["T", "S", "threshold", "sections"])
def _attention_grad_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, document_ptr, seed_ptr,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, dk_b, dk_t, dk_h,
    B, H, T, S, scale, threshold, keep_scale, sections,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v, which have the same strides."""
    head, nth = place(sections, B * H, tl.cdiv(S, KEYS))
    first = nth * KEYS  # the first keys are seen by most queries
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    key = first + tl.arange(0, KEYS)
    shift = S - T
    column = first_column(D, BLOCK_D)
    queries = (q_ptr + (b * q_b + h * q_h), T, q_t)
    keys = (k_ptr + (b * k_b + h * k_h), S, k_t)
    values = (v_ptr + (b * v_b + h * v_h), S, v_t)
    grads = (grad_ptr + (b * g_b + h * g_h), T, g_t)
    k = load_tile(keys, first, column, D, BLOCK_D, KEYS, True)
    v = load_tile(values, first, column, D, BLOCK_D, KEYS, True)
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
            if first_key_of(document_ptr, middle, T, shift) < first + KEYS:
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
    at = (b * dk_b + h * dk_h + key.to(tl.int64) * dk_t)[:, None] + d[None, :]
    inside = (key < S)[:, None] & (d < D)[None, :]
    tl.store(grad_k_ptr + at, (grad_k * (scale * LN_2)).to(grad_k_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_v_ptr + at, (grad_v * keep_scale).to(grad_v_ptr.dtype.element_ty), mask=inside)


def causal_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, dropout_p: float,
    seed: Tensor | None, document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> grad_q, grad_k, grad_v, contiguous, in the inputs' dtype."""
    if q.shape[3] % 16:
        grads = causal_attention_backward(*padded(grad, q, k, v, out), lse, scale, dropout_p, seed, document_start)
        return tuple(x[..., : q.shape[3]].contiguous() for x in grads)  # type: ignore[return-value]
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    _write_gradients(grad_q, grad_k, grad_v, grad, q, k, v, out, lse, scale, dropout_p, seed, document_start)
    return grad_q, grad_k, grad_v


def causal_attention_qkvpacked_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, n_head: int, scale: float, dropout_p: float,
    seed: Tensor | None, document_start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same of a packed projection -> grad_qkv (B, T, 3C), contiguous."""
    q, k, v = by_head(qkv, n_head)
    D = q.shape[3]
    tensors = (grad.view(q.shape), q, k, v, out.view(q.shape))
    if D % 16:
        tensors = padded(*tensors)
    packed = q.new_empty(*q.shape[:2], 3, *tensors[1].shape[2:])
    _write_gradients(*packed.unbind(2), *tensors, lse, scale, dropout_p, seed, document_start)
    return packed[..., :D].flatten(2).contiguous()


def _write_gradients(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, scale: float, dropout_p: float, seed: Tensor | None, document_start: Tensor | None,
) -> None:  # fmt: skip
    """The backward operators but for their results' memory, in which grad_k and grad_v have the same strides."""
    grad, q, k, v, out = (unit_last(x) for x in (grad, q, k, v, out))
    (B, T, H, D), S = q.shape, k.shape[1]
    if out.numel() == 0:
        grad_k.zero_()
        grad_v.zero_()
        return
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    document_start = None if document_start is None else document_start.contiguous()
    threshold, keep_scale = dropout_numbers(dropout_p) if seed is not None else (0, 1.0)
    numbers = (B, H, T, S, scale * LOG2_E.value, threshold, keep_scale, heads_in_section(q, k))
    tile = choose(GRAD_Q, q, seed is not None)
    _attention_grad_q_kernel[(B * H * cdiv(T, tile.queries), 1, cdiv(D, block_d(q)))](
        q, k, v, out, grad, lse, delta, grad_q, document_start, seed,
        *strides(q, k, v, out, grad, grad_q), *numbers, **shared_options(q, tile),
    )  # fmt: skip
    tile = choose(GRAD_KV, q, seed is not None)
    _attention_grad_kv_kernel[(B * H * cdiv(S, tile.keys), 1, cdiv(D, block_d(q)))](
        q, k, v, grad, lse, delta, grad_k, grad_v, document_start, seed,
        *strides(q, k, v, grad, grad_k), *numbers, **shared_options(q, tile),
    )  # fmt: skip
