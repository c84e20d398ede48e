"""From raw text to something useful, in one go: pretrain a base, finetune it on spam and on instructions, compare.

    make arc                                     # downloads the two labelled data sets
    python bench/arc.py --sms SMSSpamCollection.tsv --instructions instruction_data.json      # or brings its own

1. A base: a small GPT pretrained on messages of the spam collection, without their labels, as Howard and Ruder's ULMFiT (2018)
   reads a task's texts before it learns the task. No message that a seed validates or tests on is among them.
2. Spam or not, by the protocol of Raschka's "Build a Large Language Model (From Scratch)", chapter 6: as many ham as spam
   messages, 70/10/20 split, mean of the seeds; all weights trained, and the last block, final LayerNorm and head alone. Beside
   it the same from random weights, and all messages as they are, from random weights too: their test texts are in the base.
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

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from rich.console import Console

import pygpt
from pygpt.data import PrepareConfig, prepare
from pygpt.data.labelled import read_labelled
from pygpt.data.registry import dataset_path
from pygpt.train import PretrainConfig, pretrain
from pygpt.train.classify import ClassifyConfig, finetune_classify, load_parts
from pygpt.train.instruct import InstructConfig, finetune_instruct

ALL_WEIGHTS: dict[str, Any] = {"balance": "subsample", "learning_rate": 2e-4, "dropout": 0.2}
LAST_BLOCK: dict[str, Any] = {
    "balance": "subsample", "train": "blocks", "steps": 1300, "learning_rate": 5e-4, "dropout": 0.0
}  # fmt: skip
SPAM: dict[str, dict[str, Any]] = {
    "base, all weights": ALL_WEIGHTS,
    "random weights, all weights": {**ALL_WEIGHTS, "random_weights": True},
    "base, last block": LAST_BLOCK,
    "random weights, last block": {**LAST_BLOCK, "random_weights": True},
    "random weights, all messages": {**ALL_WEIGHTS, "balance": "none", "random_weights": True},
}


@dataclass(frozen=True, kw_only=True)
class Arc:
    """Pretrain a base, finetune it on spam and on instructions, compare."""

    sms: Path = Path("sms-spam")
    """UCI's SMS Spam Collection; by default it is downloaded."""
    instructions: Path = Path("instructions")
    """Entries of instruction, input and output; by default they are downloaded."""
    out: Path = Path("runs/arc")
    """Folder for all runs and for arc.md."""
    steps: int = 400
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
        "| spam or not | test accuracy | macro-F1 | of the seeds |",
        "|---|--:|--:|---|",
    ]
    for name, options in SPAM.items():
        tests = [classify(arc, base, name, seed, options, console)["test"] for seed in arc.seeds]
        accuracy, f1 = ([test[key] for test in tests] for key in ("accuracy", "macro_f1"))
        each = ", ".join(f"{100 * a:.2f}" for a in accuracy)
        rows.append(f"| {name} | {100 * statistics.mean(accuracy):.2f}% | {statistics.mean(f1):.4f} | {each} |")
    rows += ["", instruct(arc, base, console)]
    (arc.out / "arc.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    console.print("\n".join(rows), markup=False, highlight=False, soft_wrap=True)


def pretrain_base(arc: Arc, console: Console) -> tuple[Path, float]:
    """The base's run, and the minutes that it took."""
    run, timing = arc.out / "base", arc.out / "base.json"
    if not timing.is_file():
        start = time.perf_counter()
        data, file = arc.out / "messages", arc.out / "messages.parquet"
        arc.out.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": messages_to_read(arc)}), file)
        prepare(PrepareConfig(inputs=(file,), out=data))
        config = PretrainConfig(
            data=data, out=run, overwrite=True, n_layer=4, n_head=4, n_embd=256, block_size=256, dropout=0.1, batch_size=8,
            steps=arc.steps, warmup=20, learning_rate=1e-3, min_learning_rate=1e-4, eval_every=100, prompt="I will",
        )  # fmt: skip
        pretrain(config, console)
        _stop_unless(run / "checkpoints" / f"step_{arc.steps:08d}")
        timing.write_text(json.dumps({"minutes": (time.perf_counter() - start) / 60}))
    return run, json.loads(timing.read_text())["minutes"]


def messages_to_read(arc: Arc) -> list[str]:
    """The messages that none of the seeds validates or tests on."""
    held_out = set()
    for seed in arc.seeds:
        config = ClassifyConfig(data=arc.sms, preset="micro", balance="subsample", seed=seed)
        parts, _ = load_parts(config, pygpt.get_tokenizer("gpt2"), 1024, lambda line: None)
        held_out.update(parts["val"].texts, parts["test"].texts)
    return [text for text in read_labelled(dataset_path(arc.sms)).texts if text not in held_out]


def classify(arc: Arc, base: Path, name: str, seed: int, options: dict[str, Any], console: Console) -> dict[str, Any]:
    """results.json of one classification run."""
    run = arc.out / f"spam {name} {seed}".replace(",", "").replace(" ", "-")
    if not (run / "results.json").is_file():
        config = ClassifyConfig(data=arc.sms, init_from=base, out=run, overwrite=True, seed=seed, **options)
        finetune_classify(config, console)
        _stop_unless(run / "results.json")
    return json.loads((run / "results.json").read_text())


def instruct(arc: Arc, base: Path, console: Console) -> str:
    run = arc.out / "instruct"
    if not (run / "results.json").is_file():
        config = InstructConfig(data=arc.instructions, init_from=base, out=run, overwrite=True, learning_rate=1e-3)
        finetune_instruct(config, console)
        _stop_unless(run / "results.json")
    test = json.loads((run / "results.json").read_text())["test"]
    before, after = test["loss_before"], test["loss_after"]
    return (
        f"instructions: loss of held-out answers {before:.4f} -> {after:.4f}, {1 - after / before:.1%} less; "
        f"{test['ended_with_end_of_text']} of {test['answers']} answers end with end-of-text"
    )


def _stop_unless(written: Path) -> None:
    if not written.exists():  # what a run writes at its end: it was interrupted
        raise SystemExit("stopped; the same command goes on, from the start of the run that was interrupted")


def _last(metrics: Path, name: str) -> float:
    values = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next(value[name] for value in reversed(values) if name in value)


if __name__ == "__main__":
    main(tyro.cli(Arc, description=__doc__))
