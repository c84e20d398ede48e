"""causal_attention against an explicit softmax in float64, under every instruction set of the machine."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from common import ATTENTION_SHAPES, DOCUMENT_CASES, DOCUMENTS, assert_close, document_starts, double, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from pygpt import ops
from pygpt.ops import backends
from pygpt.ops.attention import causal_attention_reference, draw_seed, dropout_mask, philox4x32

DTYPES = [torch.float32, torch.bfloat16]
needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
forward_op = torch.ops.pygpt.causal_attention_forward if backends.extension else None
backward_op = torch.ops.pygpt.causal_attention_backward if backends.extension else None


def qkv(B, T, S, H, D, dtype=torch.float32, scale=1.0):
    sizes = [(B, T, H, D), (B, S, H, D), (B, S, H, D)]
    return [leaf(*size, dtype=dtype, seed=i, scale=scale) for i, size in enumerate(sizes)]


def explicit(q, k, v, scale=None, keep=None, dropout_p=0.0, document_start=None):
    """The definition: one matrix of scores, softmax, product. Also returns the log-sum-exp (B, H, T)."""
    T, S = q.shape[1], k.shape[1]
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    key, own = torch.arange(S), torch.arange(S - T, S)[:, None]
    hidden = key > own  # (T, S)
    if document_start is not None:
        hidden = hidden | ((key < document_start[:, None, :, None]) & (key != own))  # (B, 1, T, S)
    scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p)
    return torch.einsum("bhts,bshd->bthd", weights, v), scores.logsumexp(-1)


def compare(q, k, v, scale=None, dropout_p=0.0, what="", document_start=None):
    """Output and all gradients of the op against float64; the seed is drawn twice from the same generator state."""
    dtype = q.dtype
    B, T, H, _ = q.shape
    torch.manual_seed(5)
    keep = dropout_mask(draw_seed(), (B, H, T, k.shape[1]), dropout_p) if dropout_p else None
    torch.manual_seed(5)
    out = ops.causal_attention(q, k, v, scale, dropout_p, document_start)
    doubles = [double(t) for t in (q, k, v)]
    reference, _ = explicit(*doubles, scale, keep, dropout_p, document_start)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, reference, dtype, f"{what} out")
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    cotangent = leaf(*q.shape, dtype=dtype, seed=9).detach()
    grads = torch.autograd.grad(out, (q, k, v), cotangent)
    expected = torch.autograd.grad(reference, doubles, cotangent.double())
    for name, grad, e in zip("qkv", grads, expected, strict=True):
        assert grad.dtype == dtype
        # dS is the difference of dP and rowsum(dO * out), each of size sqrt(D) / (1 - p), and out was rounded to its dtype:
        # where a query sees few keys the difference is small (one key: 0) and the rounding is not.
        few_keys = dtype == torch.bfloat16 or k.shape[1] == 1 or document_start is not None
        floor = 2 * abs(factor) * math.sqrt(q.shape[-1]) / (1 - dropout_p) if few_keys and name != "v" else 0.0
        assert_close(grad, e, dtype, f"{what} grad {name}", max(floor, 1e-2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
def test_matches_float64(capability, shape, dtype, dropout_p):
    compare(*qkv(*shape, dtype=dtype), dropout_p=dropout_p)


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 3),
    T=st.integers(0, 140),
    more=st.integers(0, 150),
    H=st.integers(1, 3),
    D=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "packed", "heads first", "every second", "cache"]),
    dropout_p=st.sampled_from([0.0, 0.0, 0.1, 0.5]),
    scale=st.sampled_from([None, 0.02, -0.3, 0.0]),
    documents=st.booleans(),
    level=st.sampled_from(backends.extension.available_cpu_capabilities() if backends.extension else [""]),
)
def test_odd_shapes_and_strides(B, T, more, H, D, dtype, layout, dropout_p, scale, documents, level):
    S = T if layout == "packed" else T + more
    if layout == "packed":
        q, k, v = leaf(B, T, 3 * H * D, dtype=dtype).view(B, T, 3, H, D).unbind(2)
    elif layout == "heads first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(B, T, S, H, D, dtype))
    elif layout == "every second":
        q, k, v = (t[..., ::2] for t in qkv(B, T, S, H, 2 * D, dtype))
    elif layout == "cache":
        q = leaf(B, T, H, D, dtype=dtype)
        k, v = (leaf(B, S + 17, H, D, dtype=dtype, seed=i)[:, :S] for i in (1, 2))
    else:
        q, k, v = qkv(B, T, S, H, D, dtype)
    starts = None
    if documents:  # not only a packing's: any that do not decrease, some out of range
        generator = torch.Generator().manual_seed(T + S)
        starts = torch.randint(-5, S + 5, (T, B), generator=generator, dtype=torch.int32).sort(0).values.t()
    backends.extension.set_cpu_capability(level)
    try:
        with backends.use_backend("cpp"):
            if T == 0 or B == 0:
                out = ops.causal_attention(q, k, v, scale, dropout_p, starts)
                out.sum().backward()
                assert out.shape == (B, T, H, D)
                return
            compare(q, k, v, scale, dropout_p, level, starts)
    finally:
        backends.extension.set_cpu_capability("")


def test_gradient_of_a_packed_projection(capability):
    packed = leaf(2, 70, 3 * 2 * 32)
    q, k, v = packed.view(2, 70, 3, 2, 32).unbind(2)
    ops.causal_attention(q, k, v).square().sum().backward()
    wide = double(packed)
    out, _ = explicit(*wide.view(2, 70, 3, 2, 32).unbind(2))
    out.square().sum().backward()  # sum() hands an expanded gradient to backward
    assert_close(packed.grad, wide.grad)


def test_log_sum_exp(capability):
    for shape in [(2, 70, 90, 2, 32), (1, 2, 600, 2, 32)]:
        q, k, v = qkv(*shape)
        _, lse = forward_op.default(q, k, v, 0.3, 0.0, None)
        assert_close(lse, explicit(double(q), double(k), double(v), 0.3)[1])


def test_empty(capability):
    for B, T, S, H in [(0, 4, 4, 2), (2, 0, 0, 2), (2, 4, 9, 0), (2, 0, 5, 2)]:
        q, k, v = qkv(B, T, S, H, 16)
        out = ops.causal_attention(q, k, v)
        out.sum().backward()
        assert out.shape == (B, T, H, 16)
        assert torch.equal(k.grad, torch.zeros_like(k))
        assert torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_with_a_cache_equals_one_pass(capability, dtype):
    q, k, v = (t.detach() for t in qkv(2, 150, 150, 2, 64, dtype))
    whole = ops.causal_attention(q, k, v)
    k_cache, v_cache = (
        torch.full((2, 160, 2, 64), math.nan, dtype=dtype),
        torch.full((2, 160, 2, 64), math.nan, dtype=dtype),
    )
    at = 0
    for step in [70, 1, 1, 2, 9, 1, 3, 60, 1, 1, 1]:  # a prompt, single tokens, short and long continuations
        new = slice(at, at + step)
        k_cache[:, new], v_cache[:, new] = k[:, new], v[:, new]
        at += step
        out = ops.causal_attention(q[:, new], k_cache[:, :at], v_cache[:, :at])
        assert_close(out, whole[:, new], dtype, f"{step} queries at {at}")
    assert at == 150


def test_no_query_sees_a_later_key(capability):
    q, k, v = (t.detach() for t in qkv(1, 130, 130, 1, 32))
    before = ops.causal_attention(q, k, v)
    k[:, 77:], v[:, 77:] = 100.0, -100.0
    after = ops.causal_attention(q, k, v)
    assert torch.equal(before[:, :77], after[:, :77])
    assert not torch.isclose(before[:, 77:], after[:, 77:]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_query_depends_on_another_to_the_bit(capability, dtype):
    q, k, v = (t.detach() for t in qkv(1, 256, 256, 1, 64, dtype))
    before = ops.causal_attention(q, k, v)
    q[:, 200] = 2 * k[:, 150]  # whose score is far above those before
    after = ops.causal_attention(q, k, v)
    others = torch.arange(256) != 200
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 200], after[:, 200])


# --- documents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dropout_p", "D"), [(0.0, 33), (0.25, 64)])
@pytest.mark.parametrize(("name", "T"), DOCUMENT_CASES)
def test_documents(capability, name, T, dropout_p, D, dtype):
    rows = DOCUMENTS[name]
    S = sum(rows[0])
    packed = leaf(len(rows), S, 3 * 2 * D, dtype=dtype).view(len(rows), S, 3, 2, D)
    q, k, v = packed[:, S - T :, 0], packed[:, :, 1], packed[:, :, 2]
    compare(q, k, v, dropout_p=dropout_p, document_start=document_starts(rows, T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_documents_are_as_if_alone(capability, dtype):
    for name, rows in DOCUMENTS.items():
        q, k, v = qkv(len(rows), sum(rows[0]), sum(rows[0]), 2, 40, dtype)
        out = ops.causal_attention(q, k, v, document_start=document_starts(rows))
        cotangent = leaf(*out.shape, dtype=dtype, seed=9).detach()
        grads = torch.autograd.grad(out, (q, k, v), cotangent)
        expected = [torch.empty_like(t) for t in (out, *grads)]
        for b, lengths in enumerate(rows):
            for end, length in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths, strict=True):
                of_document = slice(b, b + 1), slice(end - length, end)
                parts = [t.detach()[of_document].requires_grad_() for t in (q, k, v)]
                alone = ops.causal_attention(*parts)
                alone.backward(cotangent[of_document])
                for whole, part in zip(expected, (alone, *(t.grad for t in parts)), strict=True):
                    whole[of_document] = part.detach()
        for actual, wanted in zip((out, *grads), expected, strict=True):
            assert_close(actual, wanted, dtype, name)


def test_nothing_passes_from_one_document_to_another(capability):
    rows = [[61, 1, 45, 93]]
    q, k, v = qkv(1, 200, 200, 1, 32)
    starts = document_starts(rows)
    out = ops.causal_attention(q, k, v, document_start=starts)
    third = slice(62, 107)
    grads = torch.autograd.grad(out[:, third].square().sum(), (q, k, v))
    for grad in grads:
        assert grad[:, third].all()
        assert not grad[:, :62].any()
        assert not grad[:, 107:].any()
    with torch.no_grad():
        for t in (k, v):
            t[:, :62], t[:, 107:] = -t[:, :62] * 50, 30.0
    after = ops.causal_attention(q, k, v, document_start=starts)
    assert torch.equal(after[:, third], out[:, third])
    assert not torch.isclose(after[:, 107:], out[:, 107:]).any()


@pytest.mark.parametrize(("T", "S"), [(70, 70), (33, 90), (3, 300)])
def test_starts_out_of_range(capability, T, S):
    own = torch.arange(S - T, S, dtype=torch.int32)
    least, most = -(2**31), 2**31 - 1
    starts = torch.stack([torch.full((T,), least), torch.full((T,), most), own, own + 1, own - 1]).int()
    starts[0, T // 2 :] = most
    compare(*qkv(5, T, S, 2, 16), document_start=starts)
    compare(*qkv(5, T, S, 2, 16), document_start=starts.t().contiguous().t(), dropout_p=0.5)  # by time, then batch
    q, k, v = (t.detach() for t in qkv(5, T, S, 2, 16))
    alone = ops.causal_attention(q, k, v, document_start=starts)
    assert_close(alone[1:4], v[1:4, S - T :])
    reference = causal_attention_reference(q, k, v, document_start=starts)
    assert_close(alone, reference)


@needs_extension
def test_document_starts_are_checked():
    x = torch.randn(2, 6, 2, 8)
    starts = document_starts([[2, 4], [6]])
    for backend in ("eager", "cpp"):
        with backends.use_backend(backend):
            for bad in (starts[:1], starts[:, :5], starts[0], starts[..., None]):
                with pytest.raises(ValueError, match=r"document_start must be \(B, T\) = \(2, 6\)"):
                    ops.causal_attention(x, x, x, document_start=bad)
            for bad in (starts.long(), starts.float()):
                with pytest.raises(TypeError, match="document_start must be int32"):
                    ops.causal_attention(x, x, x, document_start=bad)
            with pytest.raises(ValueError, match="document_start is on meta"):
                ops.causal_attention(x, x, x, document_start=starts.to("meta"))
    decreasing = torch.tensor([[0, 0, 2, 2, 1, 1], [0] * 6]).int()
    with backends.use_backend("cpp"), pytest.raises(RuntimeError, match="document_start must not decrease along T"):
        ops.causal_attention(x, x, x, document_start=decreasing)
    out, lse = forward_op.default(x, x, x, 1.0, 0.0, None, starts)
    for bad in (starts.long(), starts[:1], starts[0]):
        with pytest.raises(RuntimeError, match=r"document_start must be int32 \(B, T\)"):
            forward_op.default(x, x, x, 1.0, 0.0, None, bad)
        with pytest.raises(RuntimeError, match=r"document_start must be int32 \(B, T\)"):
            backward_op.default(x, x, x, x, out, lse, 1.0, 0.0, None, bad)


def test_decoding_of_padded_prompts_equals_unpadded(capability):
    lengths = [3, 40, 17]
    pads = [40 - n for n in lengths]
    q, k, v = (t.detach() for t in qkv(3, 70, 70, 2, 32))
    at = 40
    for step in (0, 1, 1, 5, 2, 1, 20):
        new = slice(at, at + step) if step else slice(0, at)
        at += step
        starts = torch.stack([torch.arange(at)[new].clamp(max=pad) for pad in pads]).int()
        out = ops.causal_attention(q[:, new], k[:, :at], v[:, :at], document_start=starts)
        for b, pad in enumerate(pads):
            real = slice(max(new.start, pad), new.stop)
            alone = ops.causal_attention(q[b : b + 1, real], k[b : b + 1, pad:at], v[b : b + 1, pad:at])
            assert_close(out[b : b + 1, real.start - new.start :], alone, what=f"row {b}, {step} tokens to {at}")


# --- dropout -------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    # Random123's kat_vectors for philox4x32 with 10 rounds.
    vectors = """
    00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
    ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
    243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
    """
    for line in vectors.strip().splitlines():
        numbers = [torch.tensor([int(word, 16)]) for word in line.split()]
        assert philox4x32(numbers[:4], (numbers[4], numbers[5])) == numbers[6:]


@pytest.mark.parametrize(("T", "S"), [(200, 256), (3, 250)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_mask_is_the_defined_one(capability, T, S, dtype):
    # Equal scores and one-hot values: out[b, i, h, j] is the weight of key j, and 0 exactly where it was dropped.
    B, H, p = 2, 3, 0.3
    q, k = torch.randn(B, T, H, S).to(dtype), torch.zeros(B, S, H, S, dtype=dtype)
    v = torch.eye(S, dtype=dtype).view(1, S, 1, S).expand(B, S, H, S)
    for seed in (0, -1, 2**40 + 12345):
        seed = torch.tensor([seed])
        out, lse = forward_op.default(q, k, v, 1.0, p, seed)
        visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        keep = dropout_mask(seed, (B, H, T, S), p) & visible
        assert torch.equal(out.transpose(1, 2) > 0, keep)
        count = torch.arange(S - T + 1, S + 1).double()
        assert_close(out.transpose(1, 2), keep / count.view(1, 1, T, 1) / (1 - p), dtype)
        assert_close(lse, count.log().expand(B, H, T), torch.float32)  # lse is that without dropout


def test_keep_rate_and_independence():
    shape = (2, 4, 256, 256)
    mask = dropout_mask(torch.tensor([77]), shape, 0.2)
    n = mask.numel()
    sigma = math.sqrt(0.2 * 0.8 / n)
    assert abs(mask.double().mean() - 0.8) < 5 * sigma
    centred = mask.double() - 0.8
    for shifted in (
        centred.roll(1, -1),
        centred.roll(16, -1),
        centred.roll(64, -1),
        centred.roll(1, -2),
        centred.roll(1, 1),
    ):
        assert abs((centred * shifted).mean()) < 5 * 0.16 / math.sqrt(n)
    other = dropout_mask(torch.tensor([78]), shape, 0.2).double() - 0.8
    assert abs((centred * other).mean()) < 5 * 0.16 / math.sqrt(n)
    assert dropout_mask(torch.tensor([77]), shape, 0.0).all()


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("documents", [False, True])
def test_same_dropout_on_every_backend(documents, dtype):
    results = []
    starts = document_starts([[20, 3, 57], [64, 16]], 70) if documents else None
    for backend in ("eager", "cpp"):
        q, k, v = qkv(2, 70, 80, 2, 32, dtype)
        torch.manual_seed(3)
        with backends.use_backend(backend):
            out = ops.causal_attention(q, k, v, dropout_p=0.4, document_start=starts)
            out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, dtype)


def test_dropout_follows_the_generator(capability):
    q, k, v = qkv(1, 40, 40, 1, 16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (ops.causal_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(ops.causal_attention(q, k, v, dropout_p=0.5), first)
    state = torch.get_rng_state()
    ops.causal_attention(q, k, v)  # without dropout nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


# --- threads, memory, registration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 400, 431, 1, 64), (2, 300, 300, 3, 32), (1, 2, 3000, 2, 64), (1, 1, 250, 20, 64), (2, 4, 600, 5, 256)],
    ids=str,
)
@pytest.mark.parametrize("documents", [False, True])
def test_same_bits_for_any_number_of_threads(capability, documents, shape, dtype):
    # One head, six heads: with more threads than heads the work is divided differently; so are the rows of a decode.
    results = []
    B, T, S = shape[:3]
    starts = document_starts([[S - 219, 1, 67, 151], [5, S - 9, 4]][:B], T) if documents else None
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        q, k, v = qkv(*shape, dtype)
        out = ops.causal_attention(q, k, v, dropout_p=0.1, document_start=starts)
        out.backward(leaf(*q.shape, dtype=dtype, seed=4).detach())
        results.append(torch.cat([t.flatten() for t in (out, q.grad, k.grad, v.grad)]))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_extension
def test_memory_does_not_hold_the_matrix():
    # T x T is 268 MB in float32, 67 MB even as a mask; all tensors and workspaces of this call are about 12 MB.
    script = """
