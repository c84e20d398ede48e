"""The training loop and what it writes, on a tiny model and real steps."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_training import (
    BATCH,
    BLOCK,
    SETTINGS,
    VOCABULARY,
    batch,
    interrupt_after,
    make_model,
    make_trainer,
    printed,
    resumed,
    rows,
    validation,
)
from torch import Tensor

from pygpt import GPT, GPTConfig
from pygpt.errors import InputError
from pygpt.train import TrainConfig
from pygpt.train.checkpoint import checkpoints
from pygpt.train.metrics import read_metrics
from pygpt.train.trainer import DivergedError, resolve_device


def test_the_loop_is_the_one_written_out_by_hand(tmp_path):
    """Ten steps against torch's optimizer, clipping and a literal schedule."""
    config = replace(SETTINGS, steps=10, grad_clip=1.3)
    trainer = make_trainer(tmp_path, config)
    trainer.train()

    model = make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False)
    losses, norms, rates = [], [], []
    for step in range(10):
        rate = (
            1e-2 * (step + 1) / 5 if step < 4 else 1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * (step - 4) / 6)) / 2
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(*batch(step))[1]
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.3).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rates.append(rate)
    steps = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert [row["loss"] for row in steps] == pytest.approx(losses, rel=1e-4)
    assert [row["grad_norm"] for row in steps] == pytest.approx(norms, rel=1e-3)
    assert [row["lr"] for row in steps] == pytest.approx(rates)
    assert max(norms) > 1.3 > min(norms)  # some steps were clipped, some were not
    for x, y in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(tmp_path, dtype):
    """The text's entropy is 0.33 nats per token; a model that learned nothing is at ln 17 = 2.83."""
    trainer = make_trainer(tmp_path, replace(SETTINGS, steps=150, log_every=10, eval_every=0, dtype=dtype))
    trainer.train()
    assert next(trainer.model.parameters()).dtype == getattr(torch, dtype)
    assert read_metrics(tmp_path)[0]["val_loss"] > 2.7
    assert 0.3 < read_metrics(tmp_path)[-1]["val_loss"] < 0.6


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """With a different number of ignored targets in each, one of them having no other."""

    def micro(index: int) -> tuple[Tensor, Tensor]:
        x, y = batch(index)
        y[: index % 4 + 1, index % 3 :] = -1
        return x, y

    def large(index: int) -> tuple[Tensor, Tensor]:
        parts = [micro(4 * index + i) for i in range(4)]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    assert (micro(3)[1] < 0).all()
    one = make_trainer(tmp_path / "one", replace(SETTINGS, steps=5), batch=large)
    four = make_trainer(tmp_path / "four", replace(SETTINGS, steps=5, accumulate=4), batch=micro)
    one.train()
    four.train()
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for x, y in zip(one.model.parameters(), four.model.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-4)


def test_a_step_without_targets_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, batch=lambda index: (batch(index)[0], torch.full((BATCH, BLOCK), -1)))
    with pytest.raises(InputError, match="step 0 has a target"):
        trainer.train()


def test_dropout_differs_from_step_to_step(tmp_path):
    """What the test before would not notice: dropout that always drops the same."""
    model, same = make_model(0.5), batch(0)
    make_trainer(
        tmp_path, replace(SETTINGS, learning_rate=0.0, weight_decay=0.0, steps=5), model, batch=lambda _: same
    ).train()
    losses = [row["loss"] for row in rows(tmp_path) if "loss" in row]
    assert len(set(losses)) == 5


def test_sigterm_saves_too(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, batch=interrupt_after(3, signal.SIGTERM))
    trainer.train()
    assert trainer.step == 3
    assert checkpoints(tmp_path)[-1].name == "step_00000003"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_an_evaluation_is_not_lost(tmp_path):
    def evaluate(model: GPT) -> float:
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    trainer = make_trainer(tmp_path, replace(SETTINGS, checkpoint_every=0), evaluate=evaluate)
    trainer.train()
    assert trainer.step == 6
    assert checkpoints(tmp_path)[-1].name == "step_00000006"


def test_a_second_signal_stops_at_once(tmp_path):
    def impatient(index: int) -> tuple[Tensor, ...]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return batch(index)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, batch=impatient).train()
    assert checkpoints(tmp_path) == []


