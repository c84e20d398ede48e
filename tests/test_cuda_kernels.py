"""The CUDA kernels, run on the emulated device, against float64 references.

The operators are those of the CUDA library, host side included, registered for CPU tensors as pygpt_emulated::*. Each
case runs under several orders of threads and blocks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import assert_close, double, leaf
from cuda_emulation import build
from test_layer_norm import SHAPES as LAYER_NORM_SHAPES

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    (path,) = build.build("emulation.so")
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


@pytest.fixture(params=[0, 1, 2], ids="seed{}".format)
def op(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Any:
    """The emulated operators, under one order of threads and blocks."""
    library.emulation_set_seed(ctypes.c_uint64(request.param))
    return torch.ops.pygpt_emulated


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return leaf(*shape, dtype=dtype, seed=seed).detach()


# 1608: a row of several warps; 12,288: the widest kept in registers; 12,296: the first beyond; 1023: no 16-byte loads
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*LAYER_NORM_SHAPES, (9, 72), (3, 1608), (2, 12288), (2, 12296), (2, 1023)], ids=str)
def test_layer_norm(op, shape, dtype):
    C = shape[-1]
    floor = 3.0 if C == 1 else 1e-3
    x, residual, grad, grad_sum = (random(*shape, dtype=dtype, seed=i) for i in range(4))
    for weight_dtype, with_bias in ((dtype, True), (torch.float32, False)):
        weight = random(C, dtype=weight_dtype, seed=4)
        bias = random(C, dtype=weight_dtype, seed=5) if with_bias else None
        y, mean, rstd = op.layer_norm_forward(x, weight, bias, 1e-5)
        grads = op.layer_norm_backward(grad, x, weight, mean, rstd, with_bias)
        compare_layer_norm(x, weight, bias, y, grad, grads, None, dtype, floor)

        y, total, mean, rstd = op.add_layer_norm_forward(x, residual, weight, bias, 1e-5)
        assert_close(total, x.double() + residual.double(), dtype, "sum")
        assert torch.equal(total, x + residual)
        grads = op.add_layer_norm_backward(grad, grad_sum, total, weight, mean, rstd, with_bias)
        compare_layer_norm(total, weight, bias, y, grad, grads, grad_sum, dtype, floor)


def compare_layer_norm(x, weight, bias, y, grad, grads, grad_sum, dtype, floor):
    rx, rw = double(x).requires_grad_(), double(weight).requires_grad_()
    rb = None if bias is None else double(bias).requires_grad_()
    ry = F.layer_norm(rx, rw.shape, rw, rb)
    assert_close(y, ry, dtype, "y")
    outputs, cotangents = [ry], [grad.double()]
    if grad_sum is not None:
        outputs, cotangents = [ry, rx * 1.0], [grad.double(), grad_sum.double()]
    torch.autograd.backward(outputs, cotangents)
    assert_close(grads[0], rx.grad, dtype, "grad x", floor)
    assert_close(grads[1], rw.grad, dtype, "grad weight", floor)
    if bias is not None:
        assert_close(grads[2], rb.grad, dtype, "grad bias", floor)


def test_layer_norm_of_views_and_unaligned_storage(op):
    for start in (0, 1, 8):  # elements: 1 breaks the alignment of 16-byte loads
        x = random(4, 3 * 64 + start, dtype=torch.bfloat16)[:, start : start + 64]
        flat = random(4 * 64 + start, dtype=torch.bfloat16)[start:].view(4, 64)
        weight = random(64 + start, dtype=torch.bfloat16, seed=1)[start:]
        for rows in (x, flat, flat.t().contiguous().t()):
            y, _, _ = op.layer_norm_forward(rows, weight, None, 1e-5)
            assert_close(y, F.layer_norm(rows.double(), (64,), weight.double()), torch.bfloat16)


def test_layer_norm_large_mean_keeps_its_variance(op):
    for C in (256, 255):
        x = random(4, C, dtype=torch.float32) + 3000.0
        y, _, _ = op.layer_norm_forward(x, torch.ones(C), None, 1e-5)
        assert_close(y, F.layer_norm(x.double(), (C,)), torch.bfloat16)


# V below and above one digit of the sort; tokens in one tile and in several; C with and without 16-byte accesses.
EMBEDDINGS = [
    (1, 1, 1, 1),
    (2, 3, 5, 8),
    (3, 17, 300, 72),
    (1, 40, 1, 16),
    (2, 0, 5, 8),
    (2, 700, 70000, 7),
    (1, 33, 11, 2056),
    (64, 2, 65536, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", EMBEDDINGS, ids=str)
def test_embedding(op, sizes, dtype):
    B, T, V, C = sizes
    offset = 2
    generator = torch.Generator().manual_seed(B * T)
    idx = torch.randint(V, (B, T), generator=generator)
    idx = torch.where(torch.rand(B, T, generator=generator) < 0.4, V // 2, idx)  # one id in very many places
    token, position, grad = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(V, C), (T + 3, C), (B, T, C)]))
    out = op.embedding_forward(idx, token, position, offset)
    assert_close(out, token.double()[idx] + position.double()[offset : offset + T], dtype, "out")
    assert torch.equal(op.embedding_forward(idx, token, None, 0), token[idx])

    for table_dtype in {dtype, torch.float32}:
        start = random(V, C, dtype=table_dtype, seed=5), random(T + 3, C, dtype=table_dtype, seed=6)
        grads = [g.clone() for g in start]
        op.embedding_backward_(grad, idx, grads[0], grads[1], offset)
        wanted = [g.double() for g in start]
        wanted[0].index_put_((idx,), grad.double(), accumulate=True)
        wanted[1][offset : offset + T] += grad.double().sum(0)
        assert_close(grads[0], wanted[0], table_dtype, "token grad")
        assert_close(grads[1], wanted[1], table_dtype, "position grad")
        without = start[0].clone()
        op.embedding_backward_(grad, idx, without, None, 0)
        assert torch.equal(without, grads[0])


def test_embedding_of_ids_out_of_range(op):
    idx = torch.tensor([[0, -1, 4, 5, 2**40, 3]])
    token, grad = random(5, 8, dtype=torch.float32), random(1, 6, 8, dtype=torch.float32, seed=1)
    out = op.embedding_forward(idx, token, None, 0)[0]
    assert torch.isnan(out[[1, 3, 4]]).all()
    assert torch.equal(out[[0, 2, 5]], token[[0, 4, 3]])
    token_grad = torch.zeros(5, 8)
    op.embedding_backward_(grad, idx, token_grad, None, 0)
    wanted = torch.zeros(5, 8)
    wanted[[0, 4, 3]] = grad[0, [0, 2, 5]]
    assert torch.equal(token_grad, wanted)


def test_same_bits_under_every_order(library):
    x, grad, weight = (random(*s, dtype=torch.float32, seed=i) for i, s in enumerate([(37, 96), (37, 96), (96,)]))
    results = []
    for seed in range(4):
        library.emulation_set_seed(ctypes.c_uint64(seed))
        y, mean, rstd = torch.ops.pygpt_emulated.layer_norm_forward(x, weight, weight, 1e-5)
        grads = torch.ops.pygpt_emulated.layer_norm_backward(grad, x, weight, mean, rstd, True)
        results.append(torch.cat([y.flatten(), mean, rstd, *(g.flatten() for g in grads)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_bad_shapes_are_errors_that_name_the_operator(op):
    with pytest.raises(RuntimeError, match=r"layer_norm_forward: weight must be \(C,\)"):
        op.layer_norm_forward(torch.ones(2, 8), torch.ones(7), None, 1e-5)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        op.layer_norm_forward(torch.ones(2, 8).double(), torch.ones(8), None, 1e-5)
