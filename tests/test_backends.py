"""The registry: who answers, what forcing a backend does, and what is said where a backend cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import pygpt
from pygpt import ops
from pygpt.errors import InputError
from pygpt.ops import backends
from pygpt.ops.linear import ONEDNN_IS_FASTER

needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
OPS = {
    "embedding",
    "layer_norm",
    "add_layer_norm",
    "causal_attention",
    "gelu",
    "linear",
    "linear_cross_entropy",
    "linear_int8",
    "adamw",
}


@needs_extension
def test_cpp_answers_by_default_where_it_has_a_kernel():
    table = pygpt.backends()
    assert set(table) == OPS
    for op in OPS:
        assert table[op]["cpu"] == "cpp"


@needs_extension
def test_use_backend_as_function_and_as_context():
    x, weight = torch.randn(backends.SMALL_IN_FLOAT32 // 8, 8, requires_grad=True), torch.ones(8)

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
    assert set(who(torch.randn(backends.SMALL_IN_FLOAT32 // 8 - 1, 8))) == {"NativeLayerNormBackward0"}
    assert "NativeLayerNormBackward0" not in who(torch.randn(backends.SMALL_IN_FLOAT32 // 8, 8))
    with pygpt.use_backend("cpp"):
        assert "NativeLayerNormBackward0" not in who(small)
    weight, bias = (t.detach().bfloat16().requires_grad_() for t in (weight, bias))
    assert set(who(torch.randn(backends.SMALL // 8 - 1, 8).bfloat16())) == {"NativeLayerNormBackward0"}
    assert "NativeLayerNormBackward0" not in who(torch.randn(backends.SMALL // 8, 8).bfloat16())


@needs_extension
def test_without_gradients_fewer_small_cpu_tensors_go_to_torch():
    table, targets = torch.randn(65, 16), torch.randint(0, 65, (768,))
    targets[5] = -100
    weight = torch.rand(8)

    class Ran(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    def ran(call, *inputs: torch.Tensor) -> set[str]:
        names.clear()
        with Ran():
            call(*inputs)
        return {name for name in names if name.startswith("pygpt::")}

    names: set[str] = set()
    x = torch.randn(backends.SMALL // 8, 8)
    hidden = torch.randn(768, 16)
    assert ran(ops.add_layer_norm, x, x, weight) == set()
    with torch.no_grad():
        assert ran(ops.add_layer_norm, x, x, weight) == {"pygpt::add_layer_norm_forward"}
        assert ran(ops.add_layer_norm, x[1:], x[1:], weight) == set()
        assert ran(ops.layer_norm, x, weight) == set()
        assert ran(ops.linear_cross_entropy, hidden, table, targets) == {"pygpt::cross_entropy_"}
        assert ran(ops.linear_cross_entropy, hidden.double(), table.double(), targets) == set()
        loss = ops.linear_cross_entropy(hidden, table, targets)
        expected = F.cross_entropy(hidden.double() @ table.double().T, targets)
        assert abs(loss.item() - expected.item()) < 1e-6 * expected.item()
        with pytest.raises(InputError, match="position 7"):
            ops.linear_cross_entropy(hidden, table, targets.index_fill(0, torch.tensor(7), 65))
    assert ran(ops.linear_cross_entropy, hidden.requires_grad_(), table, targets) == set()


@needs_extension
def test_a_plain_gather_is_torchs_own_without_gradients_or_if_it_is_small():
    table, idx = torch.randn(5, 8, requires_grad=True), torch.tensor([[1, 4]])

    def who(idx: torch.Tensor, *tables: torch.Tensor) -> str:
        return type(ops.embedding(idx, *tables).grad_fn).__name__

    assert who(idx, table) == "EmbeddingBackward0"
    assert who(idx.expand(backends.SMALL_IN_FLOAT32 // 16, 2), table) != "EmbeddingBackward0"
    assert who(idx, table, table) != "EmbeddingBackward0"
    assert who(idx, table.detach().bfloat16().requires_grad_()) != "EmbeddingBackward0"  # torch sums rows in bfloat16
    with pygpt.use_backend("cpp"):
        assert who(idx, table) != "EmbeddingBackward0"
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
    code = (  # and importing stays light: a compiler takes longer to import than torch
        "import pygpt, sys; assert not {'torch._dynamo', 'triton', 'transformers'} & sys.modules.keys()\n"
        "print(pygpt.backends()['layer_norm']['cpu'])"
    )
    assert run(code, PYGPT_BACKEND="eager").stdout.strip() == "eager"
    broken = run(code, PYGPT_BACKEND="fast")
    assert broken.returncode != 0
    assert "unknown backend 'fast'" in broken.stderr


@needs_extension
def test_cpu_capability_variable():
    good = run("import pygpt; print(pygpt.build_info()['CPU capability'])", PYGPT_CPU_CAPABILITY="default")
    assert good.stdout.startswith("default (of ")
    code = """