def test_an_interrupt_before_the_first_step_saves_nothing(tmp_path):
    def evaluate(model: GPT) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    trainer = make_trainer(tmp_path, evaluate=evaluate)
    trainer.train()
    assert trainer.step == 0
    assert checkpoints(tmp_path) == []
    assert "stopped before the first step: nothing was saved" in printed(trainer)
    assert "--resume" not in printed(trainer)
    make_trainer(tmp_path, replace(SETTINGS, steps=1)).train()  # and nothing is in the way of starting again
    assert [row["step"] for row in read_metrics(tmp_path) if "val_loss" in row] == [0, 1]


@pytest.mark.parametrize("at", [10, 20])
def test_an_interrupt_ends_an_evaluation_which_is_made_up_for_on_resuming(tmp_path, at):
    """At step 10, where no checkpoint is due, and at the last one."""
    config = replace(SETTINGS, checkpoint_every=0)
    make_trainer(tmp_path / "straight", config).train()
    calls = 0

    def slow(model: GPT) -> float:
        nonlocal calls
        for _ in range(100):
            if trainer.step == at:
                calls += 1
                if calls == 3:
                    os.kill(os.getpid(), signal.SIGINT)
            loss = validation(model)
        return loss

    run = tmp_path / "stopped"
    trainer = make_trainer(run, config, evaluate=slow)
    trainer.train()
    assert (trainer.step, calls) == (at, 3)
    assert trainer.model.training
    assert not trainer.model.transformer._forward_pre_hooks
    assert f"stopped after step {at}; the same command with --resume" in printed(trainer)
    resumed(run, config).train()
    assert rows(run) == rows(tmp_path / "straight")
    assert (run / "checkpoints" / "best").exists()
    with pytest.raises(InputError, match="already at step 20"):
        resumed(run, config)


def test_an_evaluation_that_fails_leaves_the_model_in_training_mode(tmp_path):
    def evaluate(model: GPT) -> float:
        raise RuntimeError("no evaluation today")

    trainer = make_trainer(tmp_path, evaluate=evaluate)
    with pytest.raises(RuntimeError, match="today"):
        trainer.train()
    assert trainer.model.training


def test_signals_are_caught_before_tensorboard_is_imported(tmp_path, monkeypatch):
    class Board:
        def __init__(self, *arguments: object, **options: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)  # as if it came during the import

        def add_scalar(self, *arguments: object) -> None: ...

        def close(self) -> None: ...

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert (trainer.step, trainer.stop_requested) == (0, True)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("log_every", [1, 7])
def test_divergence_keeps_the_last_good_checkpoint(tmp_path, what, log_every):
    """A loss, or a gradient of a finite loss, that is not finite at step 10, where a checkpoint is due."""

    def loss_fn(model: Any, tensors: tuple[Tensor, ...]) -> Tensor:
        loss = model(*tensors)[1]
        if trainer.step == 9:
            loss = loss * math.inf if what == "loss" else loss + (0 * loss).sqrt()
        return loss

    trainer = make_trainer(tmp_path, replace(SETTINGS, log_every=log_every), loss_fn=loss_fn)
    with pytest.raises(DivergedError, match=r"at step 10 .*step_00000005"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005"]
    assert (tmp_path / "loss.png").is_file()
    weights = GPT.from_pretrained(checkpoints(tmp_path)[-1]).parameters()
    assert all(weight.isfinite().all() for weight in weights)


def test_divergence_is_noticed_before_an_interrupt_saves(tmp_path):
    """Steps whose losses have not been looked at yet must not become a checkpoint."""

    def loss_fn(model: Any, tensors: tuple[Tensor, ...]) -> Tensor:
        return model(*tensors)[1] * (math.nan if trainer.step == 6 else 1.0)

    config = replace(SETTINGS, log_every=100)
    trainer = make_trainer(tmp_path, config, loss_fn=loss_fn, batch=interrupt_after(9))
    with pytest.raises(DivergedError, match="at step 7 the loss is nan"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005"]


def test_tensorboard_and_the_plot_show_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    from PIL import Image

    make_trainer(tmp_path).train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "val_loss", "lr", "grad_norm"):
        expected = {row["step"]: row[name] for row in rows(tmp_path) if name in row}
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)
    with Image.open(tmp_path / "loss.png") as image:
        image.load()
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # lines, not a blank page


