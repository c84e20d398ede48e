"""linear against float64: with oneDNN behind it where that is the faster library, by our kernel for few rows, else F.linear."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from common import assert_close, double, kernels, leaf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pygpt import ops
from pygpt.ops import backends
from pygpt.ops.linear import ONEDNN_ADDS_BIAS, ONEDNN_IS_FASTER, matmul_nt, matmul_tn_

linear_module = sys.modules["pygpt.ops.linear"]  # pygpt.ops.linear is the function


@pytest.fixture(params=["here", "Intel"])
def libraries(request, monkeypatch):
    """Which of torch's libraries the products go through, there as here."""
    if request.param == "Intel":
        monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", False)
    return request.param


def is_ours(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_LinearBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 8, 8), (3, 7, 5, 11), (40, 33, 17), (40, 17, 33), (16, 1, 1)], ids=str)
def test_matches_float64(capability, libraries, shape, with_bias, dtype):
    *batch, K, N = shape
    x, weight = leaf(*batch, K, dtype=dtype), leaf(N, K, dtype=dtype, seed=1)
    bias = leaf(N, dtype=dtype, seed=2) if with_bias else None
    y = ops.linear(x, weight, bias)
    in_float32 = dtype == torch.bfloat16 and not backends.extension.multiplies_bf16()
    of_float32 = linear_module.has_vectors(x) or (ONEDNN_IS_FASTER and libraries != "Intel")
    of_bfloat16 = linear_module.has_tiles(x) or (ONEDNN_ADDS_BIAS and with_bias)
    assert is_ours(y) == (in_float32 or (of_float32 if dtype == torch.float32 else of_bfloat16))
    reference = [double(t) for t in (x, weight, bias)]
    expected = F.linear(*reference)
    cotangent = leaf(*y.shape, dtype=dtype, seed=3).detach()
    y.backward(cotangent)
    expected.backward(cotangent.double())
    assert_close(y, expected)
    for name, t, r in zip(("x", "weight", "bias"), (x, weight, bias), reference, strict=True):
        if t is not None:
            assert_close(t.grad, r.grad, what=name)
            assert t.grad.is_contiguous()


def test_strided_inputs_and_outer_gradients(capability):
    base = leaf(20, 2 * 12)
    x, weight = base[:, ::2], leaf(12, 9, seed=1).t()
    y = ops.linear(x, weight)
    y.t().sum(1).square().sum().backward()
    rb = double(base)
    (rb[:, ::2] @ weight.detach().double().t()).sum(0).square().sum().backward()
    assert_close(base.grad, rb.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [torch.randn(40, 3)[:, 1], torch.ones(1), torch.randn(1, 40), torch.randn(20, 40)])
def test_bias_that_is_not_plain(capability, bias, dtype):
    x, weight, bias = leaf(20, 16, dtype=dtype), leaf(40, 16, dtype=dtype, seed=1), bias.to(dtype)
    assert_close(ops.linear(x, weight, bias), F.linear(double(x), double(weight), double(bias)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_input_only(capability, libraries, which, dtype):
    inputs = [leaf(*shape, dtype=dtype, seed=seed).detach() for seed, shape in enumerate([(20, 6), (4, 6), (4,)])]
    inputs[which].requires_grad_()
    cotangent = leaf(20, 4, dtype=dtype, seed=3).detach()
    ops.linear(*inputs).backward(cotangent)
    reference = [double(t) for t in inputs]
    F.linear(*reference).backward(cotangent.double())
    assert_close(inputs[which].grad, reference[which].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [5, 4096, 4097, 4200, 4225])
def test_products_added_in_parts(capability, N, dtype):
    a, b, out = (
        leaf(*shape, dtype=dtype, seed=seed).detach() for seed, shape in enumerate([(24, N), (24, 200), (N, 200)])
    )
    product = a.double().t() @ b.double()
    expected = out.double() + product
    assigned = torch.full_like(out, torch.nan)
    matmul_tn_(out, a, b, add=True)
    matmul_tn_(assigned, a, b, add=False)
    assert_close(out, expected, dtype, floor=math.sqrt(24))
    assert_close(assigned, product, dtype, floor=math.sqrt(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (16, 1, 1),
        (17, 100, 9),
        (33, 10, 101),
        (40, 64, 64),
        (15, 70, 7),
        (0, 5, 3),
        (17, 4101, 5),
        (1, 4097, 3),
        (0, 4100, 2),
    ],
)
def test_products_with_a_vocabulary(monkeypatch, capability, libraries, M, N, K, dtype):
    """Bfloat16 is rounded once however many parts the sums are of; both operands as they are and as views transposed."""
    monkeypatch.setattr(linear_module, "SLICE_BYTES", 4 * 64 * 3)
    for transposed in (False, True):
        shapes = ((K, M), (K, N)) if transposed else ((M, K), (N, K))
        a, b = (leaf(*shape, dtype=dtype, seed=seed).detach() for seed, shape in enumerate(shapes))
        a, b = (a.t(), b.t()) if transposed else (a, b)
        y, exact = matmul_nt(a, b), a.double() @ b.double().t()
        assert y.dtype == dtype
        if dtype == torch.bfloat16:
            torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5 * K)
        else:
            assert_close(y, exact, dtype, floor=math.sqrt(K))


@pytest.mark.skipif(
    not linear_module.ONEDNN_BESIDE_MKL or backends.extension is None,
    reason="needs oneDNN, MKL and pygpt._C",
)
def test_which_products_are_wide():
    a, b = torch.ones(129, 384), torch.ones(129 * 32 + 1, 384)
    assert linear_module._is_wide(a, b)
    assert linear_module._is_wide(torch.ones(384, 129).t(), b)
    assert not linear_module._is_wide(a, b[1:])
    assert not linear_module._is_wide(a[:16], b[:4096])
    assert not linear_module._is_wide(a[:15], b)
    assert not linear_module._is_wide(torch.ones(129, 383), torch.ones(len(b), 383))
    assert not linear_module._is_wide(a, torch.ones(384, len(b)).t())
    assert not linear_module._is_wide(a.double(), b.double())
    with backends.use_backend("eager"):
        assert not linear_module._is_wide(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(5, 4101, 24), (5, 24, 4101), (1, 4160, 7), (3, 4097, 4099), (0, 4101, 5)])
