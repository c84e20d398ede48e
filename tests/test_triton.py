"""The Triton kernels against float64, straight through their host functions.

Without a CUDA device they run in Triton's interpreter (see conftest.py): the same program, block by block, in NumPy.
With one they run on it. tests/test_gpu.py adds what only a GPU can show.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import (
    ATTENTION_SHAPES,
    CROSS_ENTROPY_SHAPES,
    DOCUMENT_CASES,
    DOCUMENTS,
    EMBEDDING_SHAPES,
    GELU_SHAPES,
    LAYER_NORM_SHAPES,
    VOCABULARIES,
    assert_close,
    cross_entropy_rows_case,
    document_starts,
    new_memory_is_nan,
)

triton = pytest.importorskip("triton", reason="triton is not installed: the Triton kernels are not tested")

from pygpt import kernels, ops  # noqa: E402
from pygpt.kernels import attention as katt  # noqa: E402
from pygpt.kernels import attention_backward as kgrad  # noqa: E402
from pygpt.kernels import attention_tile as ktile  # noqa: E402
from pygpt.kernels import cross_entropy as kce  # noqa: E402
from pygpt.kernels import embedding as kemb  # noqa: E402
from pygpt.kernels import gelu as kgelu  # noqa: E402
from pygpt.kernels import layer_norm as kln  # noqa: E402
from pygpt.ops import backends  # noqa: E402
from pygpt.ops import cross_entropy as ops_cross_entropy  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

if DEVICE == "cpu":
    import triton_interpreter  # noqa: F401 - bfloat16 as on a GPU


def draw(*shape: int, dtype: torch.dtype = F32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)


def reference(*tensors: torch.Tensor | None) -> list[torch.Tensor]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def in_turn(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Each shape with one dtype: the interpreter is slow, and what shapes are hard for depends little on the dtype."""
    return [(shape, (F32, BF16, F16)[at % 3]) for at, shape in enumerate(shapes)]


