"""nanoGPT's shakespeare_char on a CPU (its README's settings): validation loss and wall time against eager PyTorch.

    python bench/shakespeare.py path/to/tiny_shakespeare.txt

Two models train in turns of 100 steps, on the same batches and in one process, so that noise hits both: pygpt's GPT, and
a plain PyTorch GPT in nanoGPT's style (`pygpt.bench.baseline`) with the optimizer that nanoGPT uses on a CPU. 2,000 steps each.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pygpt import GPT, GPTConfig
from pygpt.bench import baseline
from pygpt.data import PrepareConfig, RandomOffsets, load_tokens, prepare
from pygpt.optim import cosine_with_warmup

# nanoGPT uses a peak learning rate of 1e-3 here; at 3e-3 both models end 0.13 lower.
STEPS, TURN, BATCH = 2000, 100, 12
CONFIG = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0, "bias": False}


class Runner:
    """One of the models, with its optimizer and the time it has taken."""

    def __init__(self, name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.model, self.optimizer, self.seconds = name, model, optimizer, 0.0

    def train(self, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]], first: int, last: int) -> None:
        start = time.perf_counter()
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = cosine_with_warmup(step, peak=3e-3, minimum=3e-4, warmup=100, total=STEPS)
            loss = self.model(*batch(step))[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def evaluate(self, batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> float:
        return sum(self.model(*batch(step))[1].item() for step in range(200)) / 200


def main(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepare(PrepareConfig(inputs=(Path(text),), out=Path(folder), tokenizer="char", val_fraction=0.1))
        train, val = load_tokens(folder, "train"), load_tokens(folder, "val")
        batch = RandomOffsets(train, 64, BATCH, seed=1337).batch
        val_batch = RandomOffsets(val, 64, BATCH, seed=1).batch
        runners = []
        for name, make, config_class in (("pygpt", GPT, GPTConfig), ("eager", baseline.GPT, baseline.GPTConfig)):
            torch.manual_seed(1337)
            model = make(config_class(vocab_size=65, **CONFIG))
            optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), "cpu")
            runners.append(Runner(name, model, optimizer))
        for first in range(0, STEPS, TURN):
            for runner in runners:
                runner.train(batch, first, first + TURN)
        ours, eager = runners
        for runner in runners:
            print(f"{runner.name:6} {runner.seconds:7.1f} s   validation loss {runner.evaluate(val_batch):.4f}")
        print(f"pygpt takes {ours.seconds / eager.seconds:.2f} of eager's time ({eager.seconds / ours.seconds:.2f}x)")


if __name__ == "__main__":
    main(sys.argv[1])
