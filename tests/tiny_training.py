"""A tiny model and real steps, for the tests of the training loop and of its checkpoints."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pygpt import GPT, GPTConfig
from pygpt.data import RandomOffsets
from pygpt.train import TrainConfig, Trainer
from pygpt.train.checkpoint import checkpoints
from pygpt.train.metrics import read_metrics

LINUX = sys.platform == "linux"
VOCABULARY, BLOCK, BATCH = 17, 16, 4
SETTINGS = TrainConfig(
    steps=20, learning_rate=1e-2, warmup=4, log_every=1, eval_every=5, checkpoint_every=5, device="cpu", keep=2
)
# A text with something to learn: every token is followed by the next one, modulo the vocabulary, nine times of ten.
JUMPS = torch.rand(4096, generator=torch.Generator().manual_seed(0)) < 0.1
TOKENS = (torch.arange(4096) + 5 * JUMPS.cumsum(0)) % VOCABULARY
batch = RandomOffsets(TOKENS, BLOCK, BATCH, seed=3).batch


def make_model(dropout: float = 0.0, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=VOCABULARY, dropout=dropout))


def validation(model: GPT) -> float:
    torch.rand(7)  # an evaluation may draw random numbers; training must not notice
    x, y = RandomOffsets(TOKENS, BLOCK, BATCH, seed=4).batch(0)
    return model(x, y)[1].item()


def make_trainer(run: Path, config: TrainConfig = SETTINGS, model: GPT | None = None, **options: Any) -> Trainer:
    options = {"batch": batch, "evaluate": validation, "console": Console(file=io.StringIO(), width=200)} | options
    return Trainer(model or make_model(), options.pop("batch"), config, run, **options)


def printed(trainer: Trainer) -> str:
    return trainer.console.file.getvalue()


def interrupt_after(step: int, number: int = signal.SIGINT) -> Callable[[int], tuple[Tensor, ...]]:
    """A batch function that also sends this process a signal while the given step is being made ready."""

    def signalling(index: int) -> tuple[Tensor, ...]:
        if index == step - 1:
            os.kill(os.getpid(), number)
        return batch(index)

    return signalling


def resumed(run: Path, config: TrainConfig = SETTINGS, **options: Any) -> Trainer:
    """A new trainer that stands where the run's latest checkpoint does."""
    folder = checkpoints(run)[-1]
    trainer = make_trainer(run, config, GPT.from_pretrained(folder), **options)
    trainer.resume(folder)
    return trainer


def rows(run: Path) -> list[dict[str, float]]:
    """The run's metrics but for what the clock decides."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in read_metrics(run)]


def assert_same_state(one: Trainer, other: Trainer) -> None:
    for (name, x), y in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(x, y), name
        a, b = one.optimizer.state[x], other.optimizer.state[y]
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{name} {key}"