def test_without_tensorboard_and_matplotlib(tmp_path, monkeypatch):
    for name in (
        "tensorboard",
        "torch.utils.tensorboard",
        "matplotlib",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert printed(trainer).count("TensorBoard is not installed") == 1
    assert printed(trainer).count("matplotlib is not installed") == 1
    assert "pygpt-kernels[train]" in printed(trainer)
    assert not (tmp_path / "loss.png").exists()
    assert len(rows(tmp_path)) == 25


def test_mfu(tmp_path):
    """Shown where the device's peak is known or given: FLOPs per token from the formula, by hand."""
    make_trainer(tmp_path / "unknown", replace(SETTINGS, steps=1)).train()
    assert "mfu" not in read_metrics(tmp_path / "unknown")[-1]
    config = replace(SETTINGS, steps=1, peak_tflops=0.5)
    trainer = make_trainer(tmp_path / "given", config, evaluate=None)
    trainer.train()
    row = read_metrics(tmp_path / "given")[-1]
    parameters = sum(p.numel() for p in trainer.model.parameters()) - BLOCK * 16  # positions are only looked up
    flops = 6 * parameters + 12 * 2 * 16 * BLOCK
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 0.5e12)
    assert "MFU" in printed(trainer)


def test_samples_are_shown_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, sample_every=10), sample=lambda model: "x = [bold] # \U0001f600")
    trainer.train()
    assert printed(trainer).count("x = [bold] # \U0001f600") == 2
    assert trainer.model.training


def test_compiled_training_gives_the_same_losses(tmp_path, monkeypatch):
    """Traced with its backward, as compile=True does, but without generating code, which takes most of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = replace(SETTINGS, steps=3)
    sizes = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=BLOCK, vocab_size=VOCABULARY)
    for name in ("eager", "compiled"):
        torch.manual_seed(0)
        make_trainer(tmp_path / name, replace(config, compile=name == "compiled"), GPT(sizes), evaluate=None).train()
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_settings_out_of_range():
    bad = [
        {"steps": 0}, {"steps": -3}, {"accumulate": 0}, {"log_every": 0}, {"keep": 0}, {"learning_rate": -1.0},
        {"learning_rate": math.nan}, {"warmup": -1}, {"grad_clip": -1.0}, {"dtype": "float16"}, {"eval_every": -1},
        {"sample_every": -1}, {"checkpoint_every": -1}, {"betas": (0.9, 1.0)}, {"peak_tflops": 0.0}, {"seed": -1},
        {"seed": 2**63},
    ]  # fmt: skip
    for setting in bad:
        with pytest.raises(InputError, match=next(iter(setting))):
            TrainConfig(**setting)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "meta"):
        with pytest.raises(InputError, match=name):
            resolve_device(name)


def test_metrics_are_json_lines(tmp_path):
    make_trainer(tmp_path, replace(SETTINGS, steps=2)).train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2]
    file = tmp_path / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 3, "lo')  # a crash
    assert len(read_metrics(tmp_path)) == 4
    for line in ('{"loss": 1}', '{"step": 3, "lo', '{"step": null}', "3", "\x00"):
        file.write_text(f"{lines[0]}\n{line}\n{lines[1]}\n")
        with pytest.raises(InputError, match=r"metrics\.jsonl', line 2 is no row"):
            read_metrics(tmp_path)


def test_training_stops_when_validation_no_longer_gets_better(tmp_path):
    """The lowest loss, 2, is met at step 4; the same loss again is not lower, so that patience 3 ends with step 7."""
    losses = iter([9.0, 5.0, 3.0, 4.0, 2.0, 2.0, 6.0, 2.0, 1.0])  # the first is the evaluation before training
    config = replace(SETTINGS, eval_every=1, checkpoint_every=0, patience=3)
    trainer = make_trainer(tmp_path, config, evaluate=lambda model: next(losses))
    trainer.train()
    assert trainer.step == 7
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000007"]
    assert "stopped after step 7: 3 evaluations in a row without a lower validation loss" in printed(trainer)
    again = resumed(tmp_path, config, evaluate=lambda model: next(losses))
    again.train()
    assert again.step == 7
    more = resumed(tmp_path, replace(config, patience=4), evaluate=lambda model: next(losses, 8.0))
    more.train()
    assert more.step == 12  # 1.0 at step 8 was a new best
    never = make_trainer(tmp_path / "never", replace(config, patience=0), evaluate=lambda model: 1.0)
    never.train()
    assert never.step == config.steps


def test_an_evaluation_may_give_more_figures(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=lambda model: {"val_loss": 0.5, "val_macro_f1": 0.25})
    trainer.train()
    assert "step 20: validation loss 0.5000, macro f1 0.2500" in printed(trainer)
    assert [row["val_macro_f1"] for row in read_metrics(tmp_path) if "val_loss" in row] == [0.25] * 5
