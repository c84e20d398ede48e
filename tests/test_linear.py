"""linear against float64, with oneDNN behind it where that is the faster library, and F.linear elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import assert_close, double, leaf

from pygpt import ops
from pygpt.ops import backends
from pygpt.ops.linear import ONEDNN_IS_FASTER


def uses_onednn(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_LinearBackward"


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 8, 8), (3, 7, 5, 11), (40, 33, 17), (40, 17, 33), (16, 1, 1)], ids=str)
def test_matches_float64(shape, with_bias):
    *batch, K, N = shape
    x, weight = leaf(*batch, K), leaf(N, K, seed=1)
    bias = leaf(N, seed=2) if with_bias else None
    y = ops.linear(x, weight, bias)
    assert uses_onednn(y) == ONEDNN_IS_FASTER
    reference = [double(t) for t in (x, weight, bias)]
    expected = F.linear(*reference)
    cotangent = leaf(*y.shape, seed=3).detach()
    y.backward(cotangent)
    expected.backward(cotangent.double())
    assert_close(y, expected)
    for name, t, r in zip(("x", "weight", "bias"), (x, weight, bias), reference, strict=True):
        if t is not None:
            assert_close(t.grad, r.grad, what=name)
            assert t.grad.is_contiguous()


def test_strided_inputs_and_outer_gradients():
    base = leaf(20, 2 * 12)
    x, weight = base[:, ::2], leaf(12, 9, seed=1).t()
    y = ops.linear(x, weight)
    y.t().sum(1).square().sum().backward()
    rb = double(base)
    (rb[:, ::2] @ weight.detach().double().t()).sum(0).square().sum().backward()
    assert_close(base.grad, rb.grad)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_of_one_input_only(which):
    inputs = [leaf(20, 6).detach(), leaf(4, 6, seed=1).detach(), leaf(4, seed=2).detach()]
    inputs[which].requires_grad_()
    ops.linear(*inputs).square().sum().backward()
    reference = [double(t) for t in inputs]
    F.linear(*reference).square().sum().backward()
    assert_close(inputs[which].grad, reference[which].grad)


def test_what_stays_with_pytorch():
    x, weight = leaf(20, 6), leaf(4, 6, seed=1)
    assert uses_onednn(ops.linear(x, weight)) == ONEDNN_IS_FASTER
    assert not uses_onednn(ops.linear(x[:2], weight))  # few rows
    assert not uses_onednn(ops.linear(x.bfloat16(), weight.bfloat16()))
    assert not uses_onednn(ops.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight).dtype == torch.bfloat16
    with backends.use_backend("eager"):
        assert not uses_onednn(ops.linear(x, weight))
    assert ops.linear(x[:0], weight).shape == (0, 4)
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight), F.linear(double(x), double(weight)))


def test_errors_are_those_of_pytorch():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(torch.randn(20, 5), torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(torch.randn(20, 6), torch.randn(4, 6).double())