def test_products_of_a_gpu_with_the_odd_part_apart(M, N, K, dtype):
    a, b = leaf(M, K, dtype=dtype).detach(), leaf(K, N, dtype=dtype, seed=1).detach().t()
    y, exact = linear_module._by_whole_tiles(a, b), a.double() @ b.double().t()
    assert y.stride(0) % 64 == 0
    assert y.stride(1) == 1
    assert_close(y, exact, dtype, floor=math.sqrt(K))


needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 13, 15, 17, 23, 32, 63])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 16), (4, 33), (9, 31), (18, 97), (33, 32), (31, 96), (400, 640)])
def test_few_rows_match_float64(capability, rows, N, K, dtype):
    x, weight = leaf(rows, K, dtype=dtype).detach(), leaf(N, K, dtype=dtype, seed=1).detach()
    bias = leaf(N, dtype=dtype, seed=2).detach()
    for b in (bias, None):
        y = torch.ops.pygpt.linear_few_rows(x, weight, b)
        assert y.dtype == dtype
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        assert_close(y, expected, dtype, floor=math.sqrt(K))
        if linear_module.has_few_rows(x):
            assert torch.equal(ops.linear(x, weight, b), y)


@needs_extension
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.lists(st.integers(0, 3), max_size=2), N=st.integers(1, 40), K=st.integers(1, 70), step=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_few_rows_of_any_shape(capability, batch, N, K, step, dtype):
    x, weight = (
        leaf(*batch, K * step, dtype=dtype).detach()[..., ::step],
        leaf(N, K * step, dtype=dtype, seed=1).detach(),
    )
    weight = weight[:, ::step]
    y = torch.ops.pygpt.linear_few_rows(x, weight, None)
    assert_close(y, F.linear(x.double(), weight.double()), dtype, floor=math.sqrt(K))


@needs_extension
def test_few_rows_keep_infinities_and_the_bits(capability):
    """Each row's result is its own: the same alone as among others, on one thread as on two."""
    x, weight = leaf(15, 768).detach(), leaf(301, 768, seed=1).detach()
    x[3, 5], x[4, 700] = torch.inf, torch.nan
    y = torch.ops.pygpt.linear_few_rows(x, weight, None)
    assert torch.equal(y[3].isfinite(), weight[:, 5] == 0)
    assert y[4].isnan().all()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in (0, 7, 8, 14):
            assert torch.equal(torch.ops.pygpt.linear_few_rows(x[row], weight, None), y[row])
    finally:
        torch.set_num_threads(threads)


