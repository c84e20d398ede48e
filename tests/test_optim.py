"""AdamW against torch.optim.AdamW, clipping and schedule against torch's and nanoGPT's."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from common import assert_close
from torch import nn

from pygpt import GPT, GPTConfig, peaks, use_backend
from pygpt.errors import InputError, InputTypeError
from pygpt.optim import AdamW, build_optimizer, clip_factor, clip_grad_norm, cosine_with_warmup

SHAPES = [(7, 5), (13,), (1,), (2, 3, 4), (0,), ()]
OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in SHAPES]


def set_grads(parameters: list[nn.Parameter], step: int, transposed: bool = False) -> None:
    """Random gradients, representable in bfloat16 so that every dtype is given the same ones."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)
        if transposed and grad.dim() == 2:
            grad = grad.t().contiguous().t()  # same values, other strides
        parameter.grad = grad


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_grads(parameters, step)
        optimizer.step()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("transposed", [False, True])
def test_float32_is_torchs_adamw(transposed, backend):
    ours, fused, plain = make_parameters(), make_parameters(), make_parameters()
    a = AdamW(ours, **OPTIONS)
    b = torch.optim.AdamW(fused, **OPTIONS, fused=True)
    c = torch.optim.AdamW(plain, **OPTIONS, foreach=False)
    with use_backend(backend):
        for step in range(20):
            for parameters, optimizer in ((ours, a), (fused, b), (plain, c)):
                set_grads(parameters, step, transposed)
                optimizer.step()
    for x, y, z in zip(ours, fused, plain, strict=True):
        assert torch.allclose(x, z, rtol=1e-6, atol=1e-6)
        # torch's fused kernel is wrong for a gradient whose strides are not the parameter's; ours must not be.
        assert transposed or backend == "auto" or torch.equal(x, y)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_bfloat16_is_float32_adamw_rounded(backend):
    """The masters are a float32 AdamW's weights to the last bit; the parameters are those, rounded."""
    ours, reference = make_parameters(torch.bfloat16), make_parameters()
    a, b = AdamW(ours, **OPTIONS), AdamW(reference, **OPTIONS)
    with use_backend(backend):
        run(a, ours, range(20))
        run(b, reference, range(20))
    for x, y in zip(ours, reference, strict=True):
        assert x.dtype == x.grad.dtype == torch.bfloat16
        assert torch.equal(x, y.bfloat16())
        assert torch.equal(a.master(x), y)
        dtypes = {name: value.dtype for name, value in a.state[x].items()}
        assert dtypes.pop("residual") == torch.int16
        assert set(dtypes.values()) == {torch.float32}


