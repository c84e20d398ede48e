"""The compiled AdamW and norm against torch's in float64, for every instruction set of this machine."""

from __future__ import annotations

import pytest
import torch
from common import adamw_shapes, assert_close
from torch import nn

from pygpt.errors import InputError
from pygpt.ops.adamw import adamw_, global_norm, join, split_
from pygpt.optim import AdamW, clip_factor

F32, BF16 = torch.float32, torch.bfloat16
BLOCK = 16384  # elements that the kernel does at a time
SHAPES = adamw_shapes(BLOCK)


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_nearest(weight, master):
    """weight is the bfloat16 nearest to master; of two equally near the one away from zero."""
    halves = master.view(torch.int32) & 0xFFFF == 0x8000
    nearest = (master.view(torch.int32) + 1).view(F32).where(halves & ~master.isnan(), master)
    torch.testing.assert_close(weight, nearest.to(weight.dtype), rtol=0, atol=0, equal_nan=True)


def assert_same(optimizer, ours, reference, doubles):
    for p, r in zip(ours, doubles, strict=True):
        state, expected = optimizer.state[p], reference.state[r]
        master = optimizer.master(p)
        assert state["step"].item() == expected["step"].item()
        torch.testing.assert_close(master.double(), r, rtol=3e-7, atol=1e-6)
        assert_close(state["exp_avg"], expected["exp_avg"], F32)
        assert_close(state["exp_avg_sq"], expected["exp_avg_sq"], F32)
        if p.dtype == BF16:
            assert_nearest(p, master)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("betas", "decay", "factor"), [((0.9, 0.999), 0.1, None), ((0.0, 0.95), 0.0, 0.25)], ids=str)
def test_three_steps(capability, dtype, factor, betas, decay):
    options = {"lr": 0.3, "betas": betas, "eps": 1e-8, "weight_decay": decay}
    ours = [nn.Parameter(draw(shape, dtype, seed)) for seed, shape in enumerate(SHAPES)]
    doubles = [nn.Parameter(p.detach().double()) for p in ours]
    optimizer, reference = AdamW(ours, **options), torch.optim.AdamW(doubles, **options, foreach=False)
    for step in range(3):
        for at, (p, r) in enumerate(zip(ours, doubles, strict=True)):
            p.grad = draw(p.shape, dtype, 100 * step + at)
            r.grad = p.grad.double() * (1.0 if factor is None else factor)
        before, versions = [p.grad.clone() for p in ours], [p._version for p in ours]
        optimizer.step(grad_factor=None if factor is None else torch.tensor(factor))
        reference.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, before, strict=True))
        assert all(p._version > v for p, v in zip(ours, versions, strict=True))
        if step == 0:  # where 1 - beta^step is smallest, and wrong soonest
            assert_same(optimizer, ours, reference, doubles)
    assert_same(optimizer, ours, reference, doubles)


def test_strides_offsets_and_mixed_dtypes(capability):
    """Memory that is not walked in order, odd addresses, several dtypes in one group; what lies between is not touched."""
    store = draw((40, 7), F32, 0)
    tensors = [
        store[:20].t(),
        store[20:, 1:4],
        draw((33,), F32, 1)[1:],
        draw((9, 8), BF16, 2).t(),
        draw((65,), BF16, 3)[3:],
    ]
    ours = [nn.Parameter(x) for x in tensors]
    doubles = [nn.Parameter(x.detach().double().contiguous()) for x in tensors]
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


def test_large_small_and_broken_gradients(capability):
    """Where squares underflow and overflow; NaN and infinity are not hidden, and stay with their element."""
    grads = torch.tensor([0.0, 1e-30, 1e-10, 1e10, 1e18, 1e25, torch.inf, torch.nan, -1.0] * 3)
    p = nn.Parameter(torch.ones_like(grads))
    r = nn.Parameter(torch.ones_like(grads))
    p.grad, r.grad = grads.clone(), grads.clone()
    AdamW([p], lr=0.1).step()
    torch.optim.AdamW([r], lr=0.1, foreach=False).step()
    torch.testing.assert_close(p, r, equal_nan=True)


