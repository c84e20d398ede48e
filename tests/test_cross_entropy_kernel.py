"""The compiled kernels of the head + loss, at every instruction set, against F.cross_entropy in float64."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from common import VOCABULARIES, assert_close, cross_entropy_rows_case, double, leaf

from pygpt.ops import backends, cross_entropy, linear_cross_entropy
from pygpt.ops.cross_entropy import linear_cross_entropy_reference

linear_module = sys.modules["pygpt.ops.linear"]  # pygpt.ops.linear is the function


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