LAYER_NORM_CASES = [
    *in_turn(LAYER_NORM_SHAPES), ((37, 17), BF16), ((150, 64), BF16), ((70, 768), BF16), ((9, 1600), BF16),
    ((5, 4097), F32), ((19, 8200), F32), ((6, 12288), BF16), ((3, 16500), BF16),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), LAYER_NORM_CASES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_layer_norm(shape, dtype, with_bias):
    C = shape[-1]
    x, weight, grad = draw(*shape, dtype=dtype), draw(C, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    bias = draw(C, dtype=dtype, seed=3) if with_bias else None
    y, mean, rstd = kln.layer_norm_forward(x, weight, bias, 1e-5)
    grads = kln.layer_norm_backward(grad, x, weight, mean, rstd, with_bias)
    rx, rw, rb = reference(x, weight, bias)
    ry = F.layer_norm(rx, (C,), rw, rb)
    ry.backward(grad.double())
    floor = 3.0 if C == 1 else 1e-3  # one column: gradients are exactly 0, roundings times 1 / sqrt(eps)
    assert_close(y, ry, dtype, "y")
    assert_close(mean, rx.mean(-1).flatten(), F32, "mean")
    for name, actual, expected in zip(["x", "weight"], grads, [rx.grad, rw.grad], strict=False):
        assert_close(actual, expected, dtype, f"grad {name}", floor)
    if with_bias:
        assert_close(grads[2], rb.grad, dtype, "grad bias", floor)
    else:
        assert grads[2].numel() == 0


@pytest.mark.parametrize(
    ("shape", "dtype"), [*in_turn(LAYER_NORM_SHAPES), ((7, 33), F32), ((10, 8200), BF16), ((3, 20001), F32)], ids=str
)
def test_add_layer_norm(shape, dtype):
    C = shape[-1]
    x, residual, grad, grad_sum = (draw(*shape, dtype=dtype, seed=i) for i in range(4))
    weight, bias = draw(C, seed=4), draw(C, seed=5)  # float32 weights, whatever x is
    y, total, mean, rstd = kln.add_layer_norm_forward(x, residual, weight, bias, 1e-5)
    grads = kln.add_layer_norm_backward(grad, grad_sum, total, weight, mean, rstd, True)
    rt, rw, rb = reference(x + residual, weight, bias)
    ry = F.layer_norm(rt, (C,), rw, rb)
    torch.autograd.backward([ry, rt * 1.0], [grad.double(), grad_sum.double()])
    assert torch.equal(total, x + residual)
    assert_close(y, ry, dtype, "y")
    for name, actual, expected in zip(["x", "weight", "bias"], grads, [rt.grad, rw.grad, rb.grad], strict=True):
        assert_close(actual, expected, dtype, f"grad {name}")
    assert grads[1].dtype == F32


def test_layer_norm_of_strided_and_shifted_rows():
    x, weight = draw(24, 40)[:, ::2] + 3000.0, draw(20, seed=1)  # E[x^2] - E[x]^2 would lose every digit
    y, mean, rstd = kln.layer_norm_forward(x, weight, None, 1e-5)
    assert_close(y, F.layer_norm(x.double(), (20,), weight.double()), BF16)
    grad = draw(20, 24, seed=2).t()
    rx, rw = reference(x, weight)
    F.layer_norm(rx, (20,), rw).backward(grad.double())
    assert_close(kln.layer_norm_backward(grad, x, weight, mean, rstd, False)[0], rx.grad, BF16)


def embedding_case(ids, V, C, dtype, grad_dtype=None, offset=3):
    """Forward and backward into gradients that already hold something."""
    idx = torch.as_tensor(ids, device=DEVICE)
    B, T = idx.shape
    tokens, positions = draw(V, C, dtype=dtype), draw(T + offset + 2, C, dtype=dtype, seed=1)
    out = kemb.embedding_forward(idx, tokens, positions, offset)
    rt, rp = reference(tokens.cpu(), positions.cpu())  # torch's own backward of no columns reads out of bounds on a GPU
    expected = F.embedding(idx.cpu(), rt) + rp[offset : offset + T]
    assert_close(out.cpu(), expected, dtype, "out")
    assert torch.equal(kemb.embedding_forward(idx, tokens, None, 0).cpu(), F.embedding(idx.cpu(), tokens.cpu()))
    grad = draw(B, T, C, dtype=dtype, seed=2)
    before, position_before = draw(V, C, dtype=grad_dtype or dtype, seed=3), draw(T + offset + 2, C, dtype=F32, seed=4)
    token_grad, position_grad = before.clone(), position_before.clone()
    kemb.embedding_backward_(grad, idx, token_grad, position_grad, offset)
    expected.backward(grad.double().cpu())
    assert_close(token_grad.cpu(), rt.grad + before.double().cpu(), grad_dtype or dtype, "token grad")
    assert_close(position_grad.cpu(), rp.grad + position_before.double().cpu(), F32, "position grad")
    again = before.clone()
    kemb.embedding_backward_(grad, idx, again, None, 0)
    assert torch.equal(again, token_grad)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *in_turn(EMBEDDING_SHAPES),
        ((3, 37, 4, 8), F32),
        ((2, 24, 6, 16), F16),
        ((1, 18, 9, 140), F32),
    ],
    ids=str,
)
def test_embedding(shape, dtype):
    B, T, V, C = shape
    embedding_case(torch.randint(V, (B, T), generator=torch.Generator().manual_seed(B)), V, C, dtype)


@pytest.mark.parametrize("run", [15, 16, 17, 31, 32, 33, 47, 100])
def test_embedding_of_a_hot_token_at_every_place_of_a_piece(run):
    # Sorted, id 5 takes up `run` positions from position 9 on; then single tokens, the last table row among them.
    ids = [[0] * 4 + [1] * 3 + [3, 4] + [5] * run + list(range(6, 40))]
    embedding_case(ids, 40, 8, F32)


def test_embedding_adds_bf16_gradients_into_a_float32_table():
    embedding_case([[2, 2, 2, 0, 7, 7, 2, 1]], 9, 24, BF16, grad_dtype=F32)


def test_embedding_of_one_hot_token_alone():
    embedding_case([[3] * 300], 5, 4, F32)


def test_embedding_leaves_out_ids_outside_the_vocabulary():
    idx = torch.tensor([[0, -1, 2, 4, 2**40, 2]], device=DEVICE)
    out = kemb.embedding_forward(idx, draw(4, 6), None, 0)
    assert out.isnan().all(dim=2).tolist() == [[False, True, False, True, True, False]]
    grad, token_grad = torch.ones(1, 6, 6, device=DEVICE), torch.zeros(4, 6, device=DEVICE)
    grad[0, 1] = float("inf")
    kemb.embedding_backward_(grad, idx, token_grad, None, 0)
    assert token_grad[:, 0].tolist() == [1, 0, 2, 0]


