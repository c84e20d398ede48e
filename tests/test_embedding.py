"""embedding against indexing in float64, under every instruction set of the machine."""

from __future__ import annotations

import pytest
import torch
from common import EMBEDDING_SHAPES, assert_close, double, kernels, leaf
from hypothesis import given, settings
from hypothesis import strategies as st

from pygpt import ops
from pygpt.ops import backends
from pygpt.ops.embedding import embedding_reference

DTYPES = [torch.float32, torch.bfloat16]
needs_extension = pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")


def token_ids(B: int, T: int, V: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def expected(idx, token_table, position_table, offset):
    """By plain indexing: neither F.embedding nor the reference."""
    out = double(token_table)[idx.long()]
    return out if position_table is None else out + double(position_table)[offset : offset + idx.shape[1]]


def compare(idx, token_table, position_table, offset, grad):
    """The result and the gradients of both tables."""
    dtype, tables = token_table.dtype, [t for t in (token_table, position_table) if t is not None]
    out = ops.embedding(idx, token_table, position_table, offset)
    assert out.dtype == dtype
    assert_close(out, expected(idx, token_table, position_table, offset), what="out")
    grads = torch.autograd.grad(out, tables, grad)

    token_grad = torch.zeros(token_table.shape, dtype=torch.float64)
    for b in range(idx.shape[0]):
        for t in range(idx.shape[1]):
            token_grad[idx[b, t]] += grad[b, t].double()
    assert_close(grads[0], token_grad, dtype, "token_grad")
    if position_table is not None:
        position_grad = torch.zeros(position_table.shape, dtype=torch.float64)
        position_grad[offset : offset + idx.shape[1]] = grad.double().sum(0)
        assert_close(grads[1], position_grad, dtype, "position_grad")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EMBEDDING_SHAPES, ids=str)
@pytest.mark.parametrize("offset", [None, 0, 5])
def test_matches_float64(capability, shape, dtype, offset):
    B, T, V, C = shape
    token_table = leaf(V, C, dtype=dtype)
    position_table = None if offset is None else leaf(T + 7, C, dtype=dtype, seed=1)
    compare(token_ids(B, T, V), token_table, position_table, offset or 0, leaf(B, T, C, dtype=dtype, seed=2).detach())


@needs_extension
@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 5),
    T=st.integers(0, 20),
    V=st.integers(1, 700),
    C=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    idx_dtype=st.sampled_from([torch.int64, torch.int32]),
    step=st.integers(1, 3),
    distinct=st.integers(1, 700),
    offset=st.integers(0, 4),
    level=st.sampled_from(backends.extension.available_cpu_capabilities() if backends.extension else [""]),
)
def test_odd_shapes_and_strides(B, T, V, C, dtype, idx_dtype, step, distinct, offset, level):
    idx = token_ids(B, T * step, min(V, distinct))[:, ::step].to(idx_dtype) + max(0, V - distinct)
    tables = leaf(V, C * step, dtype=dtype)[:, ::step], leaf(T + offset, C, dtype=dtype, seed=1)
    grad = leaf(T, B, C, dtype=dtype, seed=2).detach().transpose(0, 1)
    backends.extension.set_cpu_capability(level)
    try:
        with backends.use_backend("cpp"):
            compare(idx, *tables, offset, grad)
    finally:
        backends.extension.set_cpu_capability("")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["random", "one token", "two tokens"])
def test_same_bits_for_any_number_of_threads(capability, kind, dtype):
    B, T, V, C = 4, 150, 1000, 520
    idx = token_ids(B, T, {"random": V, "one token": 1, "two tokens": 2}[kind])
    grad = leaf(B, T, C, dtype=dtype).detach()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        token_table, position_table = leaf(V, C, dtype=dtype, seed=1), leaf(T, C, dtype=dtype, seed=2)
        out = ops.embedding(idx, token_table, position_table)
        results.append(torch.cat([out.view(-1, C), *torch.autograd.grad(out, (token_table, position_table), grad)]))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    token_grad = torch.zeros(V, C, dtype=torch.float64).index_add_(0, idx.flatten(), grad.double().view(-1, C))
    assert_close(results[0][B * T : B * T + V], token_grad, dtype, "token_grad")