import resource, torch
from pygpt import ops
small = torch.randn(1, 128, 1, 32, requires_grad=True)
ops.causal_attention(small, small, small).sum().backward()
q, k, v = (torch.randn(1, 8192, 1, 32, requires_grad=True) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.causal_attention(q, k, v, dropout_p=0.1).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kilobytes = int(done.stdout) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 48_000


@needs_extension
@pytest.mark.parametrize("shape", [(2, 5, 5, 2, 8), (1, 9, 12, 1, 4)], ids=str)
def test_opcheck(shape):
    starts = torch.tensor([0, 0, 2, 3, 3]).int().expand(2, 5)[: shape[0], : shape[1]]
    starts = torch.nn.functional.pad(starts, (shape[1] - starts.shape[1], 0))
    for settings_ in ((0.0, None), (0.5, torch.tensor([3])), (0.0, None, starts), (0.5, torch.tensor([3]), starts)):
        q, k, v = qkv(*shape)
        torch.library.opcheck(forward_op.default, (q, k, v, 0.5, *settings_))
        q, k, v = q.detach(), k.detach(), v.detach()
        out, lse = forward_op.default(q, k, v, 0.5, *settings_)
        torch.library.opcheck(backward_op.default, (q, q, k, v, out, lse, 0.5, *settings_))


@pytest.mark.parametrize("T", [5, 3, 1])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("documents", [False, True])
def test_gradcheck_of_the_reference(T, dropout_p, documents):
    q, k, v = qkv(2, T, 5, 2, 3, torch.float64)
    seed = torch.tensor([11])
    starts = document_starts([[1, 1, 3], [4, 1]], T) if documents else None
    assert torch.autograd.gradcheck(lambda *t: causal_attention_reference(*t, 0.7, dropout_p, seed, starts), (q, k, v))
    keep = dropout_mask(seed, (2, 2, T, 5), dropout_p)
    out = causal_attention_reference(q, k, v, None, dropout_p, seed, starts)
    assert_close(out, explicit(q, k, v, None, keep, dropout_p, starts)[0])


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (1, 5), (3, 5)])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_the_reference_at_a_scale_that_is_not_positive(T, S, scale):
    q, k, v = qkv(2, T, S, 2, 3)
    assert_close(causal_attention_reference(q, k, v, scale), explicit(*map(double, (q, k, v)), scale)[0])


