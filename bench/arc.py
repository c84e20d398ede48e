"""From raw text to something useful, in one go: pretrain a base, finetune it on spam and on instructions, compare.

    make arc                                     # downloads the two labelled data sets
    python bench/arc.py --sms SMSSpamCollection.tsv --instructions instruction_data.json      # or brings its own

1. A base: a small GPT pretrained on the source of Python's standard library (any other prepared folder: --data).
2. Spam or not, by the protocol of Raschka's "Build a Large Language Model (From Scratch)", chapter 6: as many ham as spam
   messages, 70/10/20 split, mean of 3 seeds; beside it the same model from random weights, and all messages as they are.
3. Instructions: the response loss on entries held out from training, before and after.

The runs go to OUT, with a table of results in OUT/arc.md. A second call goes on where the first one stopped.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import pygpt
from pygpt.data import PrepareConfig, prepare
from pygpt.train import PretrainConfig, pretrain
from pygpt.train.classify import ClassifyConfig, finetune_classify
from pygpt.train.instruct import InstructConfig, finetune_instruct


@dataclass(frozen=True, kw_only=True)
class Arc:
    """Pretrain a base, finetune it on spam and on instructions, compare."""

    sms: Path = Path("sms-spam")
    """UCI's SMS Spam Collection; by default it is downloaded."""
    instructions: Path = Path("instructions")
    """Entries of instruction, input and output; by default they are downloaded."""
    data: Path | None = None
    """Folder that `pygpt prepare` wrote, for the base; by default Python's standard library."""
    out: Path = Path("runs/arc")
    """Folder for all runs and for arc.md."""
    steps: int = 1000
    """Optimizer steps of the base."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the spam runs: split, head and order of the batches."""


def main(arc: Arc) -> None:
    pygpt.tune_allocator()
    console = Console()
    base, minutes = pretrain_base(arc, console)
    rows = [
        f"base pretrained in {minutes:.1f} minutes: validation loss {_last(base / 'metrics.jsonl', 'val_loss'):.3f}",
        "",
    ]
    rows += ["| spam or not | test accuracy | macro-F1 | of the seeds |", "|---|--:|--:|---|"]
    for name, options in (
        ("base, balanced", {"balance": "subsample"}),
        ("random weights, balanced", {"balance": "subsample", "random_weights": True}),
        ("base, all messages", {}),
    ):
        tests = [classify(arc, base, name, seed, options, console)["test"] for seed in arc.seeds]
        accuracy, f1 = ([test[key] for test in tests] for key in ("accuracy", "macro_f1"))
        each = ", ".join(f"{100 * a:.2f}" for a in accuracy)
        rows.append(f"| {name} | {100 * statistics.mean(accuracy):.2f}% | {statistics.mean(f1):.4f} | {each} |")
    rows += ["", *instruct(arc, base, console)]
    (arc.out / "arc.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    console.print("\n".join(rows), markup=False, highlight=False, soft_wrap=True)


def pretrain_base(arc: Arc, console: Console) -> tuple[Path, float]:
    """The base's run, and the minutes that its training took."""
    run, timing = arc.out / "base", arc.out / "base.json"
    if not timing.is_file():
        start = time.perf_counter()
        data = arc.data or arc.out / "stdlib"
        if arc.data is None:
            prepare(PrepareConfig(out=data))
        pretrain(
            PretrainConfig(
                data=data, out=run, overwrite=True, n_layer=4, n_head=4, n_embd=128, block_size=256, batch_size=16,
                steps=arc.steps, warmup=50, learning_rate=3e-3, min_learning_rate=3e-4, dropout=0.0,
            ),
            console,
        )  # fmt: skip
        timing.write_text(json.dumps({"minutes": (time.perf_counter() - start) / 60}))
    return run, json.loads(timing.read_text())["minutes"]


def classify(arc: Arc, base: Path, name: str, seed: int, options: dict[str, Any], console: Console) -> dict[str, Any]:
    """results.json of one classification run."""
    run = arc.out / f"spam {name} {seed}".replace(",", "").replace(" ", "-")
    if not (run / "results.json").is_file():
        finetune_classify(
            ClassifyConfig(data=arc.sms, init_from=base, out=run, overwrite=True, seed=seed, **options), console
        )
    return json.loads((run / "results.json").read_text())


def instruct(arc: Arc, base: Path, console: Console) -> list[str]:
    run = arc.out / "instruct"
    if not (run / "results.json").is_file():
        finetune_instruct(InstructConfig(data=arc.instructions, init_from=base, out=run, overwrite=True), console)
    return [json.dumps(json.loads((run / "results.json").read_text()))]


def _last(metrics: Path, name: str) -> float:
    values = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next(value[name] for value in reversed(values) if name in value)


if __name__ == "__main__":
    main(tyro.cli(Arc, description=__doc__))
