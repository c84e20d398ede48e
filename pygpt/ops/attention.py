"""Causal self-attention that never builds the T x S matrix (Dao et al., 2022: FlashAttention; Dao, 2023).

Dropout is made by a counter-based generator (Philox4x32-10: Salmon et al., 2011), so that the mask is a function of the
seed and of each element's place alone: backward makes it again instead of keeping it, and every backend drops the same
elements. `dropout_mask` is its definition in plain integer arithmetic.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError, InputTypeError
from pygpt.ops import backends
from pygpt.ops.autograd import differentiable
from pygpt.ops.checks import check_device, check_floating

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*KERNEL_DTYPES, torch.float16)
MAX_HEAD_DIM = 256  # of the compiled kernels; larger heads run the reference
backends.register("causal_attention", cpp=KERNEL_DTYPES, cuda=GPU_DTYPES)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    document_start: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v per head, where query i sees the keys 0 .. i + S - T (the last query sees all).

    q: (B, T, H, D); k, v: (B, S, H, D) with S >= T: they may be a cache that ends with the queries' own keys.
    All of one floating-point dtype and device; any strides (views of a packed qkv projection are read in place).
    scale: 1 / sqrt(D) unless given. dropout_p, in [0, 1): probability of dropping an attention weight; the mask comes
    from one draw of torch's default generator per call.
    document_start: int32 (B, T): query i sees no key before document_start[b, i], an index into the S keys of its row, so
    that documents packed in one row, or padding before a prompt, stay apart; cost falls with the documents' length. A start
    below 0 counts as 0, one after i + S - T, the query's own key, as that key. Starts must not decrease along T: the CPU
    kernels raise RuntimeError where they do; elsewhere the rows concerned are unspecified.
    Returns (B, T, H, D), contiguous, in q's dtype.
    Raises InputError (a ValueError) for shapes, devices and settings, InputTypeError (a TypeError) for dtypes.
    """
    op = "causal_attention"
    _check(op, q, k, v, dropout_p)
    if document_start is not None:
        check_documents(op, document_start, q)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    seed = draw_seed(q.device) if dropout_p > 0.0 else None
    if _backend(op, q, q.shape[-1]) == "eager":
        return causal_attention_reference(q, k, v, scale, dropout_p, seed, document_start)
    return _causal_attention(q, k, v, scale, dropout_p, seed, document_start)[0]


def causal_attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    scale: float | None = None,
    dropout_p: float = 0.0,
    document_start: Tensor | None = None,
) -> Tensor:
    """`causal_attention` of a packed projection: q, k and v lie side by side in each row, of n_head heads each.

    qkv: (B, T, 3C), C = n_head * D. Returns (B, T, C), contiguous, in its dtype. The other arguments and the errors are those
    of `causal_attention`, the results too: they are those of qkv.view(B, T, 3, n_head, D).unbind(2), a copy less in backward,
    where the gradients of q, k and v are written side by side.
    """
    op = "causal_attention_qkvpacked"
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        raise InputError(
            f"{op}: qkv must be (B, T, 3C), C a multiple of n_head, got {tuple(qkv.shape)} and n_head {n_head}"
        )
    head_dim = qkv.shape[2] // (3 * n_head)
    _check_settings(op, qkv, head_dim, dropout_p)
    if document_start is not None:
        check_documents(op, document_start, qkv)
    if _backend(op, qkv, head_dim) == "eager":
        B, T, _ = qkv.shape
        q, k, v = qkv.view(B, T, 3, n_head, head_dim).unbind(2)
        return causal_attention(q, k, v, scale, dropout_p, document_start).flatten(2)
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    seed = draw_seed(qkv.device) if dropout_p > 0.0 else None
    return _causal_attention_qkvpacked(qkv, n_head, scale, dropout_p, seed, document_start)[0]


def _backend(op: str, x: Tensor, head_dim: int) -> str:
    """Which backend answers for tensors like x. Raises InputError where a forced one cannot."""
    backend = backends.choose("causal_attention", x)
    if backend == "eager" or head_dim <= MAX_HEAD_DIM:
        return backend
    if backends.forced() == backend:
        raise InputError(
            f"{op}: backend '{backend}' was asked for and serves head dimensions up to {MAX_HEAD_DIM} in "
            f"{str(x.dtype)[6:]}, got {head_dim}; use smaller heads, or drop use_backend / PYGPT_BACKEND"
        )
    return "eager"