@needs_extension
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_compiles_without_graph_breaks(backend, documents, dropout_p):
    starts = document_starts([[20, 3, 1], [4, 20]], 20) if documents else None

    def step(q, k, v):
        with backends.use_backend(backend):
            return ops.causal_attention(q, k, v, dropout_p=dropout_p, document_start=starts) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        q, k, v = qkv(2, 20, 24, 2, 16)
        torch.manual_seed(2)
        out = function(q, k, v)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad])
    if dropout_p == 0.0:  # a compiled graph draws its seed at another moment
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
    assert all(torch.isfinite(t).all() for t in results[1])


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_bad_input(backend):
    if backend == "cpp" and backends.extension is None:
        pytest.skip("pygpt._C is not built")
    x = torch.randn(2, 6, 2, 8)
    with backends.use_backend(backend):
        for q, k, v in [
            (x[0], x, x),
            (x, x[:1], x[:1]),
            (x, x, x[:, :5]),
            (x, x[:, :, :1], x[:, :, :1]),
            (x, x[..., :4], x[..., :4]),
        ]:
            with pytest.raises(ValueError, match=r"q must be \(B, T, H, D\)"):
                ops.causal_attention(q, k, v)
        with pytest.raises(ValueError, match="6 queries but only 5 keys"):
            ops.causal_attention(x, x[:, :5], x[:, :5])
        with pytest.raises(ValueError, match="empty head dimension"):
            ops.causal_attention(x[..., :0], x[..., :0], x[..., :0])
        for p in (-0.1, 1.0, math.nan):
            with pytest.raises(ValueError, match="dropout_p must be in"):
                ops.causal_attention(x, x, x, dropout_p=p)
        with pytest.raises(TypeError, match="floating-point"):
            ops.causal_attention(x.long(), x.long(), x.long())
        with pytest.raises(TypeError, match="one dtype"):
            ops.causal_attention(x, x.bfloat16(), x)
        with pytest.raises(ValueError, match="on meta"):
            ops.causal_attention(x, x.to("meta"), x.to("meta"))
    with pytest.raises(ValueError, match="needs a seed"):
        causal_attention_reference(x, x, x, dropout_p=0.5)


