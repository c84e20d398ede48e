"""The CUDA kernels, run on the emulated device, against float64 references.

The operators are those of the CUDA library, host side included, registered for CPU tensors as pygpt_emulated::*. Each
case runs under several orders of threads and blocks.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import (
    ATTENTION_SHAPES,
    DOCUMENT_CASES,
    DOCUMENTS,
    EMBEDDING_SHAPES,
    GELU_SHAPES,
    LAYER_NORM_SHAPES,
    TOLERANCE,
    assert_close,
    document_starts,
    double,
    leaf,
    new_memory_is_nan,
)
from cuda_emulation import build
from test_attention import explicit

from pygpt.ops.attention import dropout_mask

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    (path,) = build.build("emulation.so")
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=[0, 1, 2], ids="seed{}".format)
def op(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulated operators, under one order of threads and blocks; of attention the portable kernels."""
    monkeypatch.setenv("PYGPT_CUDA_HOPPER", "0")
    library.emulation_set_seed(ctypes.c_uint64(request.param))
    return torch.ops.pygpt_emulated


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return leaf(*shape, dtype=dtype, seed=seed).detach()


# Each kernel, with more rows than its blocks: of a warp (72; 768 with 24 elements a thread), of several, on both sides of where
# they begin (520, 776), of long rows (4104; 12,288 the longest in registers), and without 16-byte loads (12,296, 1023).
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *LAYER_NORM_SHAPES,
        (9, 72),
        (40, 512),
        (40, 520),
        (3, 776),
        (19, 1608),
        (2, 4096),
        (5, 4104),
        (5, 12288),
        (2, 12296),
        (2, 1023),
    ],
    ids=str,
)
def test_layer_norm(op, shape, dtype):
    C = shape[-1]
    floor = 3.0 if C == 1 else 1e-3
    x, residual, grad, grad_sum = (random(*shape, dtype=dtype, seed=i) for i in range(4))
    for weight_dtype, with_bias in ((dtype, True), (torch.float32, False)):
        weight = random(C, dtype=weight_dtype, seed=4)
        bias = random(C, dtype=weight_dtype, seed=5) if with_bias else None
        y, mean, rstd = op.layer_norm_forward(x, weight, bias, 1e-5)
        grads = op.layer_norm_backward(grad, x, weight, mean, rstd, with_bias)
        compare_layer_norm(x, weight, bias, y, grad, grads, None, dtype, floor)

        y, total, mean, rstd = op.add_layer_norm_forward(x, residual, weight, bias, 1e-5)
        assert_close(total, x.double() + residual.double(), dtype, "sum")
        assert torch.equal(total, x + residual)
        grads = op.add_layer_norm_backward(grad, grad_sum, total, weight, mean, rstd, with_bias)
        compare_layer_norm(total, weight, bias, y, grad, grads, grad_sum, dtype, floor)


def compare_layer_norm(x, weight, bias, y, grad, grads, grad_sum, dtype, floor):
    rx, rw = double(x).requires_grad_(), double(weight).requires_grad_()
    rb = None if bias is None else double(bias).requires_grad_()
    ry = F.layer_norm(rx, rw.shape, rw, rb)
    assert_close(y, ry, dtype, "y")
    outputs, cotangents = [ry], [grad.double()]
    if grad_sum is not None:
        outputs, cotangents = [ry, rx * 1.0], [grad.double(), grad_sum.double()]
    torch.autograd.backward(outputs, cotangents)
    assert_close(grads[0], rx.grad, dtype, "grad x", floor)
    assert_close(grads[1], rw.grad, dtype, "grad weight", floor)
    if bias is not None:
        assert_close(grads[2], rb.grad, dtype, "grad bias", floor)


