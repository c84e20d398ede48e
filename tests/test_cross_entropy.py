"""The chunked head + loss against F.cross_entropy of whole logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import CROSS_ENTROPY_SHAPES, assert_close, double, leaf

from pygpt import use_backend
from pygpt.ops import backends, cross_entropy, linear_cross_entropy
from pygpt.ops.cross_entropy import linear_cross_entropy_reference


# The lowest instruction set has no products of bfloat16.
@pytest.fixture(autouse=True, params=["auto", "eager", "cpp", "cpp lowest"])
def backend(request):
    name, *lowest = request.param.split()
    if name == "cpp" and backends.extension is None:
        pytest.skip("pygpt._C is not built")
    if lowest:
        backends.extension.set_cpu_capability(backends.extension.available_cpu_capabilities()[0])
    with use_backend(name):
        yield
    if lowest:
        backends.extension.set_cpu_capability("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "C", "V"), CROSS_ENTROPY_SHAPES)
@pytest.mark.parametrize("rows", [16, 1000])
def test_matches_float64(monkeypatch, N, C, V, dtype, rows):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 4 * V)
    hidden, weight = leaf(N, C, dtype=dtype), leaf(V, C, dtype=dtype, seed=1)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    if N > 3:
        targets[[0, N // 2, N - 1]] = -100
    rh, rw = double(hidden), double(weight)
    loss, expected = linear_cross_entropy(hidden, weight, targets), linear_cross_entropy_reference(rh, rw, targets)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    assert_close(loss, expected, dtype)
    assert_close(hidden.grad, rh.grad, dtype, "grad hidden")
    assert_close(weight.grad, rw.grad, dtype, "grad weight")


def test_gradients_of_one_input_only():
    targets = torch.tensor([1, 2, 0])
    for which in (0, 1):
        inputs = [leaf(3, 4).detach(), leaf(5, 4, seed=1).detach()]
        inputs[which].requires_grad_()
        linear_cross_entropy(*inputs, targets).backward()
        reference = [double(t) for t in inputs]
        linear_cross_entropy_reference(*reference, targets).backward()
        assert_close(inputs[which].grad, reference[which].grad)
        assert inputs[1 - which].grad is None


def test_all_ignored_and_empty():
    hidden, weight = leaf(4, 8), leaf(10, 8, seed=1)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert torch.isnan(loss)  # a mean over nothing, as F.cross_entropy has it
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert torch.isnan(linear_cross_entropy(hidden[:0], weight, torch.zeros(0, dtype=torch.long)))


def test_large_logits_do_not_overflow():
    hidden, weight = leaf(6, 8, scale=300.0), leaf(20, 8, scale=30.0, seed=1)
    targets = torch.arange(6)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    expected = linear_cross_entropy_reference(hidden.double(), weight.double(), targets)
    assert_close(loss, expected)
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [16, 1000])
def test_a_weight_that_lies_by_columns(monkeypatch, dtype, rows):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 4 * 70)
    hidden, columns = leaf(33, 24, dtype=dtype), leaf(24, 70, dtype=dtype, seed=1)
    targets = torch.arange(33)
    linear_cross_entropy(hidden, columns.t(), targets).backward()
    reference = double(hidden), double(columns)
    linear_cross_entropy_reference(reference[0], reference[1].t(), targets).backward()
    assert_close(hidden.grad, reference[0].grad, dtype)
    assert_close(columns.grad, reference[1].grad, dtype)


def test_the_gradient_from_above_keeps_its_precision():
    hidden, weight, targets = leaf(33, 24), leaf(70, 24, seed=1), torch.arange(33)
    bf16 = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(*bf16, targets)
    third = torch.tensor(1 / 3)
    whole, parts = (torch.autograd.grad(loss, bf16, g, retain_graph=True) for g in (torch.ones(()), third))
    for of_whole, part in zip(whole, parts, strict=True):
        assert torch.equal(part, (of_whole.double() * third.double()).float().bfloat16())
        # What happens where the number lies on a GPU, which multiplies in the type of the result.
        assert torch.equal(torch.mul(of_whole, third.reshape(1), out=torch.empty_like(of_whole)), part)
    if backends.forced() != "cpp":  # which has no float16
        half = [t.detach().half().requires_grad_() for t in (hidden, weight)]
        scaled = torch.autograd.grad(65536 * linear_cross_entropy(*half, targets), half)  # as a GradScaler begins
        wide = [double(t) for t in half]
        plain = torch.autograd.grad(linear_cross_entropy_reference(*wide, targets), wide)
        for got, expected in zip(scaled, plain, strict=True):
            assert_close(got / 65536, expected, torch.float16, floor=0)


def test_autocast_matches_bfloat16_inputs():
    hidden, weight = leaf(9, 16), leaf(30, 16, seed=1)
    targets = torch.arange(9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert hidden.grad.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets))


def test_bad_input():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"\(N, C\) and \(V, C\)"):
        linear_cross_entropy(hidden, torch.randn(5, 3), targets)
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        linear_cross_entropy(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="target 5 at position 1"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 5, 2]))
    with pytest.raises(ValueError, match="target -1 at position 0"):
        linear_cross_entropy(hidden, weight, torch.tensor([-1, 1, 2]))
    with pytest.raises(TypeError, match="int64"):
        linear_cross_entropy(hidden, weight, targets.float())
    with pytest.raises(TypeError, match="dtype"):
        linear_cross_entropy(hidden, weight.double(), targets)
    with torch.no_grad(), pytest.raises(ValueError, match="targets is on meta"):
        linear_cross_entropy(hidden, weight, targets.to("meta"))


def test_tensors_without_data():
    hidden, weight, targets = (t.to("meta") for t in (leaf(3, 4), leaf(5, 4), torch.tensor([0, 1, 2])))
    assert linear_cross_entropy(hidden, weight, targets).device.type == "meta"


def test_the_reference_and_the_kernel_agree_through_the_whole_op():
    targets = torch.tensor([3, -100, 40, 7, 0])
    results = []
    for backend in ("eager", "auto"):
        with use_backend(backend):
            hidden, weight = leaf(5, 16), leaf(70, 16, seed=1)
            loss = linear_cross_entropy(hidden, weight, targets)
            loss.backward()
            results.append((loss, hidden.grad, weight.grad))
    for x, y in zip(*results, strict=True):
        assert_close(x, y)


def test_no_gradients_are_computed_where_none_are_wanted(monkeypatch):
    wanted = []

    def record(logits, targets, ignore_index, factor):
        wanted.append(factor is not None)
        return rows(logits, targets, ignore_index, factor)

    rows = cross_entropy._rows
    monkeypatch.setattr(cross_entropy, "_rows", record)
    hidden, weight, targets = leaf(5, 8), leaf(11, 8, seed=1), torch.arange(5)
    with use_backend("eager"):
        with torch.no_grad():
            loss = linear_cross_entropy(hidden, weight, targets)
        assert not loss.requires_grad
        assert_close(loss, F.cross_entropy(hidden.double() @ weight.double().t(), targets))
        assert linear_cross_entropy(hidden, weight, targets).requires_grad
    assert wanted == [False, True]
