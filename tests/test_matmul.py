"""Products of matrices, by vectors and by AMX tiles, and the head with its loss that is made of them by tiles, against float64.

tests/test_linear.py and tests/test_cross_entropy*.py cover them through the public ops; here are the sizes at which panels,
blocks and parts end, and every level, also those where the ops go through a library. On a processor without AMX `make test-amx`
runs the tests of tiles on an emulation.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from common import assert_close, double, leaf

from pygpt import use_backend
from pygpt.ops import backends, linear_cross_entropy
from pygpt.ops.cross_entropy import linear_cross_entropy_reference

with_tiles = pytest.mark.skipif(
    backends.extension is None or not backends.extension.has_tiles(),
    reason="no AMX here; `make test-amx` runs this test on an emulation",
)
# By tiles panels are of 32, steps of 32 and 512, parts of the sum of up to 1,024, blocks of up to 512, and the last
# result is larger than a second-level cache: whole cache lines of it are written past the caches. By vectors panels are of
# 4, 6 or 12 rows and 8, 16 or 32 columns, parts of the sum of up to 768 and blocks of 65,536 floats. LARGE of bfloat16 are
# computed in halves there.
SHAPES = [  # M, K, N
    (1, 1, 1), (33, 65, 47), (31, 32, 33), (64, 256, 64), (100, 300, 77), (40, 2500, 70), (70, 5000, 33), (16, 7, 1100),
    (1100, 33, 20), (600, 40, 600), (5, 9, 31), (13, 24, 15), (1050, 40, 1056),
]  # fmt: skip
LARGE = [(1500, 800, 1450), (1450, 769, 1500)]
pytestmark = pytest.mark.skipif(backends.extension is None, reason="needs the compiled kernels")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def laid_out(rows: int, columns: int, transposed: bool, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A random matrix, its columns neighbours in memory or its rows."""
    shape = (columns, rows) if transposed else (rows, columns)
    x = leaf(*shape, dtype=dtype, seed=seed).detach()
    return x.t() if transposed else x


@dtypes
@pytest.mark.parametrize(
    ("M", "K", "N", "layout"),
    [(*shape, layout) for shape in SHAPES for layout in itertools.product([False, True], repeat=2)]
    + [(*shape, (False, True)) for shape in LARGE],
    ids=str,
)
def test_matches_float64(capability, M, K, N, layout, dtype):
    if capability == "amx" and (M, K, N) in LARGE:
        pytest.skip("nothing is computed in halves by tiles, and an emulation would take minutes")
    a, b = laid_out(M, K, layout[0], 0, dtype), laid_out(K, N, layout[1], 1, dtype)
    bias, out = leaf(N, dtype=dtype, seed=2).detach(), leaf(M, N, dtype=dtype, seed=3).detach()
    exact = a.double() @ b.double()
    # Rounded once, at the end; sums of float32 like those of the library, which rounds as often.
    tolerance = {"rtol": 2**-8, "atol": 1e-5 * K} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 6e-7 * K}
    torch.testing.assert_close(torch.ops.pygpt.matmul(a, b, None).double(), exact, **tolerance)
    torch.testing.assert_close(torch.ops.pygpt.matmul(a, b, bias).double(), exact + bias.double(), **tolerance)
    expected = out.double() + exact
    assigned = torch.full_like(out, torch.nan)
    torch.ops.pygpt.matmul_(assigned, a, b, False)
    assert torch.equal(assigned, torch.ops.pygpt.matmul(a, b, None))
    torch.ops.pygpt.matmul_(out, a, b, True)
    torch.testing.assert_close(out.double(), expected, **tolerance)


@dtypes
def test_views_and_empty_operands(capability, dtype):
    base, weight = leaf(40, 3 * 50, dtype=dtype).detach(), leaf(50, 60, dtype=dtype, seed=1).detach()
    for a in (base[:, 50:100], base[:, ::3], base[::2, 7:57], base[:1].expand(40, 150)[:, :50]):
        assert torch.equal(torch.ops.pygpt.matmul(a, weight, None), torch.ops.pygpt.matmul(a.clone(), weight, None))
    bias = leaf(60, 2, dtype=dtype, seed=2).detach()[:, 0]
    y = torch.ops.pygpt.matmul(base[:, :50], weight, bias)
    assert torch.equal(y, torch.ops.pygpt.matmul(base[:, :50], weight, bias.clone()))
    assert torch.ops.pygpt.matmul(base[:0, :50], weight, None).shape == (0, 60)
    assert torch.ops.pygpt.matmul(base[:, :50], weight[:, :0], None).shape == (40, 0)


@dtypes
def test_nan_and_infinity_stay_where_they_are(capability, dtype):
    a, b = leaf(40, 70, dtype=dtype).detach(), leaf(70, 90, dtype=dtype, seed=1).detach()
    a[3, 5], a[35, 69], b[2, 88] = torch.nan, torch.inf, torch.inf
    y, exact = torch.ops.pygpt.matmul(a, b, None), a.double() @ b.double()
    assert torch.equal(torch.isfinite(y), torch.isfinite(exact))


