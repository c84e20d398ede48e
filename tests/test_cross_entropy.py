"""The chunked head + loss against F.cross_entropy of whole logits in float64."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from common import CROSS_ENTROPY_SHAPES, VOCABULARIES, assert_close, cross_entropy_rows_case, double, leaf

from pygpt import use_backend
from pygpt.ops import backends, cross_entropy, linear_cross_entropy
from pygpt.ops.cross_entropy import linear_cross_entropy_reference

linear_module = sys.modules["pygpt.ops.linear"]  # pygpt.ops.linear is the function


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_compiled_rows_match_float64(capability, V, dtype):
    cross_entropy_rows_case(torch.ops.pygpt.cross_entropy_rows_, V, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 500])
@pytest.mark.parametrize("V", [3, 64, 65, 1025])
def test_compiled_mean_matches_float64(capability, V, rows, dtype):
    """Over the rows that count: of less than a vector, of whole ones, with some logits more, of more than a block."""
    generator = torch.Generator().manual_seed(V + rows)
    logits = (torch.randn(rows, V, generator=generator) * 3).to(dtype)
    targets = torch.randint(V, (2 * rows,), generator=generator)[::2]
    targets[1::3] = -1
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-1)
    expected.backward()
    kept = logits.clone()
    assert_close(torch.ops.pygpt.cross_entropy_(kept, targets, -1, False), expected, torch.float32)
    assert torch.equal(kept, logits)
    assert_close(torch.ops.pygpt.cross_entropy_(logits, targets, -1, True), expected, torch.float32)
    assert_close(logits, exact.grad, dtype)
    assert torch.isnan(torch.ops.pygpt.cross_entropy_(logits, torch.full((rows,), -1), -1, True))
    assert not logits.any()


def test_compiled_mean_refuses_what_it_cannot_read(capability):
    mean = torch.ops.pygpt.cross_entropy_
    with pytest.raises(RuntimeError, match="cross_entropy_: a target is outside the vocabulary"):
        mean(torch.zeros(2, 3), torch.tensor([0, 3]), -100, True)
    with pytest.raises(RuntimeError, match="contiguous"):
        mean(torch.zeros(3, 2).t(), torch.tensor([0, 1]), -100, True)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        mean(torch.zeros(2, 3).double(), torch.tensor([0, 1]), -100, True)
    with pytest.raises(RuntimeError, match="int64"):
        mean(torch.zeros(2, 3), torch.tensor([0, 1]).int(), -100, True)


def test_compiled_rows_do_not_hide_nan(capability):
    for bad, V, at in itertools.product((torch.nan, torch.inf), (40, 41, 2000), (0, 17, -1)):
        logits = torch.zeros(2, V)
        logits[0, at] = bad
        losses = torch.ops.pygpt.cross_entropy_rows_(logits, torch.tensor([3, 3]), -100, torch.ones(()))
        assert torch.isnan(losses[0])
        assert torch.isfinite(losses[1])
        assert torch.isnan(logits[0]).any()
        assert torch.isfinite(logits[1]).all()
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        torch.ops.pygpt.cross_entropy_rows_(torch.zeros(2, 3), torch.tensor([0, 3]), -100, torch.ones(()))
    for factor in (torch.ones(2), torch.ones((), dtype=torch.double)):
        with pytest.raises(RuntimeError, match="grad_factor must be a float32 scalar"):
            torch.ops.pygpt.cross_entropy_rows_(torch.zeros(2, 3), torch.tensor([0, 1]), -100, factor)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("rows", [16, 1000])
def test_products_in_float32(monkeypatch, capability, rows, needed, at_once):
    """Of bfloat16 where it has no instructions: part by part, or at once where that fits. Elsewhere as ever."""
    N, C, V = 50, 24, 130
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 6 * V)
    for module in (cross_entropy, linear_module):
        monkeypatch.setattr(module, "SLICE_BYTES", 4 * (N * C + V * C) if at_once else 4 << 10)
    inputs = leaf(N, C, dtype=torch.bfloat16), leaf(V, C, dtype=torch.bfloat16, seed=1)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    targets[::7] = -100
    exact = [double(x) for x in inputs]
    expected = linear_cross_entropy_reference(*exact, targets)
    expected.backward()
    loss, *grads = cross_entropy._loss_and_gradients(*(x.detach() for x in inputs), targets, -100, *needed)
    assert_close(loss, expected, torch.bfloat16)
    for grad, want, reference in zip(grads, needed, exact, strict=True):
        assert (grad is not None) == want
        if grad is not None:
            assert grad.dtype == torch.bfloat16
            assert_close(grad, reference.grad, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph_with_few_logits(capability, dtype):
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    inputs, targets = (leaf(20, 8, dtype=dtype), leaf(65, 8, dtype=dtype, seed=1)), torch.arange(20)
    loss, expected = compiled(*inputs, targets), linear_cross_entropy_reference(*map(double, inputs), targets)
    assert_close(loss, expected, dtype)


@pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
def test_the_means_operator_keeps_torchs_rules():
    for need in (True, False):
        torch.library.opcheck(torch.ops.pygpt.cross_entropy_.default, (torch.randn(5, 40), torch.arange(5), -100, need))


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