def test_layer_norm_of_views_and_unaligned_storage(op):
    for start in (0, 1, 8):  # elements: 1 breaks the alignment of 16-byte loads
        x = random(4, 3 * 64 + start, dtype=torch.bfloat16)[:, start : start + 64]
        flat = random(4 * 64 + start, dtype=torch.bfloat16)[start:].view(4, 64)
        weight = random(64 + start, dtype=torch.bfloat16, seed=1)[start:]
        for rows in (x, flat, flat.t().contiguous().t()):
            y, _, _ = op.layer_norm_forward(rows, weight, None, 1e-5)
            assert_close(y, F.layer_norm(rows.double(), (64,), weight.double()), torch.bfloat16)


def test_layer_norm_large_mean_keeps_its_variance(op):
    for C in (256, 255):
        x = random(4, C, dtype=torch.float32) + 3000.0
        y, _, _ = op.layer_norm_forward(x, torch.ones(C), None, 1e-5)
        assert_close(y, F.layer_norm(x.double(), (C,)), torch.bfloat16)


# Rows beside each other in a block and rows of several blocks; more rows than partial sums; C with and without 16-byte
# accesses; sizes that end within what a thread takes.
GELUS = [(0, 8), (300, 8), (37, 264), (2, 3072), (5, 2056), (2, 1023), (1000, 3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*GELU_SHAPES, *GELUS], ids=str)
def test_gelu(op, shape, dtype):
    x, grad = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    bias = random(shape[-1], dtype=dtype, seed=2) if shape else None
    for scale in (1e-4, 1.0, 30.0):
        compare_gelu(op, (x * scale).to(dtype), grad, bias)
    for start in (1, 8):  # elements: 1 breaks the alignment of 16-byte accesses
        moved = torch.cat([torch.zeros(start, dtype=dtype), x.flatten()])[start:].view(shape)
        compare_gelu(op, moved, grad, bias)
    if shape and shape[-1] > 1:
        compare_gelu(op, torch.cat([x, x], -1)[..., 1 : 1 + shape[-1]], grad, bias)


def compare_gelu(op, x, grad, bias=None):
    dtype, reference = x.dtype, double(x).requires_grad_()
    expected = F.gelu(reference, approximate="tanh")
    (wanted,) = torch.autograd.grad(expected, reference, grad.double())
    assert_close(op.gelu_forward(x), expected, dtype, "y", 1e-6)
    assert_close(op.gelu_backward(grad, x), wanted, dtype, "grad x")
    if bias is None:
        return
    shift = double(bias).requires_grad_()
    expected = F.gelu(reference + shift, approximate="tanh")
    wanted = torch.autograd.grad(expected, (reference, shift), grad.double())
    assert_close(op.bias_gelu_forward(x, bias), expected, dtype, "y with bias")
    for name, g, w in zip(["grad x with bias", "grad bias"], op.bias_gelu_backward(grad, x, bias), wanted, strict=True):
        assert_close(g, w, dtype, name)


def test_gelu_far_from_zero(op):
    far = torch.tensor([20.0, 1e3, 1e13, 1e20, 3e38])
    x = torch.cat([far, -far, torch.tensor([torch.inf, 0.0, -0.0])])
    y, slope = op.gelu_forward(x), op.gelu_backward(torch.ones_like(x), x)
    torch.testing.assert_close(y, x.clamp(min=0), rtol=0, atol=1e-30)
    torch.testing.assert_close(slope, torch.cat([(x[:-2] > 0).float(), torch.full((2,), 0.5)]), rtol=0, atol=1e-30)
    nan = torch.full((9,), torch.nan)
    assert op.gelu_forward(nan).isnan().all()
    assert op.gelu_backward(torch.ones(9), nan).isnan().all()