def test_small_updates_are_not_lost_in_bfloat16():
    """A hundred updates of a thousandth each, all below bfloat16's last bit at 1.0."""
    x = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([x], lr=1e-3, weight_decay=0.0)
    for _ in range(100):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert_close(x, torch.full((4,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_continues_bit_for_bit(dtype):
    straight, first = make_parameters(dtype), make_parameters(dtype)
    run(AdamW(straight, **OPTIONS), straight, range(10))
    optimizer = AdamW(first, **OPTIONS)
    run(optimizer, first, range(5))

    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = AdamW(second, lr=1.0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.param_groups[0]["lr"] == OPTIONS["lr"]
    run(resumed, second, range(5, 10))
    for x, y in zip(straight, second, strict=True):
        assert torch.equal(x, y)
        assert resumed.state[y]["exp_avg"].dtype == torch.float32


def test_a_copied_optimizer_continues_too():
    model = nn.Linear(3, 3).bfloat16()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    run(optimizer, list(model.parameters()), range(3))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        run(o, list(m.parameters()), range(3, 6))
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_weights_set_between_steps_are_kept(backend):
    """Masters that ignored them would bring the old weights back at the next step."""
    x, y = nn.Parameter(torch.ones(6, dtype=torch.bfloat16)), nn.Parameter(torch.ones(6))
    a, b = AdamW([x], **OPTIONS), torch.optim.AdamW([y], **OPTIONS)
    with use_backend(backend):
        run(a, [x], range(3))
        run(b, [y], range(3))
        with torch.no_grad():
            x[:2] = y[:2] = 5.0
            x[2:4] = y[2:4] = 0.0
        assert_close(a.master(x)[:4], y[:4], torch.bfloat16)
        run(a, [x], range(3, 6))
        run(b, [y], range(3, 6))
    assert_close(x, y, torch.bfloat16)
    assert x[0] > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_state_is_taken(dtype):
    theirs, ours = make_parameters(dtype), make_parameters(dtype)
    reference = torch.optim.AdamW(theirs, **OPTIONS)
    run(reference, theirs, range(3))
    state = copy.deepcopy(reference.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])  # as older torch had it
    with torch.no_grad():
        for x, y in zip(ours, theirs, strict=True):
            x.copy_(y)
    optimizer = AdamW(ours, **OPTIONS)
    optimizer.load_state_dict(state)
    assert {t.dtype for s in optimizer.state.values() for t in s.values()} == {torch.float32}
    run(reference, theirs, range(3, 4))
    run(optimizer, ours, range(3, 4))
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y, dtype)
    for name in ("maximize", "amsgrad"):
        made = torch.optim.AdamW(make_parameters(dtype), **{name: True})
        with pytest.raises(InputError, match=f"{name}=True, which AdamW of pygpt does not have"):
            optimizer.load_state_dict(made.state_dict())


def test_state_of_before_masters_were_residuals_is_taken():
    straight, x = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    a, b = AdamW(straight, **OPTIONS), AdamW(x, **OPTIONS)
    run(a, straight, range(3))
    state = copy.deepcopy(a.state_dict())
    for entry, parameter in zip(state["state"].values(), straight, strict=True):
        entry["master"] = a.master(parameter)
        del entry["residual"]
    b.load_state_dict(state)
    run(a, straight, range(3, 6))
    run(b, x, range(3, 6))  # from other weights: the masters count
    assert all(torch.equal(p, q) for p, q in zip(straight, x, strict=True))


def test_a_model_may_change_its_dtype():
    x, y = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    a, b = AdamW([x], **OPTIONS), torch.optim.AdamW([y], **OPTIONS)
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float32)):
        x.data = x.data.to(dtype)
        x.grad = None
        run(a, [x], range(step, step + 1))
        run(b, [y], range(step, step + 1))
        assert_close(x, y, torch.bfloat16)


def test_groups_closures_schedulers_and_missing_gradients():
    ours, reference = make_parameters(), make_parameters()
    a = AdamW([{"params": ours[:2], "weight_decay": 0.5}], lr=1e-2)
    b = torch.optim.AdamW([{"params": reference[:2], "weight_decay": 0.5}], lr=1e-2)
    a.add_param_group({"params": ours[2:], "lr": 1e-3, "betas": (0.5, 0.9)})
    b.add_param_group({"params": reference[2:], "lr": 1e-3, "betas": (0.5, 0.9)})
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1) for optimizer in (a, b)]
    for _ in range(5):
        for parameters, optimizer in ((ours, a), (reference, b)):

            def closure(parameters=parameters, optimizer=optimizer):
                optimizer.zero_grad()
                loss = sum((p * p).sum() for i, p in enumerate(parameters) if i != 1)  # parameter 1 has no gradient
                loss.backward()
                return loss

            assert optimizer.step(closure).requires_grad
        for schedule in schedules:
            schedule.step()
    assert a.param_groups[1]["lr"] == b.param_groups[1]["lr"] == pytest.approx(1e-5)
    assert torch.equal(ours[1], make_parameters()[1])
    assert ours[1] not in a.state
    for x, y in zip(ours, reference, strict=True):
        assert torch.allclose(x, y, rtol=1e-6, atol=1e-7)
    a.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


def test_bad_settings_and_gradients():
    x = nn.Parameter(torch.ones(2))
    for options in ({"lr": -1.0}, {"lr": math.nan}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}):
        with pytest.raises(InputError):
            AdamW([x], **options)
    with pytest.raises(ValueError, match="empty"):
        AdamW([])
    for dtype in (torch.complex64, torch.float16):
        with pytest.raises(InputTypeError, match=str(dtype)):
            AdamW([nn.Parameter(torch.ones(2, dtype=dtype))])
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputTypeError, match="sparse=False"):
        AdamW(table.parameters()).step()
    optimizer = AdamW([x])
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(AdamW([x, nn.Parameter(torch.ones(1))]).state_dict())