@needs_extension
def test_what_the_kernels_do_not_serve():
    wide = torch.randn(1, 4, 1, 257)
    half = torch.randn(1, 4, 1, 8).half()
    with backends.use_backend("cpp"):
        with pytest.raises(ValueError, match="head dimensions up to 256 in float32, got 257"):
            ops.causal_attention(wide, wide, wide)
        with pytest.raises(ValueError, match="no float16 kernel"):
            ops.causal_attention(half, half, half)
    for x in (wide, half, torch.randn(1, 4, 1, 8).double()):  # auto: the reference serves them
        assert_close(ops.causal_attention(x, x, x), explicit(x.double(), x.double(), x.double())[0], x.dtype)


@needs_extension
def test_operators_check_their_arguments():
    x = torch.randn(1, 4, 1, 8)
    with pytest.raises(RuntimeError, match="S >= T"):
        forward_op.default(x, x[:, :3], x[:, :3], 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="seed"):
        forward_op.default(x, x, x, 1.0, 0.5, None)
    with pytest.raises(RuntimeError, match="same dtype"):
        forward_op.default(x, x.bfloat16(), x, 1.0, 0.0, None)
    wide = torch.randn(1, 4, 1, 300)
    with pytest.raises(RuntimeError, match="1 to 256"):
        forward_op.default(wide, wide, wide, 1.0, 0.0, None)
    out, lse = forward_op.default(x, x, x, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="lse"):
        backward_op.default(x, x, x, x, out, lse.bfloat16(), 1.0, 0.0, None)
