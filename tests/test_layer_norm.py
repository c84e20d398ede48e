"""layer_norm and add_layer_norm against F.layer_norm in float64, under every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import LAYER_NORM_SHAPES, assert_close, double, leaf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from pygpt import ops
from pygpt.ops import backends
from pygpt.ops.layer_norm import add_layer_norm_reference, layer_norm_reference

DTYPES = [torch.float32, torch.bfloat16]
# Floor of the comparison of gradients: of 1 or 2 columns they cancel out but for roundings, times up to 1 / sqrt(eps).
FLOOR = {1: 3.0, 2: 3.0}
needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")


def compare(x, residual, weight, bias, dtype):
    """Forward and every gradient of both ops, against float64."""
    floor = FLOOR.get(x.shape[-1], 1e-3)
    inputs = [x, residual, weight, bias]
    reference_inputs = [double(t) for t in inputs]
    rx, rr, rw, rb = reference_inputs
    total = (rx + rr).to(dtype).double().detach().requires_grad_()  # statistics are those of the rounded sum
    cotangent = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(dtype)

    y = ops.layer_norm(x, weight, bias)
    y.backward(cotangent)
    ry = F.layer_norm(rx, rw.shape, rw, rb)
    ry.backward(cotangent.double())
    assert y.dtype == dtype
    assert_close(y, ry, dtype, "y")
    for name, t, r in zip(["x", "weight", "bias"], [x, weight, bias], [rx, rw, rb], strict=True):
        if t is not None:
            assert_close(t.grad, r.grad, dtype, f"grad {name}", floor)
            t.grad = r.grad = None

    y, s = ops.add_layer_norm(x, residual, weight, bias)
    torch.autograd.backward([y, s], [cotangent, cotangent])
    ry = F.layer_norm(total, rw.shape, rw, rb)
    torch.autograd.backward([ry, total * 1.0], [cotangent.double(), cotangent.double()])
    assert_close(y, ry, dtype, "add: y")
    assert_close(s, rx + rr, dtype, "add: sum")
    assert torch.equal(x.grad, residual.grad)
    assert_close(x.grad, total.grad, dtype, "add: grad x", floor)
    assert_close(weight.grad, rw.grad, dtype, "add: grad weight")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYER_NORM_SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_matches_float64(capability, shape, dtype, with_bias):
    C = shape[-1]
    x, residual = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype, seed=1)
    weight, bias = leaf(C, dtype=dtype, seed=2), leaf(C, dtype=dtype, seed=3) if with_bias else None
    compare(x, residual, weight, bias, dtype)


def laid_out(values: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides. Between those of "step" lies NaN, so that reading past them is seen."""
    if how == "transposed":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "step":
        return torch.stack([values, torch.full_like(values, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    return values


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    C=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(["same", "float32"]),
    has_bias=st.booleans(),
    fused=st.booleans(),
    strides=st.lists(st.sampled_from(["contiguous", "step", "transposed"]), min_size=6, max_size=6),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_odd_shapes_and_strides(rows, C, dtype, weight_dtype, has_bias, fused, strides, scale):
    """Forward and backward of both ops at every level; x, residual, both gradients, weight and bias each with strides of
    their own."""
    floor = FLOOR.get(C, 1e-3)

    def tensor(i: int, *shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> torch.Tensor:
        return laid_out(leaf(*shape, dtype=dtype, seed=i, scale=scale).detach(), strides[i]).requires_grad_(i < 4)

    wide = dtype if weight_dtype == "same" else torch.float32
    x, residual = (tensor(i, rows, C, scale=scale) for i in (0, 1))
    weight, bias = tensor(2, C, dtype=wide), tensor(3, C, dtype=wide) if has_bias else None
    grads = [tensor(i, rows, C) for i in (4, 5)][: 1 + fused]
    inputs = [t for t in (x, residual if fused else None, weight, bias) if t is not None]
    exact = {id(t): t.detach().double().requires_grad_() for t in inputs}
    arguments = [t if t is None else exact[id(t)] for t in ((x, residual) if fused else (x,)) + (weight, bias)]
    if fused:  # the statistics are those of the sum as it is rounded
        total = (x + residual).detach()
        rounded = exact[id(x)] + exact[id(residual)]
        rounded = rounded + (total.double() - rounded).detach()
        expected = (layer_norm_reference(rounded, *arguments[2:]), rounded)
    else:
        expected = (layer_norm_reference(*arguments),)
    wanted = torch.autograd.grad(expected, list(exact.values()), [g.double() for g in grads])
    try:
        for level in backends.extension.available_cpu_capabilities():
            backends.extension.set_cpu_capability(level)
            with backends.use_backend("cpp"):
                out = ops.add_layer_norm(x, residual, weight, bias) if fused else (ops.layer_norm(x, weight, bias),)
                found = torch.autograd.grad(out, inputs, grads)
            for name, a, b in zip(("y", "sum"), out, expected, strict=False):
                assert_close(a, b, dtype, f"{level} {name}")
            for a, b, t in zip(found, wanted, inputs, strict=True):
                assert_close(a, b, dtype, f"{level} gradient of {tuple(t.shape)}", floor)
    finally:
        backends.extension.set_cpu_capability("")


@needs_extension
@pytest.mark.parametrize("how", ["step", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_read_strided_tensors(how, dtype):
    """Each argument on its own, those included that pygpt.ops never has strided: the same bits."""
    x, residual, grad, grad_sum = (leaf(9, 33, dtype=dtype, seed=i).detach() for i in range(4))
    weight, bias = (leaf(33, dtype=dtype, seed=i).detach() for i in (4, 5))
    mean, rstd = leaf(9, seed=6).detach(), leaf(9, seed=7).detach().abs()
    for op, arguments in (
        ("layer_norm_forward", (x, weight, bias, 1e-5)),
        ("add_layer_norm_forward", (x, residual, weight, bias, 1e-5)),
        ("layer_norm_backward", (grad, x, weight, mean, rstd, True)),
        ("add_layer_norm_backward", (grad, grad_sum, x, weight, mean, rstd, True)),
    ):
        run = getattr(torch.ops.pygpt, op)
        expected = run(*arguments)
        for i, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                found = run(*arguments[:i], laid_out(argument, how), *arguments[i + 1 :])
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), f"{op}: argument {i}"


def test_large_mean_keeps_its_variance(capability):
    # E[x^2] - E[x]^2 would lose every digit here; the centred sum of squares must not.
    x = torch.randn(4, 256) + 3000.0
    weight = torch.ones(256)
    assert_close(ops.layer_norm(x, weight), F.layer_norm(x.double(), (256,)), torch.bfloat16)
    constant = ops.layer_norm(torch.full((2, 64), 1e4), torch.ones(64))
    assert torch.isfinite(constant).all()


def test_same_bits_for_any_number_of_threads(capability):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, weight, bias = leaf(301, 96), leaf(96, seed=1), leaf(96, seed=2)
        ops.layer_norm(x, weight, bias).square().sum().backward()
        results.append(torch.cat([x.grad.flatten(), weight.grad, bias.grad]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_extension
def test_opcheck():
    x, residual = leaf(6, 20), leaf(6, 20, seed=1)
    for bias in (leaf(20, seed=3), None):
        weight = leaf(20, seed=2)
        torch.library.opcheck(torch.ops.pygpt.layer_norm_forward.default, (x, weight, bias, 1e-5))
        torch.library.opcheck(torch.ops.pygpt.add_layer_norm_forward.default, (x, residual, weight, bias, 1e-5))
        _, mean, rstd = torch.ops.pygpt.layer_norm_forward.default(x.detach(), weight.detach(), None, 1e-5)
        saved = (weight.detach(), mean, rstd, bias is not None)
        torch.library.opcheck(torch.ops.pygpt.layer_norm_backward.default, (x.detach(), x.detach(), *saved))
        torch.library.opcheck(
            torch.ops.pygpt.add_layer_norm_backward.default, (x.detach(), x.detach(), x.detach(), *saved)
        )


@needs_extension
def test_operator_has_the_same_gradients_without_the_seam():
    inputs = [leaf(5, 12), leaf(5, 12, seed=1), leaf(12, seed=2), leaf(12, seed=3)]
    y, total = torch.ops.pygpt.add_layer_norm_forward(*inputs, 1e-5)[:2]
    with backends.use_backend("cpp"):
        seam_y, seam_total = ops.add_layer_norm(*inputs)
    direct = torch.autograd.grad((y * total).sum(), inputs)
    for a, b in zip(direct, torch.autograd.grad((seam_y * seam_total).sum(), inputs), strict=True):
        assert torch.equal(a, b)


@needs_extension
def test_bad_input_to_the_operator():
    x, weight, stats = torch.randn(3, 8), torch.ones(8), torch.ones(3)
    op = torch.ops.pygpt
    with pytest.raises(RuntimeError, match="bias must be"):
        op.layer_norm_forward(x, weight, torch.ones(7), 1e-5)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        op.layer_norm_forward(x, weight.half(), None, 1e-5)
    with pytest.raises(RuntimeError, match="mean and rstd must be"):
        op.layer_norm_backward(x, x, weight, torch.ones(2), stats, True)
    with pytest.raises(RuntimeError, match="must have its dtype"):
        op.add_layer_norm_backward(x, x[:2], x, weight, stats, stats, True)


def test_gradcheck_of_the_reference():
    x, residual, weight, bias = (
        leaf(*s, dtype=torch.float64, seed=i) for i, s in enumerate([(3, 5), (3, 5), (5,), (5,)])
    )
    assert torch.autograd.gradcheck(layer_norm_reference, (x, weight, bias))
    assert torch.autograd.gradcheck(add_layer_norm_reference, (x, residual, weight, bias))


def test_only_one_output_used(capability):
    # Autograd then passes zeros for the other output's gradient.
    x, residual, weight = leaf(4, 8), leaf(4, 8, seed=1), leaf(8, seed=2)
    ops.add_layer_norm(x, residual, weight)[1].sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 8))
    assert torch.equal(weight.grad, torch.zeros(8))


@needs_extension
def test_compiles_without_graph_breaks():
    def step(x, residual, weight, bias):
        y, s = ops.add_layer_norm(x, residual, weight, bias)
        return ops.layer_norm(y, weight, bias) + s

    args = [leaf(4, 32), leaf(4, 32, seed=1), leaf(32, seed=2), leaf(32, seed=3)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), step(*args))


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_bad_input(backend):
    if backend == "cpp" and backends.extension is None:
        pytest.skip("pygpt._C is not built")
    x, weight = torch.randn(2, 8), torch.ones(8)
    with backends.use_backend(backend):
        with pytest.raises(ValueError, match=r"weight must be \(C,\)"):
            ops.layer_norm(x, torch.ones(7))
        with pytest.raises(ValueError, match="bias"):
            ops.layer_norm(x, weight, torch.ones(9))
        with pytest.raises(TypeError, match="floating-point"):
            ops.layer_norm(x.long(), weight)
        with pytest.raises(TypeError, match=r"weight is torch\.float64"):
            ops.layer_norm(x, weight.double())
        with pytest.raises(ValueError, match="on meta"):
            ops.layer_norm(x, weight.to("meta"))
        with pytest.raises(ValueError, match="same shape"):
            ops.add_layer_norm(x, torch.randn(3, 8), weight)
        with pytest.raises(ValueError, match="empty last dimension"):
            ops.layer_norm(torch.ones(2, 0), torch.ones(0))


def test_forced_backend_does_not_fall_back():
    if backends.extension is None:
        pytest.skip("pygpt._C is not built")
    x, weight = torch.randn(2, 8).half(), torch.ones(8).half()
    with backends.use_backend("cpp"), pytest.raises(ValueError, match="no float16 kernel"):
        ops.layer_norm(x, weight)
    assert_close(ops.layer_norm(x, weight), F.layer_norm(x.double(), (8,)))  # auto: the reference serves it


def test_compiling_does_not_tie_the_result_to_a_number_of_rows():
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    weight, bias = leaf(16, seed=2), leaf(16, seed=3)
    compiled = torch.compile(lambda x: ops.layer_norm(x, weight, bias), backend=count, fullgraph=True, dynamic=True)
    for rows in (
        2,
        3,
        50,
        backends.SMALL_IN_FLOAT32 // 16,
    ):  # on both sides of the size below which eager calls go to torch
        x = leaf(rows, 16)
        torch.testing.assert_close(compiled(x), layer_norm_reference(x, weight, bias))
    assert len(graphs) == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_small_inputs_on_a_gpu_keep_their_dtype(autocast):
    """They go to torch's own, which autocast has in float32. No GPU is needed: the tensors are fake."""
    with FakeTensorMode():
        x, weight, wide = (torch.empty(size, device="cuda") for size in ((64, 768), (768,), (768,)))
        x, weight = x.bfloat16(), weight.bfloat16()
        torch.set_autocast_enabled("cuda", autocast)  # torch.autocast itself does nothing without a GPU
        try:
            for scale in (weight, wide):
                results = (ops.layer_norm(x, scale), *ops.add_layer_norm(x, x, scale))
                assert [(y.dtype, y.shape) for y in results] == [(torch.bfloat16, x.shape)] * 3
        finally:
            torch.set_autocast_enabled("cuda", False)