import pygpt, torch
x = torch.ones(1024)  # fewer are F.gelu's, which asks for no capability
for ask in (
    lambda: pygpt.ops.gelu(x), lambda: pygpt.ops.gelu(x), pygpt.backends, pygpt.ops.backends.report, pygpt.build_info,
    lambda: pygpt.use_backend("cpp"), lambda: torch.ops.pygpt.gelu_forward(x),
):
    try:
        print(ask())
    except ValueError as error:
        print(str(error).splitlines()[0])
"""
    bad = run(code, PYGPT_CPU_CAPABILITY="avx1024")
    lines = bad.stdout.splitlines()
    assert len(lines) == 7, bad.stderr  # the import went well, nothing crashed
    for line in lines:
        assert line.startswith("PYGPT_CPU_CAPABILITY 'avx1024' is unknown")
        assert line.endswith("choose one of " + ", ".join(backends.extension.available_cpu_capabilities()))


def _op(name: str, x: torch.Tensor) -> torch.Tensor:
    """An op of x (rows, 32) where it gets its gradient; embedding: of x as its table."""
    weight = torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)
    if name == "layer_norm":
        return ops.layer_norm(x, weight)
    if name == "add_layer_norm":
        return ops.add_layer_norm(x, x.flip(0), weight)[0]
    if name == "gelu":
        return ops.gelu(x)
    if name == "linear":
        return ops.linear(x, torch.outer(torch.linspace(-1, 1, 16), weight))
    if name == "linear_cross_entropy":
        return ops.linear_cross_entropy(x, weight.repeat(40, 1).cumsum(0), torch.arange(len(x)) % 40)
    if name == "embedding":
        return ops.embedding(torch.tensor([[1, 0, 1]]), x, x.flip(1))
    q = x.view(1, len(x), 2, -1)
    return ops.causal_attention(q, q.flip(3), q)


OF_PLAIN_TORCH = ("layer_norm", "add_layer_norm", "gelu", "linear", "linear_cross_entropy", "embedding")
ALL = (*OF_PLAIN_TORCH, "causal_attention")


def _math_attention() -> AbstractContextManager[None]:
    """torch's fused attention for CPUs has neither second nor forward-mode derivatives."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


@needs_extension
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("grad", ["constant", "of x"])
def test_a_second_derivative_is_an_error_never_a_wrong_number(name, grad):
    torch.manual_seed(0)
    x = torch.randn(40, 32, requires_grad=True)
    if name == "linear" and not ONEDNN_IS_FASTER:
        pytest.skip("linear is torch's own on this processor")

    def penalty() -> torch.Tensor:
        y = _op(name, x)
        y = y.sin() if grad == "of x" else y
        (first,) = torch.autograd.grad(y.sum() + x.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    if name == "embedding" and grad == "constant":  # its gradient c does not depend on the table: (|c + 2 x|^2)' by x
        c = torch.autograd.grad(_op(name, x).sum(), x)[0]
        torch.testing.assert_close(penalty(), 4 * (c + 2 * x.detach()))
        return
    with (
        pygpt.use_backend("cpp"),
        pytest.raises(pygpt.errors.PygptError, match=f"{name} has no second derivative; for "),
    ):
        penalty()
    if name != "linear_cross_entropy":  # what the message says to do works
        with pygpt.use_backend("eager"), _math_attention():
            assert penalty().isfinite().all()


@needs_extension
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rows", [3, backends.SMALL_IN_FLOAT32 // 32])
def test_forward_mode_and_torch_func_run_the_reference(name, rows):
    rows = min(rows, 50) if name == "causal_attention" else rows
    torch.manual_seed(0)
    x, tangent = torch.randn(rows, 32), torch.randn(rows, 32)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return _op(name, x).square().sum()

    x64, tangent64 = x.double(), tangent.double()
    step = 1e-6 * tangent64
    with pygpt.use_backend("eager"):  # central differences in float64
        expected = (_op(name, x64 + step) - _op(name, x64 - step)) / 2e-6
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    with _math_attention():
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(_op(name, forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.func.jvp(lambda x: _op(name, x), (x,), (tangent,))[1], found)
        torch.testing.assert_close(torch.func.grad(loss)(x), gradient, rtol=1e-4, atol=1e-4)
        if name != "linear":  # which has no kernel where torch's is as fast
            with (
                pygpt.use_backend("cpp"),
                pytest.raises(ValueError, match="no formula for forward-mode differentiation"),
            ):
                torch.func.grad(loss)(x)


def test_gradients_of_each_example_by_vmap():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4, 20, 8), torch.randn(30, 8), torch.randint(30, (4, 20))

    def loss(weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        h = ops.layer_norm(ops.gelu(ops.linear(hidden, weight[:8])), torch.ones(8))
        return ops.linear_cross_entropy(h, weight, targets)

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, hidden, targets)
    for i in range(4):
        w = weight.clone().requires_grad_()
        loss(w, hidden[i], targets[i]).backward()
        torch.testing.assert_close(each[i], w.grad, rtol=1e-4, atol=1e-5)