def test_the_same_bits_for_any_number_of_threads(capability):
    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        ours = [nn.Parameter(draw(shape, BF16, seed)) for seed, shape in enumerate(SHAPES)]
        optimizer = AdamW(ours, lr=1e-2)
        for seed, p in enumerate(ours):
            p.grad = draw(p.shape, BF16, seed + 50)
        norm, factor = clip_factor(ours, 1.0)
        optimizer.step(grad_factor=factor)
        return [norm, *(x for p in ours for x in (p.detach(), *optimizer.state[p].values()))]

    threads = torch.get_num_threads()
    try:
        runs = [run(n) for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


def test_masters_of_any_bits(capability):
    """A step that changes nothing gives every float32 back, as the nearest bfloat16 and what is beyond it."""
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (100_003,), generator=torch.Generator().manual_seed(0)).int()
    edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x3F808000, 0x3F807FFF, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000]
    nans = [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF, -0x400000]
    bits[: len(edges)] = torch.tensor(edges)
    bits[50 : 50 + len(edges)] = torch.tensor(edges) - (1 << 31)
    bits[100 : 100 + len(nans)] = torch.tensor(nans)
    exact = bits.view(F32)
    weight, residual = torch.zeros_like(exact, dtype=BF16), torch.zeros_like(exact, dtype=torch.int16)
    split_(exact, weight, residual)
    assert_nearest(weight, exact)
    torch.testing.assert_close(join(weight, residual), exact, rtol=0, atol=0, equal_nan=True)
    copies = weight.clone(), residual.clone()
    nothing = torch.zeros_like(exact)
    still = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    adamw_([weight], [nothing], [residual], [nothing.clone()], [nothing.clone()], [torch.zeros(())], **still)
    number = ~exact.isnan()
    assert torch.equal(weight.view(torch.int16)[number], copies[0].view(torch.int16)[number])
    assert torch.equal(residual[number], copies[1][number])
    assert weight[~number].isnan().all()


def test_zeros_written_into_weights_are_zeros(capability):
    """Whatever their residuals were: the bits below zero are those of NaN."""
    weight = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=BF16)
    residual = torch.tensor([-1, -32768, 5, 5], dtype=torch.int16)
    expected = torch.tensor([0.0, 0.0, 5 * 2.0**-149, -5 * 2.0**-149])
    assert torch.equal(join(weight, residual), expected)
    still = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    state = [[torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())]]
    adamw_([weight], [torch.ones(4)], [residual], *state, **still)
    assert torch.equal(weight, torch.zeros(4, dtype=BF16))
    assert residual.abs().max() <= 5


def test_norm(capability):
    grads = [draw(shape, (F32, BF16)[at % 2], at) for at, shape in enumerate(SHAPES)] + [
        draw((30, 20), F32, 9)[::2].t()
    ]
    expected = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
    norm = global_norm(grads)
    assert norm.dtype == F32
    assert norm.item() == pytest.approx(expected.item(), rel=3e-7)
    assert global_norm([torch.zeros(0)]).item() == 0
    assert global_norm([]).item() == 0
    for bad in (torch.inf, torch.nan):
        assert not torch.isfinite(global_norm([draw((50,), BF16, 0), torch.full((3,), bad)]))


def test_bad_input(capability):
    x = torch.ones(4)
    state = [torch.zeros(4), torch.zeros(4), torch.zeros(())]
    options = {"lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(InputError, match="float64"):
        adamw_([x.double()], [x.double()], [None], *([s] for s in state), **options)
    with pytest.raises(RuntimeError, match="one size"):
        adamw_([x], [torch.ones(3)], [None], *([s] for s in state), **options)
    with pytest.raises(RuntimeError, match="must be float32"):
        adamw_([x], [x], [None], [state[0].bfloat16()], [state[1]], [state[2]], **options)
    with pytest.raises(RuntimeError, match="residuals empty for float32"):
        adamw_([x], [x], [torch.zeros(4, dtype=torch.int16)], *([s] for s in state), **options)
    with pytest.raises(RuntimeError, match="residuals must be int16"):
        adamw_([x.bfloat16()], [x.bfloat16()], [x], *([s] for s in state), **options)
    assert state[2].item() == 0
    assert torch.equal(x, torch.ones(4))
