"""gelu against F.gelu(approximate="tanh") in float64, under every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import GELU_SHAPES, assert_close, double, kernels, leaf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pygpt import ops
from pygpt.errors import InputTypeError
from pygpt.ops import backends
from pygpt.ops.gelu import gelu_reference

DTYPES = [torch.float32, torch.bfloat16]
needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GELU_SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_matches_float64(capability, shape, dtype, scale):
    x = leaf(*shape, dtype=dtype, scale=scale)
    reference = double(x)
    y, expected = ops.gelu(x), gelu_reference(reference)
    cotangent = leaf(*shape, dtype=dtype, seed=1).detach()
    y.backward(cotangent)
    expected.backward(cotangent.double())
    assert y.dtype == dtype
    assert_close(y, expected, dtype, "y", floor=scale)
    assert_close(x.grad, reference.grad, dtype, "grad")


@needs_extension
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 9), columns=st.integers(1, 40), step=st.integers(1, 3), dtype=st.sampled_from(DTYPES))
def test_strided_views(capability, rows, columns, step, dtype):
    x = leaf(rows, columns * step, dtype=dtype)[:, ::step]
    assert_close(ops.gelu(x), gelu_reference(x.double()), dtype)
    assert_close(ops.gelu(x.t()), gelu_reference(x.t().double()), dtype)


@needs_extension
@pytest.mark.parametrize(
    ("size", "with_gradient", "ours"), [(1023, False, 0), (1024, False, 1), (8191, True, 0), (8192, True, 1)]
)
def test_small_inputs_are_torchs(size, with_gradient, ours):
    x = torch.randn(size, requires_grad=True)
    expected = {"gelu_forward", "gelu_backward"} if with_gradient else {"gelu_forward"}
    with torch.set_grad_enabled(with_gradient):
        assert kernels(lambda: torch.autograd.grad(ops.gelu(x).sum(), x) if with_gradient else ops.gelu(x)) == (
            expected if ours else set()
        )


def test_small_inputs_of_other_strides_and_dtypes():
    x = torch.randn(8, 8).t()
    assert ops.gelu(x).is_contiguous()
    assert_close(ops.gelu(x), gelu_reference(x.double()))
    with pytest.raises(InputTypeError, match="expected a floating-point tensor"):
        ops.gelu(torch.ones(3, dtype=torch.int64))


def test_extremes(capability):
    x = torch.tensor([-1e9, -50.0, -10.0, -0.0, 0.0, 10.0, 50.0, 1e9], requires_grad=True)
    y = ops.gelu(x)
    y.sum().backward()
    assert_close(y, torch.tensor([0, 0, 0, 0, 0, 10, 50, 1e9], dtype=torch.float64))
    assert_close(x.grad, torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1], dtype=torch.float64))
    assert torch.isnan(ops.gelu(torch.tensor([float("nan")] * 17))).all()


@needs_extension
def test_opcheck_gradcheck_and_compile():
    x = leaf(4, 9)
    torch.library.opcheck(torch.ops.pygpt.gelu_forward.default, (x,))
    torch.library.opcheck(torch.ops.pygpt.gelu_backward.default, (x.detach(), x.detach()))
    assert torch.autograd.gradcheck(gelu_reference, (leaf(3, 4, dtype=torch.float64),))
    compiled = torch.compile(lambda t: ops.gelu(t) * 2, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), 2 * F.gelu(x.double(), approximate="tanh"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias(capability, dtype):
    for bias_dtype in {dtype, torch.float32}:
        x, bias, cotangent = (
            leaf(2, 5, 17, dtype=dtype),
            leaf(17, dtype=bias_dtype, seed=1),
            leaf(2, 5, 17, dtype=dtype, seed=2),
        )
        reference = double(x), double(bias)
        y, expected = ops.gelu(x, bias), gelu_reference(*reference)
        assert y.dtype == dtype
        assert_close(y, expected, dtype, "y")
        grads = torch.autograd.grad(y, (x, bias), cotangent)
        for actual, wanted in zip(grads, torch.autograd.grad(expected, reference, cotangent.double()), strict=True):
            # On CPUs x + bias is rounded before GELU, whose slope then is another one
            assert_close(actual, wanted, dtype, "grad", floor=4.0)


def test_bad_bias():
    for shape in [(4,), (3, 1), ()]:
        with pytest.raises(ValueError, match=r"bias must be \(C,\)"):
            ops.gelu(torch.ones(2, 3), torch.ones(shape))
    with pytest.raises(TypeError, match=r"bias is torch\.int64"):
        ops.gelu(torch.ones(2, 3), torch.ones(3, dtype=torch.long))


def test_bad_input():
    with pytest.raises(TypeError, match="floating-point"):
        ops.gelu(torch.ones(3, dtype=torch.long))


def test_far_from_zero(capability):
    """There GELU is x or 0 and its slope 1 or 0, up to the largest float."""
    far = torch.tensor([20.0, 1e3, 1e13, 1e20, 3e38])
    for sign in (1, -1):
        x = (sign * far).requires_grad_()
        y = ops.gelu(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, x.detach().clamp(min=0), rtol=0, atol=1e-30)
        torch.testing.assert_close(slope, (x.detach() > 0).float(), rtol=0, atol=1e-30)
    assert ops.gelu(torch.tensor([torch.nan])).isnan().all()