def test_bad_input():
    a, b = torch.ones(4, 5).bfloat16(), torch.ones(5, 6).bfloat16()
    with pytest.raises(RuntimeError, match=r"a must be \(M, K\) and b \(K, N\)"):
        torch.ops.pygpt.matmul(a, b.t(), None)
    for wrong in ((a.float(), b), (a, b.float()), (a.double(), b.double()), (a.half(), b.half())):
        with pytest.raises(RuntimeError, match="must both be float32, or both bfloat16"):
            torch.ops.pygpt.matmul(*wrong, None)
    for bias in (torch.ones(5).bfloat16(), torch.ones(6), torch.ones(6, 1).bfloat16()):
        with pytest.raises(RuntimeError, match=r"bias must be \(N,\), of the dtype of a and b"):
            torch.ops.pygpt.matmul(a, b, bias)
    with pytest.raises(RuntimeError, match="nothing to sum"):
        torch.ops.pygpt.matmul(a[:, :0], b[:0], None)
    for out in (torch.ones(6, 4).bfloat16().t(), torch.ones(4, 6), torch.ones(4, 5).bfloat16()):
        with pytest.raises(RuntimeError, match=r"out must be \(M, N\), contiguous, of the dtype of a and b"):
            torch.ops.pygpt.matmul_(out, a, b, True)


@dtypes
def test_same_bits_for_any_number_of_threads(capability, dtype):
    a, b = laid_out(700, 2100, False, 0, dtype), laid_out(2100, 650, True, 1, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(torch.ops.pygpt.matmul(a, b, None))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def head(N: int, C: int, V: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = leaf(N, C, dtype=torch.bfloat16, scale=scale), leaf(V, C, dtype=torch.bfloat16, seed=1)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    targets[:: max(N // 5, 2)] = -100
    targets[-1] = V - 1
    return hidden, weight, targets


# Tokens go in chunks of 4,096, the statistics in blocks of 512 columns, gradients in those of 4,096.
@with_tiles
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("N", "C", "V"), [(1, 1, 1), (33, 40, 513), (65, 16, 5000), (4130, 8, 100), (20, 2100, 40)])
def test_head_and_loss_match_float64(N, C, V, scale):
    hidden, weight, targets = head(N, C, V, scale)
    rh, rw = double(hidden), double(weight)
    loss, *grads = torch.ops.pygpt.linear_cross_entropy(hidden.detach(), weight.detach(), targets, -100, True, True)
    expected = linear_cross_entropy_reference(rh, rw, targets)
    expected.backward()
    assert_close(loss, expected, torch.float32)  # logits are never rounded
    for name, grad, r in zip(("hidden", "weight"), grads, (rh, rw), strict=True):
        assert_close(grad, r.grad, what=f"grad {name}")


@with_tiles
def test_the_public_op_takes_it_for_a_large_vocabulary():
    hidden, weight, targets = head(40, 16, 2100)
    loss, *grads = torch.ops.pygpt.linear_cross_entropy(hidden.detach(), weight.detach(), targets, -100, True, True)
    with use_backend("cpp"):
        y = linear_cross_entropy(hidden, weight, targets)
    (3 * y).backward()
    assert torch.equal(y, loss)
    assert torch.equal(hidden.grad, 3 * grads[0])
    assert torch.equal(weight.grad, 3 * grads[1])


@with_tiles
def test_what_is_not_needed_is_not_computed():
    hidden, weight, targets = (x.detach() for x in head(40, 16, 600))
    results = {}
    for need in itertools.product([False, True], repeat=2):
        loss, *grads = torch.ops.pygpt.linear_cross_entropy(hidden, weight, targets, -100, *need)
        assert [len(grad) for grad in grads] == [len(hidden) * need[0], len(weight) * need[1]]
        results[need] = [loss, *grads]
    assert all(torch.equal(results[need][0], results[True, True][0]) for need in results)
    assert torch.equal(results[True, False][1], results[True, True][1])
    assert torch.equal(results[False, True][2], results[True, True][2])


@with_tiles
def test_an_infinite_logit_is_not_hidden():
    hidden, weight, targets = (x.detach() for x in head(40, 16, 600))
    targets[:] = 3
    hidden[7, 2] = torch.nan
    loss, grad_hidden, _ = torch.ops.pygpt.linear_cross_entropy(hidden, weight, targets, -100, True, True)
    assert torch.isnan(loss)
    assert torch.isnan(grad_hidden[7]).all()
    assert torch.isfinite(grad_hidden[8:]).all()


@with_tiles
def test_same_bits_of_the_head_for_any_number_of_threads():
    hidden, weight, targets = (x.detach() for x in head(300, 40, 5000))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(torch.ops.pygpt.linear_cross_entropy(hidden, weight, targets, -100, True, True))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
