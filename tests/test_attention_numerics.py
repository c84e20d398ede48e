"""Attention on numbers that strain its arithmetic: large, equal, zero, infinite and NaN; every level of the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from common import assert_close, double
from test_attention import DTYPES, explicit, qkv

from pygpt import ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [2, 100])
def test_large_scores(capability, T, dtype):
    # Scores up to 1e4 (the softmax is one-hot), and far below the range of exp.
    q, k, v = qkv(1, T, 100, 2, 32, dtype, scale=40.0)
    out = ops.causal_attention(q, k, v, 1.0)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))
    exact, _ = explicit(double(q), double(k), double(v), 1.0)
    winner = (out.double() - exact).abs() < 0.02 * exact.abs().max()  # float32 scores of 1e4 are exact to 1e-3
    assert winner.double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [3, 128])
def test_equal_scores_average_the_values(capability, T, dtype):
    # Every key is its row's maximum: the case in which low-precision sums drift (arXiv 2510.04212).
    q, _, v = qkv(1, T, 128, 1, 64, dtype)
    k = torch.full((1, 128, 1, 64), 3.0, dtype=dtype)
    out = ops.causal_attention(q, k, v)
    mean = v.double().cumsum(1)[:, -T:] / torch.arange(129 - T, 129).view(1, -1, 1, 1)
    assert_close(out, mean, dtype)
    ones = ops.causal_attention(q, k, torch.full_like(v, 1.0)).double()
    assert (ones - 1).abs().max() <= 2**-23  # no drift at all in bfloat16, one rounding of 1 / n in float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [3, 128])
@pytest.mark.parametrize("flush", [False, True])
def test_a_scale_of_zero_averages_the_values(capability, flush, T, dtype):
    # Of the keys that a query sees: 0 times what hides the others must not hide or spoil anything.
    q, k, v = qkv(1, T, 128, 1, 64, dtype)
    mean = v.double().cumsum(1)[:, -T:] / torch.arange(129 - T, 129).view(1, -1, 1, 1)
    torch.set_flush_denormal(flush)
    try:
        out = ops.causal_attention(q, k, v, 0.0)
    finally:
        torch.set_flush_denormal(False)
    assert_close(out, mean, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", [5, 70, 250])
def test_nan_of_a_key_reaches_all_queries_that_see_it(capability, key, dtype):
    q, k, v = (t.detach() for t in qkv(1, 256, 256, 2, 64, dtype))
    k[0, key, 1, 7] = math.nan
    out = ops.causal_attention(q, k, v)
    expected = torch.zeros(1, 256, 2, dtype=torch.bool)
    expected[0, key:, 1] = True
    assert torch.equal(out.isnan().any(-1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_that_takes_all_leaves_next_to_nothing(capability, dtype):
    # The others' weights are far below what a kernel's exponentials hold.
    S = 16384
    q, k, v = torch.ones(1, 64, 1, 64), torch.zeros(1, S, 1, 64), torch.ones(1, S, 1, 64)
    k[:, 0], v[:, 0] = 8.0, 0.0
    out = ops.causal_attention(*(t.to(dtype) for t in (q, k, v)))
    assert out.min() >= 0
    assert out.max() <= S * 2**-27


@pytest.mark.parametrize("T", [2, 90])
def test_nan_stays_where_it_belongs(capability, T):
    q, k, v = (t.detach() for t in qkv(1, T, 90, 2, 32))
    q[0, 1, 0, 3] = math.nan
    out = ops.causal_attention(q, k, v)
    expected = torch.zeros(1, T, 2, dtype=torch.bool)
    expected[0, 1, 0] = True
    assert torch.equal(out.isnan().any(-1), expected)
    q, k, v = qkv(1, T, 90, 2, 32)
    with torch.no_grad():
        k[0, 88, 1, 0] = math.nan
    out = ops.causal_attention(q, k, v)
    assert out[0, T - 2 :, 1].isnan().all()
    assert not out[0, :, 0].isnan().any()
    out.sum().backward()
    assert v.grad[0, :88, 1].isnan().any()


@pytest.mark.parametrize("T", [2, 4])
def test_nan_of_a_value_reaches_no_query_of_a_few_that_does_not_see_it(capability, T):
    q, k, v = (t.detach() for t in qkv(2, T, 90, 2, 40))
    start = torch.tensor([0, 70], dtype=torch.int32).view(2, 1).expand(2, T).contiguous()
    clean = ops.causal_attention(q, k, v, document_start=start)
    v[0, 90 - T + 1 :] = math.nan  # seen by all but the first
    v[1, 69] = math.nan  # of another document
    out = ops.causal_attention(q, k, v, document_start=start)
    assert out[0, 1:].isnan().all()
    assert torch.equal(out[0, 0], clean[0, 0])
    assert torch.equal(out[1], clean[1])


def test_scores_that_overflow_give_nan_not_a_hang(capability):
    q, k, v = (t.detach() for t in qkv(1, 70, 70, 1, 8, scale=1e25))
    assert ops.causal_attention(q, k, v).shape == q.shape