def test_bf16_rows_are_summed_in_float32(capability):
    # Each 0.5 is half a rounding step of 256: added one by one in bfloat16 they would all be lost. Tokens 1 and 257
    # alternate because they differ in their second byte only, which the sort by id must not miss.
    grad = torch.cat([torch.full((1, 2, 40), 256.0), torch.full((1, 512, 40), 0.5)], dim=1).bfloat16()
    token_grad = torch.zeros(300, 40, dtype=torch.bfloat16)
    ops.embedding_backward_(grad, torch.tensor([[1, 257] * 257]), token_grad)
    wanted = torch.zeros(300, 40, dtype=torch.bfloat16)
    wanted[[1, 257]] = 384.0
    assert torch.equal(token_grad, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_backward_adds_into_existing_gradients(backend, dtype):
    if backend == "cpp" and backends.extension is None:
        pytest.skip("pygpt._C is not built")
    idx, grad = token_ids(2, 9, 5), leaf(2, 9, 24, dtype=dtype).detach()
    token_grad, position_grad = leaf(5, 24, dtype=dtype, seed=1).detach(), leaf(12, 24, dtype=dtype, seed=2).detach()
    wanted_token = token_grad.double().index_add_(0, idx.flatten(), grad.double().view(-1, 24))
    wanted_position = position_grad.double()
    wanted_position[3:] += grad.double().sum(0)
    with backends.use_backend(backend):
        ops.embedding_backward_(grad, idx, token_grad, position_grad, 3)
    assert_close(token_grad, wanted_token, what="token_grad")
    assert_close(position_grad, wanted_position, what="position_grad")


@needs_extension
def test_opcheck():
    idx, table, position = token_ids(2, 5, 11), leaf(11, 6), leaf(8, 6, seed=1)
    grad = torch.randn(2, 5, 6)
    for p in (position, None):
        torch.library.opcheck(torch.ops.pygpt.embedding_forward.default, (idx, table, p, 2))
        rows = None if p is None else 8
        torch.library.opcheck(torch.ops.pygpt.embedding_backward.default, (grad, idx, 11, rows, 2))
        position_grad = None if p is None else torch.zeros(8, 6)
        args = (grad, idx, torch.zeros(11, 6), position_grad, 2)
        torch.library.opcheck(torch.ops.pygpt.embedding_backward_.default, args)


@needs_extension
def test_operator_has_the_same_gradients_without_the_seam():
    idx, table, position = token_ids(2, 5, 11), leaf(11, 6), leaf(8, 6, seed=1)
    direct = torch.ops.pygpt.embedding_forward(idx, table, position, 2).square().sum()
    seam = ops.embedding(idx, table, position, 2).square().sum()
    for a, b in zip(
        torch.autograd.grad(direct, (table, position)), torch.autograd.grad(seam, (table, position)), strict=True
    ):
        assert torch.equal(a, b)


def test_gradcheck_of_the_reference():
    table, position = leaf(7, 3, dtype=torch.float64), leaf(6, 3, dtype=torch.float64, seed=1)
    idx = torch.tensor([[0, 6, 6], [2, 0, 6]])
    assert torch.autograd.gradcheck(lambda t, p: embedding_reference(idx, t, p, 2), (table, position))


@needs_extension
def test_compiles_without_graph_breaks():
    def step(idx, table, position):
        return ops.embedding(idx, table, position, 1) * 2 + ops.embedding(idx, table)

    idx, table, position = token_ids(2, 5, 11), leaf(11, 6), leaf(8, 6, seed=1)
    compiled, eager = (
        torch.compile(step, fullgraph=True, backend="aot_eager")(idx, table, position),
        step(idx, table, position),
    )
    assert torch.equal(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled.square().sum(), (table, position)),
        torch.autograd.grad(eager.square().sum(), (table, position)),
        strict=True,
    ):
        assert torch.equal(a, b)


@needs_extension
@pytest.mark.parametrize("bad", [-1, 65, 2**40, -(2**63)])
def test_unknown_token_in_the_operator(bad):
    idx = token_ids(3, 400, 65)
    idx[2, 7] = idx[2, 300] = bad
    message = f"token id {bad} at row 2, position 7 is outside the vocabulary of 65"
    table = torch.zeros(65, 256)
    with pytest.raises(IndexError, match=message):
        torch.ops.pygpt.embedding_forward(idx, table, None, 0)
    with pytest.raises(IndexError, match=message):
        torch.ops.pygpt.embedding_backward_(torch.ones(3, 400, 256), idx, table, None, 0)
    assert not table.any()