# V below and above one digit of the sort; tokens in one tile and in several; C with and without 16-byte accesses.
EMBEDDINGS = [
    *EMBEDDING_SHAPES,
    (3, 17, 300, 72),
    (1, 40, 1, 16),
    (2, 700, 70000, 7),
    (1, 33, 11, 2056),
    (64, 2, 65536, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", EMBEDDINGS, ids=str)
def test_embedding(op, sizes, dtype):
    B, T, V, C = sizes
    offset = 2
    generator = torch.Generator().manual_seed(B * T)
    idx = torch.randint(V, (B, T), generator=generator)
    idx = torch.where(torch.rand(B, T, generator=generator) < 0.4, V // 2, idx)  # one id in very many places
    token, position, grad = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(V, C), (T + 3, C), (B, T, C)]))
    out = op.embedding_forward(idx, token, position, offset)
    assert_close(out, token.double()[idx] + position.double()[offset : offset + T], dtype, "out")
    assert torch.equal(op.embedding_forward(idx, token, None, 0), token[idx])

    for table_dtype in {dtype, torch.float32}:
        start = random(V, C, dtype=table_dtype, seed=5), random(T + 3, C, dtype=table_dtype, seed=6)
        grads = [g.clone() for g in start]
        op.embedding_backward_(grad, idx, grads[0], grads[1], offset)
        wanted = [g.double() for g in start]
        wanted[0].index_put_((idx,), grad.double(), accumulate=True)
        wanted[1][offset : offset + T] += grad.double().sum(0)
        assert_close(grads[0], wanted[0], table_dtype, "token grad")
        assert_close(grads[1], wanted[1], table_dtype, "position grad")
        without = start[0].clone()
        op.embedding_backward_(grad, idx, without, None, 0)
        assert torch.equal(without, grads[0])


def test_embedding_of_ids_out_of_range(op):
    idx = torch.tensor([[0, -1, 4, 5, 2**40, 3]])
    token, grad = random(5, 8, dtype=torch.float32), random(1, 6, 8, dtype=torch.float32, seed=1)
    out = op.embedding_forward(idx, token, None, 0)[0]
    assert torch.isnan(out[[1, 3, 4]]).all()
    assert torch.equal(out[[0, 2, 5]], token[[0, 4, 3]])
    token_grad = torch.zeros(5, 8)
    op.embedding_backward_(grad, idx, token_grad, None, 0)
    wanted = torch.zeros(5, 8)
    wanted[[0, 4, 3]] = grad[0, [0, 2, 5]]
    assert torch.equal(token_grad, wanted)


