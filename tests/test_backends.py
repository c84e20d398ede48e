"""The registry: who answers, what forcing a backend does, and what is said where a backend cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pygpt
from pygpt import ops
from pygpt.ops import backends

needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
OPS = {"embedding", "layer_norm", "add_layer_norm", "causal_attention", "gelu", "linear", "linear_cross_entropy"}


@needs_extension
def test_cpp_answers_by_default_where_it_has_a_kernel():
    table = pygpt.backends()
    assert set(table) == OPS
    for op in OPS - {"linear_cross_entropy", "linear"}:  # linear: by processor, see test_linear.py
        assert table[op]["cpu"] == "cpp"
    assert table["linear_cross_entropy"]["cpu"] == "eager"


@needs_extension
def test_use_backend_as_function_and_as_context():
    x, weight = torch.randn(backends.SMALL // 8, 8, requires_grad=True), torch.ones(8)

    def who() -> str:
        return type(ops.layer_norm(x, weight).grad_fn).__name__

    default = who()
    with pygpt.use_backend("eager"):
        assert who() == "NativeLayerNormBackward0"
        with pygpt.use_backend("cpp"):
            assert who() == default
        assert who() == "NativeLayerNormBackward0"
    assert who() == default != "NativeLayerNormBackward0"
    pygpt.use_backend("eager")
    assert who() == "NativeLayerNormBackward0"
    pygpt.use_backend("auto")
    assert who() == default


@needs_extension
def test_small_cpu_tensors_go_to_torch_unless_a_backend_is_forced():
    weight, bias = torch.rand(8, requires_grad=True), torch.rand(8, requires_grad=True)
    small = torch.randn(2, 8, requires_grad=True)

    def who(x: torch.Tensor) -> tuple[str, str]:
        outputs = ops.layer_norm(x, weight, bias), ops.add_layer_norm(x, x, weight, bias)[0]
        return tuple(type(y.grad_fn).__name__ for y in outputs)

    assert set(who(small)) == {"NativeLayerNormBackward0"}
    assert "NativeLayerNormBackward0" not in who(torch.randn(backends.SMALL // 8, 8))
    with pygpt.use_backend("cpp"):
        assert "NativeLayerNormBackward0" not in who(small)


@needs_extension
def test_a_plain_gather_is_torchs_own_only_without_gradients():
    table, idx = torch.randn(5, 8), torch.tensor([[1, 4]])
    assert type(ops.embedding(idx, table.requires_grad_()).grad_fn).__name__ != "EmbeddingBackward0"
    with torch.no_grad():
        assert torch.equal(ops.embedding(idx, table), table[idx])
        for bad in (-1, 5):  # torch accepts no such id either; the message stays ours
            with pytest.raises(ValueError, match=f"token id {bad} at row 0, position 1 is outside the vocabulary of 5"):
                ops.embedding(torch.tensor([[1, bad]]), table)


def test_unknown_and_unavailable_backends():
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        pygpt.use_backend("fast")
    if not torch.cuda.is_available():
        for name in ("cuda", "triton"):
            with pytest.raises(ValueError, match=f"backend '{name}' is not available: .+"):
                pygpt.use_backend(name)
    assert backends.forced() is None


def test_report_gives_a_reason_for_every_backend_not_in_use():
    rows = backends.report()
    assert {(row.op, row.device) for row in rows} >= {(op, "cpu") for op in OPS}
    for row in rows:
        assert row.backend in backends.BACKENDS
        assert all(reason.strip() for reason in row.why_not.values()), row
        assert row.backend not in row.why_not


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_environment_variables():
    code = "import pygpt; print(pygpt.backends()['layer_norm']['cpu'])"
    assert run(code, PYGPT_BACKEND="eager").stdout.strip() == "eager"
    broken = run(code, PYGPT_BACKEND="fast")
    assert broken.returncode != 0
    assert "unknown backend 'fast'" in broken.stderr


@needs_extension
def test_cpu_capability_variable():
    code = "import pygpt._C as c; print(c.cpu_capability())"
    assert run("import torch; " + code, PYGPT_CPU_CAPABILITY="default").stdout.strip() == "default"
    broken = run("import torch; " + code, PYGPT_CPU_CAPABILITY="avx1024")
    assert "avx1024" in broken.stderr
    assert broken.returncode == 1  # an exception, not a crash


def _op(name: str, x: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
    if name == "layer_norm":
        return ops.layer_norm(x, weight)
    if name == "add_layer_norm":
        return ops.add_layer_norm(x, x.flip(0), weight)[0]
    if name == "gelu":
        return ops.gelu(x)
    if name == "linear":
        return ops.linear(x, weight.repeat(16, 1))
    if name == "linear_cross_entropy":
        return ops.linear_cross_entropy(x, weight.repeat(40, 1).cumsum(0), torch.arange(len(x)) % 40)
    q = x.view(1, len(x), 2, -1)
    return ops.causal_attention(q, q.flip(3), q)


DIFFERENTIABLE = ("layer_norm", "add_layer_norm", "gelu", "linear", "linear_cross_entropy", "causal_attention")


@needs_extension
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("grad", ["constant", "of x"])
def test_a_second_derivative_is_an_error_never_a_wrong_number(name, grad):
    torch.manual_seed(0)
    x = torch.randn(SECOND_ROWS, 32, requires_grad=True)
    with pygpt.use_backend("cpp"):
        y = _op(name, x) * (1.0 if grad == "constant" else x.sum())
        (first,) = torch.autograd.grad(y.sum() + x.square().sum(), x, create_graph=True)
        if type(_op(name, x).grad_fn).__name__ == "AddmmBackward0":  # torch's own product
            return
        with pytest.raises(pygpt.errors.PygptError, match=r"no second derivative; .* pygpt.use_backend\('eager'\)"):
            torch.autograd.grad(first.square().sum(), x)
    with pygpt.use_backend("eager"):
        (first,) = torch.autograd.grad(_op(name, x).sum(), x, create_graph=True)
        if name != "linear_cross_entropy" and name != "causal_attention":
            torch.autograd.grad(first.square().sum() + 0 * x.sum(), x)


SECOND_ROWS = 40


@needs_extension
@pytest.mark.parametrize("name", DIFFERENTIABLE[:4])
@pytest.mark.parametrize("rows", [3, backends.SMALL // 32])
def test_forward_mode_and_torch_func_run_the_reference(name, rows):
    torch.manual_seed(0)
    x, tangent = torch.randn(rows, 32), torch.randn(rows, 32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(_op(name, dual)).tangent
    with pygpt.use_backend("eager"):
        _, expected = torch.func.jvp(lambda x: _op(name, x), (x,), (tangent,))
        gradient = torch.func.grad(lambda x: _op(name, x).square().sum())(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.func.grad(lambda x: _op(name, x).square().sum())(x), gradient)
    with pygpt.use_backend("cpp"), pytest.raises(ValueError, match="no formula for forward-mode differentiation"):
        torch.func.grad(lambda x: ops.gelu(x).sum())(x)