@needs_extension
@pytest.mark.parametrize("offset", [-1, 4, 2**63 - 3, 2**63 - 1])
def test_positions_outside_their_table_in_the_operator(offset):
    idx, tables = torch.zeros(1, 3, dtype=torch.int64), (torch.zeros(5, 8), torch.zeros(6, 8))
    with pytest.raises(RuntimeError, match=f"3 positions from {offset} on do not fit the position table of 6 rows"):
        torch.ops.pygpt.embedding_forward(idx, *tables, offset)
    with pytest.raises(RuntimeError, match="do not fit the position table"):
        torch.ops.pygpt.embedding_backward_(torch.ones(1, 3, 8), idx, *tables, offset)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_bad_input(backend):
    if backend == "cpp" and backends.extension is None:
        pytest.skip("pygpt._C is not built")
    idx, table, position = token_ids(2, 5, 11), torch.randn(11, 6), torch.randn(8, 6)
    with backends.use_backend(backend):
        for bad in (11, -1):
            wrong = idx.clone()
            wrong[1, 3] = bad
            with pytest.raises(
                ValueError, match=f"token id {bad} at row 1, position 3 is outside the vocabulary of 11"
            ):
                ops.embedding(wrong, table, position)
            with pytest.raises(ValueError, match=f"token id {bad} at row 1, position 3"):
                ops.embedding_backward_(torch.ones(2, 5, 6), wrong, table)
        with pytest.raises(ValueError, match=r"8 positions \(block_size\)"):
            ops.embedding(idx, table, position, 4)
        with pytest.raises(ValueError, match="must not be negative"):
            ops.embedding(idx, table, position, -1)
        with pytest.raises(ValueError, match=r"must be \(B, T\)"):
            ops.embedding(idx[0], table)
        with pytest.raises(TypeError, match=r"int64, got torch\.float32"):
            ops.embedding(idx.float(), table)
        with pytest.raises(TypeError, match="floating-point"):
            ops.embedding(idx, table.long())
        with pytest.raises(ValueError, match=r"token_table must be \(V, C\)"):
            ops.embedding(idx, table[0])
        with pytest.raises(ValueError, match=r"position_table \(8, 5\)"):
            ops.embedding(idx, table, position[:, :5])
        with pytest.raises(TypeError, match=r"position_table is torch\.bfloat16"):
            ops.embedding(idx, table, position.bfloat16())
        with pytest.raises(ValueError, match="on meta"):
            ops.embedding(idx, table.to("meta"))
        with pytest.raises(ValueError, match="grad must be"):
            ops.embedding_backward_(torch.ones(2, 5, 7), idx, table)
        with pytest.raises(TypeError, match=r"grad is torch\.bfloat16"):
            ops.embedding_backward_(torch.ones(2, 5, 6).bfloat16(), idx, table)
        with pytest.raises(ValueError, match="must be contiguous"):
            ops.embedding_backward_(torch.ones(2, 5, 6), idx, torch.zeros(6, 11).T)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_large_table_is_zero_elsewhere(dtype):
    """Fresh memory is not filled, memory that was used before is: tables of several huge pages, in both, wholly and partly."""
    V, C = 4001, 768
    idx = torch.tensor([[0, V - 1, 1234, 1234]])
    grad = torch.ones(1, 4, C, dtype=dtype)
    for used in (0, 1, V // 3, V):
        dirty = torch.empty(V, C, dtype=dtype)
        dirty[:used] = float("nan")
        del dirty
        table, _ = torch.ops.pygpt.embedding_backward(grad, idx, V, None, 0)
        expected_table = torch.zeros(V, C, dtype=dtype)
        for row, count in ((0, 1), (1234, 2), (V - 1, 1)):
            expected_table[row] = count
        assert torch.equal(table, expected_table)


@needs_extension
@pytest.mark.parametrize(
    ("rows", "V", "ours"), [(255, 8191, False), (256, 8191, True), (1, 8192, True)], ids=["small", "rows", "table"]
)
def test_with_gradients_a_small_gather_is_torchs(rows, V, ours):
    idx, table = torch.randint(V, (1, rows)), torch.randn(V, 1024, requires_grad=True)
    found = kernels(lambda: torch.autograd.grad(ops.embedding(idx, table).sum(), table))
    assert found == ({"embedding_forward", "embedding_backward"} if ours else set())
    assert not kernels(lambda: ops.embedding(idx, table.detach()))
