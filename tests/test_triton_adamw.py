"""The Triton AdamW against torch's in float64, in the interpreter where there is no GPU (see test_triton.py)."""

from __future__ import annotations

import pytest
import torch
from common import adamw_shapes, assert_close
from torch import nn

triton = pytest.importorskip("triton", reason="triton is not installed: the Triton kernels are not tested")

from pygpt.kernels import adamw as kadamw  # noqa: E402
from pygpt.ops import backends  # noqa: E402
from pygpt.optim import AdamW, clip_factor  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16 = torch.float32, torch.bfloat16

if DEVICE == "cpu":
    import triton_interpreter  # noqa: F401 - bfloat16 as on a GPU

BLOCK = kadamw.BLOCK
SHAPES = adamw_shapes(BLOCK)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def triton_answers(monkeypatch):
    """AdamW's update goes to the Triton kernel, whatever the device."""
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "choose", lambda op, x: "triton")
        yield
    else:
        with backends.use_backend("triton"):
            yield


@pytest.mark.parametrize("factor", [None, 0.25])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.999), 0.1), ((0.0, 0.95), 0.0)], ids=str)
def test_six_steps(triton_answers, dtype, factor, betas, decay):
    options = {"lr": 0.3, "betas": betas, "eps": 1e-8, "weight_decay": decay}
    ours = [nn.Parameter(draw(shape, dtype, seed)) for seed, shape in enumerate(SHAPES)]
    doubles = [nn.Parameter(p.detach().double()) for p in ours]
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(doubles, **options, foreach=False)
    for step in range(6):
        for at, (p, r) in enumerate(zip(ours, doubles, strict=True)):
            p.grad = draw(p.shape, dtype, 100 * step + at)
            r.grad = p.grad.double() * (1.0 if factor is None else factor)
        before = [p.grad.clone() for p in ours]
        versions = [p._version for p in ours]
        optimizer.step(grad_factor=None if factor is None else torch.tensor(factor, device=DEVICE))
        reference.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
        assert all(p._version > v for p, v in zip(ours, versions, strict=True))
        if step == 0:  # where 1 - beta^step is smallest, and wrong soonest
            assert_same(optimizer, ours, reference, doubles)
    assert_same(optimizer, ours, reference, doubles)


def assert_same(optimizer, ours, reference, doubles):
    for p, r in zip(ours, doubles, strict=True):
        state, expected = optimizer.state[p], reference.state[r]
        master = optimizer.master(p)
        assert state["step"].item() == expected["step"].item()
        torch.testing.assert_close(master.double(), r, rtol=3e-7, atol=1e-6)
        assert_close(state["exp_avg"], expected["exp_avg"], F32)
        assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], F32)
        assert p.dtype == F32 or not (p.float() - master).abs().gt(master.abs() * 2.0**-8).any()


def test_strides_offsets_and_mixed_dtypes(triton_answers):
    """Memory that is not walked in order, addresses that are not multiples of 16 bytes, several dtypes in one group."""
    store = draw((40, 7), F32, 0)
    tensors = [
        store[:20].t(),
        store[20:, 1:4],
        draw((33,), F32, 1)[1:],
        draw((9, 9), BF16, 2),
        draw((65,), BF16, 3)[3:],
    ]
    ours = [nn.Parameter(x) for x in tensors]
    doubles = [nn.Parameter(x.detach().double()) for x in tensors]
    untouched = store[20:, 4:].clone()
    optimizer, reference = AdamW(ours, lr=1e-2), torch.optim.AdamW(doubles, lr=1e-2)
    for step in range(2):
        for at, (p, r) in enumerate(zip(ours, doubles, strict=True)):
            p.grad = draw(p.shape, p.dtype, 10 * step + at)
            if p.dim() == 2:
                p.grad = p.grad.t().contiguous().t()  # other strides than p's
            r.grad = p.grad.double()
        optimizer.step()
        reference.step()
    assert_same(optimizer, ours, reference, doubles)
    assert torch.equal(store[20:, 4:], untouched)


def test_clipping_on_the_way(triton_answers):
    ours = [nn.Parameter(draw(shape, BF16, seed)) for seed, shape in enumerate(SHAPES)]
    doubles = [nn.Parameter(p.detach().double()) for p in ours]
    for p, r in zip(ours, doubles, strict=True):
        p.grad = draw(p.shape, BF16, 7)
        r.grad = p.grad.double()
    optimizer, reference = AdamW(ours, lr=1e-2, eps=1e-2), torch.optim.AdamW(doubles, lr=1e-2, eps=1e-2)
    norm, factor = clip_factor(ours, 0.5)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(doubles, 0.5), F32)
    optimizer.step(grad_factor=factor)
    reference.step()
    assert_same(optimizer, ours, reference, doubles)
    assert clip_factor(ours, 0.0)[1] is None