ATTENTIONS = [
    *ATTENTION_SHAPES,
    (2, 70, 70, 2, 8),
    (1, 190, 190, 1, 64),
    (1, 100, 165, 2, 128),
    (1, 66, 130, 1, 72),
    (3, 1, 700, 2, 64),
    (1, 9, 9, 1, 136),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_attention(op, shape, dtype, dropout_p):
    B, T, S, H, D = shape
    q, k, v, grad = (random(B, n, H, D, dtype=dtype, seed=i) for i, n in enumerate([T, S, S, T]))
    compare_attention(op, q, k, v, grad, dropout_p)


@pytest.mark.parametrize(("dtype", "D"), [(DTYPES[1], 64), (DTYPES[2], 40), (DTYPES[0], 64), (DTYPES[1], 33)], ids=str)
@pytest.mark.parametrize(("name", "T"), DOCUMENT_CASES)
def test_attention_of_documents(op, name, T, D, dtype):
    rows = DOCUMENTS[name]
    B, S = len(rows), sum(rows[0])
    q, k, v, grad = (random(B, n, 1, D, dtype=dtype, seed=i) for i, n in enumerate([T, S, S, T]))
    compare_attention(op, q, k, v, grad, 0.25 if D == 40 else 0.0, document_start=document_starts(rows, T))


@pytest.mark.parametrize("D", [64, 33])
def test_attention_of_starts_out_of_range(op, D):
    T, S = 70, 90
    own = torch.arange(S - T, S, dtype=torch.int32)
    starts = torch.stack([torch.full((T,), -(2**31)), torch.full((T,), 2**31 - 1), own, own + 1, own - 1]).int()
    starts[0, T // 2 :] = 2**31 - 1
    q, k, v, grad = (random(5, n, 1, D, dtype=torch.bfloat16, seed=i) for i, n in enumerate([T, S, S, T]))
    for given in (starts, starts.t().contiguous().t()):
        compare_attention(op, q, k, v, grad, document_start=given)
    # Decreasing: no promise but to stay in bounds (run_kernels checks that under sanitizers) and finite.
    given = starts.flip(1)
    out, lse = op.causal_attention_forward(q, k, v, 0.1, 0.0, None, given)
    grads = op.causal_attention_backward(grad, q, k, v, out, lse, 0.1, 0.0, None, given)
    assert all(torch.isfinite(t).all() for t in (out, lse, *grads))


def compare_attention(op, q, k, v, grad, dropout_p=0.0, scale=None, document_start=None):
    B, T, H, D = q.shape
    dtype, scale = q.dtype, 1 / math.sqrt(D) if scale is None else scale
    seed = torch.tensor([-0x123456789ABCDEF]) if dropout_p else None
    keep = dropout_mask(seed, (B, H, T, k.shape[1]), dropout_p) if dropout_p else None
    out, lse = op.causal_attention_forward(q, k, v, scale, dropout_p, seed, document_start)
    leaves = [double(t).requires_grad_() for t in (q, k, v)]
    reference, reference_lse = explicit(*leaves, scale, keep, dropout_p, document_start)
    assert out.is_contiguous()
    assert_close(out, reference, dtype, "out")
    assert_close(lse, reference_lse, torch.float32, "lse")
    grads = op.causal_attention_backward(grad, q, k, v, out, lse, scale, dropout_p, seed, document_start)
    wanted = torch.autograd.grad(reference, leaves, grad.double())
    for name, g, w in zip("qkv", grads, wanted, strict=True):
        # As in test_attention: dS is a difference of numbers of size sqrt(D) / (1 - p), one of them from the rounded output,
        # and is itself rounded to the dtype before the product with a row of k, whose largest elements are near 4.
        rounded = dtype != torch.float32 or k.shape[1] == 1 or document_start is not None
        floor = 4 * abs(scale) * math.sqrt(D) / (1 - dropout_p) if rounded and name != "v" else 0.0
        assert_close(g, w, dtype, f"grad {name}", max(floor, 1e-2))
        # Such elements are few, and on the whole the error is a rounding; unless most of what few queries see is themselves.
        alone = document_start is not None and q.shape[1] < 8
        if k.shape[1] > 8 and not alone and w.abs().max() > 1e-2:
            error = (g.double() - w).norm() / w.norm()
            assert error < TOLERANCE[dtype], f"grad {name}: relative error of the whole {error:.2g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["packed", "heads first", "every second", "cache", "unaligned"])
def test_attention_of_views(op, layout, dtype):
    B, T, S, H, D = 2, 70, 90, 2, 64
    q, k, v = (random(B, n, H, D, dtype=dtype, seed=i) for i, n in enumerate([T, S, S]))
    if layout == "packed":
        q, k, v = random(B, T, 3 * H * D, dtype=dtype).view(B, T, 3, H, D).unbind(2)
    elif layout == "heads first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif layout == "every second":
        q, k, v = (random(B, n, H, 2 * D, dtype=dtype, seed=i)[..., ::2] for i, n in enumerate([T, S, S]))
    elif layout == "cache":
        k, v = (random(B, S + 17, H, D, dtype=dtype, seed=i)[:, :S] for i in (1, 2))
    else:
        q, k, v = (random(B, n, H, D + 1, dtype=dtype, seed=i)[..., 1:] for i, n in enumerate([T, S, S]))
    grad = random(B, q.shape[1], H, D, dtype=dtype, seed=7)
    for scale in (None, -0.3):
        compare_attention(op, q, k, v, grad, 0.1, scale)
    compare_attention(op, q, k, v, random(1, 1, 1, 1, dtype=dtype).expand(q.shape))  # what sum() hands to backward


class Packed:
    """The operators of a packed projection, as those of q, k and v."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def causal_attention_forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any) -> Any:
        out, lse = self.op.causal_attention_qkvpacked_forward(pack(q, k, v), q.shape[2], *settings)
        return out.view(q.shape), lse

    def causal_attention_backward(self, grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        q, k, v, out, lse, *settings = arguments
        with new_memory_is_nan():
            packed = self.op.causal_attention_qkvpacked_backward(
                grad.flatten(2), pack(q, k, v), out.flatten(2), lse, q.shape[2], *settings
            )
        assert packed.shape == (*q.shape[:2], 3 * q.shape[2] * q.shape[3])
        assert packed.is_contiguous()
        return packed.unflatten(2, (3, *q.shape[2:])).unbind(2)


def pack(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.stack([q, k, v], 2).flatten(2)


# Rows of 16-byte pieces and others, a sequence within a tile and one of several.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 3, 64), (1, 130, 2, 128), (2, 40, 2, 40), (2, 70, 3, 33)], ids=str)
def test_attention_of_a_packed_projection(op, shape, dtype):
    B, T, H, D = shape
    q, k, v = random(B, T, 3, H, D, dtype=dtype).unbind(2)
    grad = random(*shape, dtype=dtype, seed=7)
    for dropout_p in (0.0, 0.25):
        compare_attention(Packed(op), q, k, v, grad, dropout_p)
    compare_attention(Packed(op), q, k, v, grad, document_start=document_starts([[3, T - 3], [T]][:B]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "part of a row", "part of a column"])
def test_attention_of_a_packed_projection_that_is_a_view(op, layout, dtype):
    B, T, H, D = 2, 40, 2, 64
    width = 3 * H * D
    if layout == "transposed":
        qkv = random(width, T, B, dtype=dtype).permute(2, 1, 0)
    elif layout == "part of a row":
        qkv = random(B, T, width + 5, dtype=dtype)[..., 2:-3]
    else:
        qkv = random(T + 4, B, width, dtype=dtype)[2:-2].transpose(0, 1)
    grad = random(1, 1, 1, dtype=dtype).expand(B, T, H * D)  # what sum() hands to backward
    out, lse = op.causal_attention_qkvpacked_forward(qkv, H, 0.125, 0.0, None)
    packed = op.causal_attention_qkvpacked_backward(grad, qkv, out, lse, H, 0.125, 0.0, None)
    q, k, v = qkv.unflatten(2, (3, H, D)).unbind(2)
    expected, expected_lse = op.causal_attention_forward(q, k, v, 0.125, 0.0, None)
    by_head = grad.unflatten(2, (H, D))
    grads = op.causal_attention_backward(by_head, q, k, v, expected, expected_lse, 0.125, 0.0, None)
    assert torch.equal(out, expected.flatten(2))
    assert torch.equal(lse, expected_lse)
    assert torch.equal(packed, pack(*grads))


def test_attention_of_nothing(op):
    for B, T, S, H in [(0, 4, 4, 2), (2, 0, 0, 2), (2, 4, 9, 0), (2, 0, 5, 2)]:
        q, k, v = (random(B, n, H, 16, dtype=torch.bfloat16) for n in (T, S, S))
        out, lse = op.causal_attention_forward(q, k, v, 0.25, 0.0, None)
        grads = op.causal_attention_backward(out, q, k, v, out, lse, 0.25, 0.0, None)
        assert out.shape == q.shape
        assert torch.equal(grads[1], torch.zeros_like(k))
        assert torch.equal(grads[2], torch.zeros_like(v))
        if T == S and H:
            out, lse = op.causal_attention_qkvpacked_forward(pack(q, k, v), H, 0.25, 0.0, None)
            assert out.shape == (B, T, 16 * H)
            packed = op.causal_attention_qkvpacked_backward(out, pack(q, k, v), out, lse, H, 0.25, 0.0, None)
            assert packed.shape == (B, T, 3 * 16 * H)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_decoding_equals_one_pass(op, dtype):
    q, k, v = (random(1, 330, 2, 64, dtype=dtype, seed=i) for i in range(3))
    whole, _ = op.causal_attention_forward(q, k, v, 0.125, 0.0, None)
    for begin, end in [(0, 70), (70, 71), (71, 73), (200, 201), (201, 264), (329, 330)]:
        out, _ = op.causal_attention_forward(q[:, begin:end], k[:, :end], v[:, :end], 0.125, 0.0, None)
        assert_close(out, whole[:, begin:end], dtype, f"queries {begin} to {end}")


def test_attention_of_large_scores(op):
    for dtype in DTYPES:
        q, k, v = (40 * random(1, 100, 2, 64, dtype=dtype, seed=i) for i in range(3))
        out, lse = op.causal_attention_forward(q, k, v, 1.0, 0.0, None)
        grads = op.causal_attention_backward(torch.ones_like(out), q, k, v, out, lse, 1.0, 0.0, None)
        assert all(torch.isfinite(t).all() for t in (out, lse, *grads))
        exact, _ = explicit(q.double(), k.double(), v.double(), 1.0)
        assert ((out.double() - exact).abs() < 0.02 * exact.abs().max()).double().mean() > 0.99


def test_same_bits_under_every_order(library):
    x, grad, weight = (random(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(37, 96), (37, 96), (96,)]))
    results = []
    for seed in range(4):
        library.emulation_set_seed(ctypes.c_uint64(seed))
        y, mean, rstd = torch.ops.pygpt_emulated.layer_norm_forward(x, weight, weight, 1e-5)
        grads = torch.ops.pygpt_emulated.layer_norm_backward(grad, x, weight, mean, rstd, True)
        grads += torch.ops.pygpt_emulated.bias_gelu_backward(grad, x, weight)
        results.append(torch.cat([y.flatten(), mean, rstd, *(g.flatten() for g in grads)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_bad_shapes_are_errors_that_name_the_operator(op):
    with pytest.raises(RuntimeError, match=r"layer_norm_forward: weight must be \(C,\)"):
        op.layer_norm_forward(torch.ones(2, 8), torch.ones(7), None, 1e-5)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        op.layer_norm_forward(torch.ones(2, 8).double(), torch.ones(8), None, 1e-5)
    for bias in (torch.ones(7), torch.ones(8, 1), torch.ones(8).half()):
        with pytest.raises(RuntimeError, match="bias_gelu_forward: bias must"):
            op.bias_gelu_forward(torch.ones(2, 8), bias)
    with pytest.raises(RuntimeError, match="bias_gelu_backward: grad must match x"):
        op.bias_gelu_backward(torch.ones(8), torch.ones(2, 8), torch.ones(8))
    x = torch.ones(2, 6, 1, 8)
    for starts in (torch.zeros(2, 6), torch.zeros(2, 5).int(), torch.zeros(12).int()):
        with pytest.raises(RuntimeError, match=r"document_start must be int32 \(B, T\)"):
            op.causal_attention_forward(x, x, x, 1.0, 0.0, None, starts)
    qkv, out, lse = torch.zeros(2, 6, 24), torch.zeros(2, 6, 8), torch.zeros(2, 1, 6)
    for n_head in (0, 3):
        with pytest.raises(RuntimeError, match=r"qkvpacked_forward: qkv must be \(B, T, 3C\), C a multiple of n_head"):
            op.causal_attention_qkvpacked_forward(qkv, n_head, 1.0, 0.0, None)
    for grad in (out[:, :5], out[..., :7], out.view(2, 6, 1, 8)):
        with pytest.raises(RuntimeError, match=r"qkvpacked_backward: grad and out must be \(B, T, C\)"):
            op.causal_attention_qkvpacked_backward(grad, qkv, out, lse, 1, 1.0, 0.0, None)


def test_a_launch_that_fails_names_the_operator_and_the_shape(op):
    C = 65536 * 128 + 1  # columns that take more blocks than the grid's second dimension has
    with pytest.raises(RuntimeError, match=rf"bias_gelu_forward of \(1, {C}\): CUDA error: invalid configuration"):
        op.bias_gelu_forward(torch.zeros(1, C, dtype=torch.float16), torch.zeros(C, dtype=torch.float16))