def philox4x32(counter, key):
    """Philox4x32-10 on uint32 arrays: counter (4, ...), key (2,) -> words (4, ...)."""
    c = [np.asarray(x, np.uint64) for x in counter]
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k0, high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ k1, low & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(*c))


def test_philox_of_the_tests_is_the_published_generator():
    ones = 0xFFFFFFFF  # known answers that Random123 (Salmon et al., 2011) is distributed with
    assert [hex(w) for w in philox4x32([0] * 4, [0, 0])] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(w) for w in philox4x32([ones] * 4, [ones] * 2)] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


def dropout_mask(seed: int, p: float, B: int, H: int, T: int, S: int) -> torch.Tensor:
    """(B, H, T, S): 1 / (1 - p) where the element is kept, else 0."""
    seed %= 2**64
    head, i, j = np.ogrid[: B * H, :T, :S]
    words = philox4x32([(j // 64) * 16 + j % 16, i, head, 0], [seed & 0xFFFFFFFF, seed >> 32])
    word = np.take_along_axis(words, np.broadcast_to((j // 16) % 4, words.shape[1:])[None], 0)[0]
    keep = word >= np.uint64(int(p * 2**32))
    return torch.from_numpy(keep.reshape(B, H, T, S) / (1 - p)).to(DEVICE)


def attention_reference(q, k, v, scale, document=None, dropout=None):
    """(out, lse): plain softmax, (B, T, H, D)."""
    T, S = q.shape[1], k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if document is not None:
        seen = seen & (torch.arange(S, device=q.device) >= document[:, None, :, None])
    scores = scores.masked_fill(~seen, float("-inf"))
    p = scores.softmax(-1) if dropout is None else scores.softmax(-1) * dropout
    return torch.einsum("bhts,bshd->bthd", p, v), scores.logsumexp(-1)


def attention_case(q, k, v, scale=0.3, dropout_p=0.0, seed=None, document=None):
    """Output, log-sum-exp and every gradient; these twice, with the same bits, where they can be side by side in one tensor."""
    B, T, H, _ = q.shape
    dtype = q.dtype
    seed_tensor = None if seed is None else torch.tensor([seed], device=DEVICE)
    out, lse = katt.causal_attention_forward(q, k, v, scale, dropout_p, seed_tensor, document)
    rq, rk, rv = reference(q, k, v)
    mask = None if seed is None else dropout_mask(seed, dropout_p, B, H, T, k.shape[1])
    expected, expected_lse = attention_reference(rq, rk, rv, scale, document, mask)
    assert out.dtype == dtype
    assert_close(out, expected, dtype, "out")
    assert_close(lse, expected_lse, BF16 if dtype != F32 else F32, "lse")
    grad = draw(*q.shape, dtype=dtype, seed=9)
    saved = (grad, q, k, v, out, lse, scale, dropout_p, seed_tensor, document)
    grads = kgrad.causal_attention_backward(*saved)
    expected.backward(grad.double())
    for name, actual, r in zip("qkv", grads, (rq, rk, rv), strict=True):
        # A query that sees few keys has small gradients, of which mostly roundings are left: see test_cuda_kernels.
        few_keys = document is not None and name != "v"
        floor = 4 * abs(scale) * q.shape[3] ** 0.5 / (1 - dropout_p) if few_keys else 1e-3
        assert_close(actual, r.grad, dtype, f"grad {name}", floor)
    with new_memory_is_nan():
        if k.shape[1] == T:
            side_by_side = torch.cat([x.flatten(2) for x in (q, k, v)], 2)
            out_c, lse_c = katt.causal_attention_qkvpacked_forward(
                side_by_side, q.shape[2], scale, dropout_p, seed_tensor, document
            )
            assert torch.equal(out_c, out.flatten(2))
            assert torch.equal(lse_c, lse)
            packed = kgrad.causal_attention_qkvpacked_backward(
                grad.flatten(2), side_by_side, out_c, lse, q.shape[2], scale, dropout_p, seed_tensor, document
            )
            assert packed.is_contiguous()
            again = packed.unflatten(2, (3, q.shape[2], -1)).unbind(2)
        else:
            again = kgrad.causal_attention_backward(*saved)
    for first, second in zip(grads, again, strict=True):
        assert torch.equal(first, second)


def qkv(B, T, S, H, D, dtype=F32, scale=1.0):
    return [draw(B, n, H, D, dtype=dtype, seed=i, scale=scale) for i, n in enumerate((T, S, S))]


ATTENTION_CASES = [
    *((shape, F32 if shape[4] < 64 else dtype) for shape, dtype in in_turn(ATTENTION_SHAPES)),
    ((1, 17, 17, 3, 5), F32), ((1, 200, 200, 1, 64), BF16), ((1, 131, 131, 1, 96), F16), ((1, 100, 100, 1, 128), F32),
    ((2, 5, 77, 1, 32), BF16), ((1, 40, 40, 1, 144), BF16), ((0, 4, 4, 2, 8), F32),
    ((1, 40, 40, 1, 129), F32), ((1, 33, 50, 1, 200), F32), ((1, 2, 140, 1, 256), F32),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "dtype"), ATTENTION_CASES, ids=str)
def test_attention(shape, dtype):
    attention_case(*qkv(*shape, dtype))


@pytest.mark.parametrize("T", [1, 3])
def test_attention_decode_splits_the_keys(T):
    q, k, v = qkv(1, T, 531, 1, 16)
    tile = ktile.choose(katt.FORWARD, q, False)
    assert DEVICE == "cuda" or katt._splits(q, k, tile) > 1
    attention_case(q, k, v)


@pytest.mark.parametrize(
    ("T", "S", "D", "dtype"), [(130, 130, 16, F32), (130, 130, 64, BF16), (9, 200, 16, F32)], ids=str
)
def test_attention_dropout_is_the_documented_generator(T, S, D, dtype):
    attention_case(*qkv(1, T, S, 2, D, dtype), dropout_p=0.3, seed=-(2**40) - 12345)


@pytest.mark.parametrize(("name", "T"), DOCUMENT_CASES)
def test_attention_of_documents(name, T):
    rows = DOCUMENTS[name]
    starts = document_starts(rows, T).to(DEVICE)
    attention_case(*qkv(len(rows), T, sum(rows[0]), 1, 16), document=starts)
    if name != "borders of tiles":  # four rows take the interpreter long
        attention_case(*qkv(len(rows), T, sum(rows[0]), 1, 16, BF16), dropout_p=0.2, seed=5, document=starts)


@pytest.mark.parametrize(("T", "S"), [(40, 70), (3, 531)])
def test_attention_of_starts_out_of_range(T, S):
    own = torch.arange(S - T, S, device=DEVICE)
    starts = torch.stack([torch.full_like(own, -(2**31)), torch.full_like(own, 2**31 - 1), own + 1]).int()
    starts[0, T // 2 :] = 2**31 - 1
    q, k, v = qkv(3, T, S, 1, 16)
    out, lse = katt.causal_attention_forward(q, k, v, 0.3, 0.0, None, starts)
    clamped = starts.long().clamp(min=0).minimum(own)
    expected, expected_lse = attention_reference(*reference(q, k, v), 0.3, clamped)
    assert_close(out, expected, F32, "out")
    assert_close(lse, expected_lse, F32, "lse")
    attention_case(q, k, v, document=clamped.int())
    grads = (
        kgrad.causal_attention_backward(out, q, k, v, out, lse, 0.3, 0.0, None, d) for d in (starts, clamped.int())
    )
    for given, wanted in zip(*grads, strict=True):
        assert torch.equal(given, wanted)


def test_attention_of_views():
    packed = draw(2, 40, 3, 3, 24)
    attention_case(*packed.unbind(2))  # the rows of one projection
    q, k, v = (draw(2, 3, 40, 24, seed=i).transpose(1, 2) for i in range(3))
    attention_case(q, k, v)
    attention_case(q.expand(2, 40, 3, 24), k[..., ::2].repeat(1, 1, 1, 2), v.flip(1))


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
def test_attention_scales(scale):
    attention_case(*qkv(1, 70, 70, 1, 16), scale=scale)


def test_attention_of_large_scores():
    q, k, v = qkv(1, 90, 90, 1, 16, scale=30.0)  # scores in the thousands: exp alone would overflow
    out, _ = katt.causal_attention_forward(q, k, v, 1.0, 0.0, None)
    assert_close(out, attention_reference(*(x.double() for x in (q, k, v)), 1.0)[0], F16)


def test_attention_of_wide_float32_heads_with_documents_and_dropout():
    starts = document_starts([[20, 1, 29], [50]]).to(DEVICE)
    attention_case(*qkv(2, 50, 50, 1, 160), document=starts, dropout_p=0.2, seed=5)
    packed = draw(1, 40, 3, 2, 192)
    attention_case(*packed.unbind(2))


@pytest.fixture
def triton_answers():
    """The project's operators on this device, answered by the Triton kernels."""
    if backends.extension is None:
        pytest.skip("pygpt._C is not built: there are no operators to answer")
    if DEVICE == "cuda":
        with backends.use_backend("triton"):
            yield
        return
    library = torch.library.Library("pygpt", "IMPL", "CPU")
    for module, names in kernels.OPERATORS.values():
        for name in names:
            library.impl(name, getattr(importlib.import_module(f"pygpt.kernels.{module}"), name))
    with backends.use_backend(
        "cpp"
    ):  # the column of CPU tensors: its registrations are overridden while this one lives
        yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:.*verrid")
def test_operators_through_the_dispatcher(triton_answers, monkeypatch):
    """Schemas, autograd formulas and aliasing fit: a small block through the public ops, against float64."""
    calls = []
    for module, name in (
        (kln, "_forward"),
        (kln, "_backward"),
        (katt, "strides"),
        (kgrad, "strides"),
        (kemb, "_pieces_kernel"),
        (kgelu, "_columns"),
    ):
        monkeypatch.setattr(module, name, _Recorder(getattr(module, name), name, calls))

    def block(idx, wte, wpe, weight, bias, project, o):
        x = o.embedding(idx, wte, wpe, 1)
        y = o.layer_norm(x, weight, bias)
        q, k, v = (y @ project).unflatten(2, (3, 2, 8)).unbind(2)
        attended = o.causal_attention(q, k, v) + o.causal_attention(q, k, v, document_start=starts)
        y, x = o.add_layer_norm(attended.flatten(2), x, weight, bias)
        return (o.gelu(x) * y).sum()

    inputs = [draw(11, 16), draw(9, 16, seed=1), draw(16, seed=2), draw(16, seed=3), draw(16, 48, seed=4, scale=0.3)]
    idx = torch.tensor([[1, 2, 3, 1, 10], [0, 0, 0, 0, 5]], device=DEVICE)
    starts = document_starts([[2, 3], [1, 4]]).to(DEVICE)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = [t.clone().double().requires_grad_() for t in inputs]
    result = block(idx, *leaves, ops)
    result.backward()
    assert set(calls) == {"_forward", "_backward", "strides", "_pieces_kernel", "_columns"}
    with backends.use_backend("eager"):
        reference_result = block(idx, *expected, ops)
        reference_result.backward()
    assert_close(result, reference_result, F16)
    for name, t, r in zip(("wte", "wpe", "weight", "bias", "project"), leaves, expected, strict=True):
        assert_close(t.grad, r.grad, F32, name)


class _Recorder:
    """Stands before a function or kernel and notes that it was used."""

    def __init__(self, inner, name, calls):
        self.inner, self.name, self.calls = inner, name, calls

    def __call__(self, *args, **options):
        self.calls.append(self.name)
        return self.inner(*args, **options)

    def __getitem__(self, grid):
        self.calls.append(self.name)
        return self.inner[grid]


def test_serve_registers_for_cuda_and_lets_go():
    if backends.extension is None:
        pytest.skip("pygpt._C is not built: there are no operators to answer")

    def answered() -> set[bool]:
        names = (f"pygpt::{name}" for _, names in kernels.OPERATORS.values() for name in names)
        return {torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in names}

    before = answered()
    for take in (dict.fromkeys(backends.TRITON_OPS, True), {}, {"layer_norm": True, "gelu": False}):
        kernels.serve(take)
        assert answered() == {True}
    if DEVICE == "cpu":
        kernels._library = None
        assert answered() == before


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_cross_entropy_rows(V, dtype):
    cross_entropy_rows_case(kce.cross_entropy_rows_, V, dtype, DEVICE)


def test_cross_entropy_rows_with_room_between_them():
    wide = torch.full((9, 1088), 7.0, dtype=BF16, device=DEVICE)

    def rows_(logits, *arguments):
        wide[:, :1025] = logits
        losses = kce.cross_entropy_rows_(wide[:, :1025], *arguments)
        logits.copy_(wide[:, :1025])
        return losses

    cross_entropy_rows_case(rows_, 1025, BF16, DEVICE)
    assert (wide[:, 1025:] == 7.0).all()


def test_cross_entropy_rows_of_float16_and_odd_targets():
    logits, targets = draw(3, 40, dtype=F16), torch.tensor([0, 40, -1], device=DEVICE)
    (expected,) = reference(logits[:1])
    loss = F.cross_entropy(expected, targets[:1])
    loss.backward()
    losses = kce.cross_entropy_rows_(logits, targets, -100, torch.tensor(1.0, device=DEVICE))
    assert_close(losses[:1], loss[None], F32)
    assert_close(logits[:1], expected.grad, F16)
    assert losses[1:].isnan().all()  # outside the vocabulary


@pytest.mark.filterwarnings("ignore:.*verrid")
@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, (F32, BF16)[at % 2]) for at, s in enumerate(CROSS_ENTROPY_SHAPES)], ids=str
)
def test_linear_cross_entropy(triton_answers, monkeypatch, shape, dtype):
    monkeypatch.setattr(ops_cross_entropy, "CHUNK_BYTES", 1)  # 16 rows at a time
    monkeypatch.setattr(ops_cross_entropy, "GPU_CHUNK_BYTES", 1)
    calls = []
    monkeypatch.setattr(kce, "_rows_kernel", _Recorder(kce._rows_kernel, "rows", calls))
    N, C, V = shape
    N += 16  # of more than one chunk: a single one has an operator of its own on the CPU
    hidden, weight = draw(N, C, dtype=dtype), draw(V, C, dtype=dtype, seed=1, scale=0.5)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    targets[3::7] = -100
    leaves, doubles = [t.requires_grad_() for t in (hidden, weight)], reference(hidden, weight)
    loss, expected = ops.linear_cross_entropy(*leaves, targets), F.cross_entropy(doubles[0] @ doubles[1].t(), targets)
    loss.backward()
    expected.backward()
    assert calls
    assert_close(loss, expected, dtype, "loss")
    for t, r in zip(leaves, doubles, strict=True):
        assert_close(t.grad, r.grad, dtype, "grad")


@pytest.mark.parametrize(
    ("shape", "dtype", "with_bias"),
    [
        *((shape, dtype, len(shape) > 1) for shape, dtype in in_turn(GELU_SHAPES)),
        ((1, 1), F32, True),
        ((3, 5, 7), F32, True),
        ((33, 600), BF16, True),
        ((9, 64), F16, False),
        ((0, 8), F32, True),
    ],
    ids=str,
)
def test_bias_gelu(shape, dtype, with_bias):
    x, grad = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, seed=1)
    bias = draw(shape[-1], dtype=dtype, seed=2) if with_bias else None
    rx, rb = reference(x, bias)
    expected = F.gelu(rx + rb if with_bias else rx, approximate="tanh")
    expected.backward(grad.double())
    assert_close(kgelu.bias_gelu_forward(x, bias), expected, dtype, "y")
    grad_x, grad_bias = kgelu.bias_gelu_backward(grad, x, bias)
    assert_close(grad_x, rx.grad, dtype, "grad x")
    assert_close(grad_bias, rb.grad if with_bias else torch.empty(0), dtype, "grad bias")


def test_gelu_far_out():
    x = torch.tensor([[-3e38, -1e20, -1e4, -60.0, -10.0, 0.0, 10.0, 60.0, 1e4, 1e20, 3e38]], device=DEVICE)
    slope = torch.tensor([0] * 5 + [0.5] + [1.0] * 5, device=DEVICE)
    assert torch.equal(kgelu.bias_gelu_forward(x, None), x.clamp(min=0))
    assert torch.equal(kgelu.bias_gelu_backward(torch.ones_like(x), x, None)[0], slope[None])
    assert kgelu.bias_gelu_backward(torch.ones_like(x), x * torch.nan, None)[0].isnan().all()