@needs_extension
def test_few_rows_opcheck_and_errors():
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    few_rows = torch.ops.pygpt.linear_few_rows.default
    torch.library.opcheck(few_rows, (x, weight, torch.randn(5)))
    for arguments, message in [
        ((x, weight[:, :7], None), r"weight must be \(N, K\)"),
        ((x, weight, torch.randn(4)), r"bias must be \(N,\)"),
        ((x, weight.bfloat16(), None), "must all be float32"),
        ((x.double(), weight.double(), None), "must all be float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            few_rows(*arguments)


def test_few_rows_with_gradients_or_odd_weights_are_pytorchs():
    x, weight = leaf(2, 6), leaf(4, 6, seed=1)
    assert type(ops.linear(x, weight).grad_fn).__name__ == type(F.linear(x, weight).grad_fn).__name__
    with torch.no_grad():
        for w in (weight, leaf(6, 4, seed=1).t()):  # a transposed weight would have to be copied in every call
            assert_close(ops.linear(x, w), F.linear(x.double(), w.double()))
        with pytest.raises(RuntimeError):
            ops.linear(x, weight, torch.randn(3))


def test_what_stays_with_pytorch():
    x, weight = leaf(128, 128), leaf(96, 128, seed=1)
    assert is_ours(ops.linear(x, weight)) == (ONEDNN_IS_FASTER and not linear_module.has_vectors(x))
    assert not is_ours(ops.linear(x, weight[:95]))  # a small product
    assert not is_ours(ops.linear(x[:2], weight))  # few rows
    large, many = leaf(2048, 512).bfloat16(), leaf(256, 512, seed=1).bfloat16()
    in_float32 = backends.extension is not None and not backends.extension.multiplies_bf16()
    assert is_ours(ops.linear(large, many, many[0, :256])) == (ONEDNN_ADDS_BIAS or in_float32)
    assert is_ours(ops.linear(large, many)) == (in_float32 or linear_module.has_tiles(large))  # no bias to add
    assert is_ours(ops.linear(large, many[:255], many[0, :255])) == in_float32  # a small product
    assert is_ours(ops.linear(large.float(), many.float())) == (ONEDNN_IS_FASTER or linear_module.has_vectors(x))
    assert not is_ours(ops.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    with backends.use_backend("eager"):
        assert not is_ours(ops.linear(x, weight))
    assert ops.linear(x[:0], weight).shape == (0, 96)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight), F.linear(double(x), double(weight)))


FEW, MATRIX = {"linear_few_rows"}, {"matmul"}


@needs_extension
@pytest.mark.parametrize(
    ("dtype", "rows", "N", "K", "expected"),
    [
        (torch.float32, 15, 256, 256, set()),  # a small weight
        (torch.float32, 1, 511, 256, set()),  # one row of a larger one
        (torch.float32, 1, 512, 256, FEW),
        (torch.float32, 2, 257, 256, FEW),
        (torch.float32, 47, 257, 256, FEW),
        (torch.float32, 48, 257, 256, set()),  # F.linear is fast here
        (torch.float32, 48, 1024, 512, MATRIX),  # and here it is not
        (torch.float32, 48, 1023, 512, set()),
        (torch.float32, 16, 1024, 512, FEW),  # but with gradients the product of matrices
        (torch.float32, 15, 1024, 512, FEW),  # and here F.linear
        (torch.float32, 2048, 256, 512, MATRIX),
        (torch.bfloat16, 1, 255, 128, set()),
        (torch.bfloat16, 1, 256, 128, FEW),
        (torch.bfloat16, 7, 32, 128, set()),
        (torch.bfloat16, 8, 32, 128, FEW),
        (torch.bfloat16, 15, 128, 128, FEW),
        (torch.bfloat16, 47, 128, 128, FEW),
        (torch.bfloat16, 48, 128, 128, set()),  # fewer than 1.5 million multiplications
        (torch.bfloat16, 96, 128, 128, MATRIX),
    ],
    ids=str,
)
def test_who_multiplies_with_avx2(dtype, rows, N, K, expected):
    if "avx2" not in backends.extension.available_cpu_capabilities():
        pytest.skip("this processor has no AVX2")
    x, weight = torch.randn(rows, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
    backends.extension.set_cpu_capability("avx2")
    try:
        with torch.no_grad():
            assert kernels(lambda: ops.linear(x, weight)) == expected
        weight.requires_grad_()
        assert is_ours(ops.linear(x, weight)) == (expected == MATRIX or (rows >= 16 and weight.numel() >= 1 << 19))
    finally:
        backends.extension.set_cpu_capability("")


def test_errors_are_those_of_pytorch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(torch.randn(20, 5), torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(torch.randn(20, 6), torch.randn(4, 6).double())


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 5), (1, 1), (7, 33), (8, 16), (127, 3), (128, 40), (129, 65), (1000, 100), (3, 0)], ids=str
)
def test_column_sum(capability, shape, dtype):
    x = (torch.randn(shape) + 3).to(dtype)  # a mean, of which bfloat16 sums would lose much
    before = torch.get_num_threads()
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append(torch.ops.pygpt.column_sum(x))
    torch.set_num_threads(before)
    assert sums[0].dtype == dtype
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    exact = x.double().sum(0)
    torch.testing.assert_close(sums[0].double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    wide = torch.stack([x, x], 2)[:, :, 1]
    assert torch.equal(torch.ops.pygpt.column_sum(wide), sums[0])


@needs_extension
def test_column_sum_of_wrong_tensors():
    for wrong in (torch.randn(3), torch.randn(3, 4).double()):
        with pytest.raises(RuntimeError, match=r"column_sum: x must be \(M, N\), float32 or bfloat16"):
            torch.ops.pygpt.column_sum(wrong)
    torch.library.opcheck(torch.ops.pygpt.column_sum.default, (torch.randn(20, 5),))