def test_matrices_decay_and_vectors_do_not():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=5, block_size=6))
    optimizer = build_optimizer(model, weight_decay=0.3, learning_rate=1e-3)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[parameter] == (0.0 if "ln_" in name or name.endswith("bias") else 0.3), name
    model.transformer.h.requires_grad_(False)
    trained = [p for group in build_optimizer(model).param_groups for p in group["params"]]
    assert len(trained) == 4  # both embeddings, the final LayerNorm's weight and bias


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(max_norm):
    ours, reference = make_parameters(), make_parameters()
    set_grads(ours, 0)
    set_grads(reference, 0)
    norm = clip_grad_norm(ours, max_norm)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(reference, max_norm))
    for x, y in zip(ours, reference, strict=True):
        assert_close(x.grad, y.grad)


def test_clipping_one_tensor_and_float64():
    for dtype in (torch.float32, torch.float64):
        x, y = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
        x.grad, y.grad = torch.full_like(x, 10), torch.full_like(y, 10)
        norm, factor = clip_factor(x, 1.0)
        assert torch.equal(norm, clip_grad_norm(x, 1.0))
        assert_close(norm, torch.nn.utils.clip_grad_norm_(y, 1.0))
        assert norm.dtype == dtype
        assert_close(x.grad, y.grad)
        assert_close(10 * factor, y.grad[0])
    for function in (clip_grad_norm, clip_factor):
        with pytest.raises(InputError, match=r"max_norm must be 0 \(no clipping\) or more, got -1"):
            function([x], -1.0)


def test_the_norm_of_bfloat16_gradients_is_a_float32_one():
    x = nn.Parameter(torch.zeros(1001, dtype=torch.bfloat16))
    x.grad = torch.ones_like(x)
    norm = clip_grad_norm([x], 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(math.sqrt(1001), rel=1e-6)
    assert_close(x.grad, torch.full((1001,), 1001**-0.5))


def test_clipping_nothing():
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0).item() == 0
    x = nn.Parameter(torch.ones(2))
    x.grad = torch.full((2,), 30.0)
    assert clip_grad_norm([x], 0.0).item() == pytest.approx(30 * math.sqrt(2))
    assert x.grad.tolist() == [30.0, 30.0]


def test_schedule():
    def rate(step: int) -> float:
        return cosine_with_warmup(step, peak=1.0, minimum=0.1, warmup=4, total=14)

    assert [rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rate(4) == pytest.approx(1.0)
    assert rate(9) == pytest.approx(0.55)  # half way
    assert rate(4 + 10 / 3) == pytest.approx(0.1 + 0.9 * 0.75)  # cos(60 degrees) = 1/2
    assert rate(14) == rate(1000) == 0.1
    assert cosine_with_warmup(0, peak=1.0, minimum=0.0, warmup=0, total=0) == 0.0


def test_peaks():
    assert peaks.lookup("NVIDIA H100 80GB HBM3", torch.bfloat16) == pytest.approx(989.4e12)
    assert peaks.lookup("NVIDIA H100 80GB HBM3", torch.float32) == pytest.approx(66.9e12)
    assert peaks.lookup("NVIDIA H100 80GB HBM3", torch.float32, tf32=True) == pytest.approx(494.7e12)
    assert peaks.lookup("NVIDIA H100 PCIe", torch.bfloat16) == pytest.approx(756e12)
    assert peaks.lookup("NVIDIA H200", torch.bfloat16) == pytest.approx(989.4e12)
    assert peaks.lookup("NVIDIA A100-SXM4-80GB", torch.bfloat16) == pytest.approx(312e12)
    assert peaks.lookup("NVIDIA GeForce RTX 4090", torch.bfloat16) == pytest.approx(165.2e12)
    unknown = ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce GTX 1080", ""]
    for name in unknown:
        assert peaks.lookup(name, torch.bfloat16) is None
    assert peaks.lookup("NVIDIA H100 80GB HBM3", torch.float64) is None
    assert peaks.peak_flops(torch.device("cpu"), torch.float32) is None