def causal_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    document_start: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, differentiable, any dtype and device; arguments as in `causal_attention`.

    Without dropout this is torch's scaled_dot_product_attention: what a PyTorch user has today. With dropout (which
    needs a seed, see `draw_seed`) the matrix is built, in float32 or better, so that the mask is ours.
    """
    T, S = q.shape[1], k.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, D)
    if dropout_p == 0.0:
        # Under its flag for causal, torch makes NaN of a scale that is not positive.
        if document_start is None and (T == 1 or (T == S and (scale is None or scale > 0))):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=scale)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=_visible(T, S, q.device, document_start), scale=scale
            )
        return out.transpose(1, 2).contiguous()
    if seed is None:
        raise InputError("causal_attention_reference: dropout needs a seed; draw_seed() makes one")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale  # (B, H, T, S)
    weights = scores.masked_fill(~_visible(T, S, q.device, document_start), -math.inf).softmax(dim=-1)
    keep = dropout_mask(seed, (q.shape[0], q.shape[1], T, S), dropout_p)
    out = torch.where(keep, weights / (1.0 - dropout_p), 0.0) @ v.to(wide)
    return out.to(q.dtype).transpose(1, 2).contiguous()


def _visible(T: int, S: int, device: torch.device, document_start: Tensor | None) -> Tensor:
    """Which keys each query sees: (T, S), or (B, 1, T, S) with documents."""
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if document_start is None:
        return causal
    own = torch.arange(S - T, S, device=device)
    return causal & (torch.arange(S, device=device) >= document_start.minimum(own)[:, None, :, None])


# --- dropout -------------------------------------------------------------------------------------------------------


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A dropout seed, int64 of shape (1,), from the device's default generator: torch.manual_seed makes it repeat."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_mask(seed: Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """Which attention weights stay, bool of shape (B, H, T, S): a function of (seed, b * H + h, query, key) alone.

    The counter is (j // 64 * 16 + j % 16, i, b * H + h, 0) for query i and key j, the key is the seed's low and high 32
    bits, and the random word is number j // 16 % 4; the element stays if that word is at least floor(dropout_p * 2^32).
    """
    B, H, T, S = shape
    blocks = -(-S // 64)
    counter = [
        torch.arange(blocks * 16, device=seed.device).view(1, 1, -1),
        torch.arange(T, device=seed.device).view(1, -1, 1),
        torch.arange(B * H, device=seed.device).view(-1, 1, 1),
        torch.zeros(1, 1, 1, dtype=torch.int64, device=seed.device),
    ]
    words = philox4x32(
        torch.broadcast_tensors(*counter), (seed & _LOW, (seed >> 32) & _LOW)
    )  # 4 of (B * H, T, blocks * 16)
    by_key = torch.stack([word.view(B * H, T, blocks, 16) for word in words], dim=3)
    return by_key.view(B, H, T, blocks * 64)[..., :S] >= int(dropout_p * 2**32)


_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...] | list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32 with 10 rounds: four words of 32 bits, in int64 tensors, from a counter and a key of such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high2, low2 = _multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def _multiply_wide(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # High and low 32 bits of a * m, by 16-bit halves of a: the whole product would overflow int64.
    low = (a & 0xFFFF) * m
    high = (a >> 16) * m + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


# --- checks, fake functions and autograd formula of the compiled operators -----------------------------------------


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"{op}: q must be (B, T, H, D) and k, v (B, S, H, D), "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if k.shape[1] < q.shape[1]:
        raise InputError(
            f"{op}: {q.shape[1]} queries but only {k.shape[1]} keys; the keys include those of the queries (S >= T)"
        )
    _check_settings(op, q, q.shape[3], dropout_p)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise InputTypeError(f"{op}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    check_device(op, q, k=k, v=v)


def _check_settings(op: str, x: Tensor, head_dim: int, dropout_p: float) -> None:
    if head_dim == 0:
        raise InputError(f"{op}: {tuple(x.shape)} has an empty head dimension")
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    check_floating(op, x)


def check_documents(op: str, document_start: Tensor, q: Tensor) -> None:
    """document_start is int32 (B, T) on the device of q (B, T, ...)."""
    if document_start.shape != q.shape[:2]:
        raise InputError(
            f"{op}: document_start must be (B, T) = {tuple(q.shape[:2])}, got {tuple(document_start.shape)}"
        )
    if document_start.dtype != torch.int32:
        raise InputTypeError(f"{op}: document_start must be int32, got {document_start.dtype}")
    check_device(op, q, document_start=document_start)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    document_start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _qkvpacked_forward_fake(qkv: Tensor, n_head: int, *settings: Any) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def _qkvpacked_backward_fake(grad: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale, ctx.dropout_p, seed, document_start = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, seed, document_start)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None, None, None
    *saved, seed, document_start = ctx.saved_tensors
    grads = torch.ops.pygpt.causal_attention_backward.default(
        grad, *saved, ctx.scale, ctx.dropout_p, seed, document_start
    )
    return *grads, None, None, None, None


def _qkvpacked_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, ctx.n_head, ctx.scale, ctx.dropout_p, seed, document_start = inputs
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, seed, document_start)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _qkvpacked_backward(ctx, grad, grad_lse):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None, None
    *saved, seed, document_start = ctx.saved_tensors
    grad_qkv = torch.ops.pygpt.causal_attention_qkvpacked_backward.default(
        grad, *saved, ctx.n_head, ctx.scale, ctx.dropout_p, seed, document_start
    )
    return grad_qkv, None, None, None, None, None


if backends.extension is not None:
    torch.library.register_fake("pygpt::causal_attention_backward", _backward_fake)
    torch.library.register_fake("pygpt::causal_attention_qkvpacked_backward", _qkvpacked_backward_fake)
    _causal_attention = differentiable("causal_attention_forward", _forward_fake, _setup, _backward)
    _causal_attention_qkvpacked = differentiable(
        "causal_attention_qkvpacked_forward", _qkvpacked_forward_fake, _qkvpacked_setup, _qkvpacked_backward
    )
