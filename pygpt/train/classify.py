"""Classification: finetune a GPT on labelled texts, split into training, validation and test.

pygpt finetune classify --init-from runs/base --data SMSSpamCollection.tsv --balance subsample --out runs/spam
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from pygpt.classifier import Classifier
from pygpt.data.labelled import IDS, LengthBuckets, encode_text, read_labelled, split, subsample
from pygpt.data.registry import dataset_path
from pygpt.errors import InputError
from pygpt.model import GPT, PRESETS, GPTConfig
from pygpt.pretrained import load_with_tokenizer, resolve_checkpoint
from pygpt.tokenizer import Tokenizer, get_tokenizer
from pygpt.train.lora import add_lora
from pygpt.train.metrics import DATASET_FILE, RESULTS_FILE, check_same_data, read_metrics, write_json
from pygpt.train.scores import Scores
from pygpt.train.trainer import Batch, TrainConfig, Trainer, check_run, new_model, remove_run


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TrainConfig):
    """Finetune a model to put texts into classes, from a file of labelled texts."""

    data: Path
    """Labelled texts: a .tsv, .csv or .jsonl file, or a name that `pygpt data` lists. Columns called text and label are
    found by themselves; a file of two columns without a header has the label first, as UCI's SMS Spam Collection."""
    text_column: str | None = None
    """The text's column: its name in the header, its JSON key, or its index from 0."""
    label_column: str | None = None
    """The label's column: its name in the header, its JSON key, or its index from 0."""
    header: bool | None = None
    """Whether the first row is a header; by default it is where columns are found or given by name."""
    format: str | None = None
    """tsv, csv or jsonl, where the file's name does not tell."""
    out: Path = Path("runs/classify")
    """The run's folder: checkpoints, metrics.jsonl, results.json, confusion.png, loss.png."""
    resume: bool = False
    """Go on from the run's latest checkpoint."""
    overwrite: bool = False
    """Delete what an earlier run left in OUT."""
    init_from: Path | None = None
    """The run or model folder to start from; of a run, its best checkpoint."""
    random_weights: bool = False
    """Take the sizes and the tokenizer of init_from, but random weights: to see what pretraining is worth."""
    preset: str | None = None
    """Without init_from: a named size, e.g. micro, with random weights."""
    tokenizer: str = "gpt2"
    """Without init_from: a tiktoken encoding."""
    dropout: float | None = None
    """Dropout probability while training; by default the model's own."""
    train: str = "all"
    """What trains besides the head: all; blocks: the last `blocks` blocks and the final LayerNorm; head: nothing; lora:
    LoRA adapters on all blocks."""
    blocks: int = 1
    """With train blocks: how many."""
    lora_rank: int = 8
    """With train lora: rank of the adapters."""
    lora_alpha: float = 16.0
    """With train lora: the adapters' update counts alpha / rank times."""
    lora_dropout: float = 0.0
    """With train lora: probability of dropping an adapter's input while training."""
    balance: str = "none"
    """none; subsample: as many examples of every label as the rarest has; weights: rare labels count more in the loss."""
    val_share: float = 0.1
    """Share of each label's examples for validation."""
    test_share: float = 0.2
    """Share of each label's examples for the test at the end. The seed decides which ones."""
    max_length: int | None = None
    """Tokens of a text that are read; by default the model's block_size."""
    long: str = "truncate"
    """What happens to a longer text: truncate, or skip. Both are counted and reported."""
    batch_size: int = 8
    """Texts in a batch."""
    steps: int = 650
    """Optimizer steps in all."""
    learning_rate: float = 1e-4
    """Peak learning rate, reached after the warmup."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step, at the end of the cosine."""
    warmup: int = 30
    """Steps of linear warmup."""
    eval_every: int = 65
    """Steps between evaluations; 0: only at the end."""
    patience: int = 4
    """Evaluations in a row without a lower validation loss after which training stops; 0: it never stops early."""
    keep: int = 1
    """Newest checkpoints that are kept, beside the best one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("train", ("all", "blocks", "head", "lora")),
            ("balance", ("none", "subsample", "weights")),
            ("long", ("truncate", "skip")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got '{getattr(self, name)}'")
        for name in ("batch_size", "blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 1:
            raise InputError(f"max_length must be at least 1, got {self.max_length}")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other")
        if (self.init_from is None) == (self.preset is None):
            raise InputError("give either init_from (a run or model folder) or preset (a size, with random weights)")
        if self.random_weights and self.init_from is None:
            raise InputError("random_weights takes its sizes from init_from; a preset has random weights anyway")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"unknown preset '{self.preset}': choose one of {', '.join(PRESETS)}")


# What may differ between a run and its continuation: how long, how often, where - not what is computed per step.
CHANGEABLE = (
    "steps", "resume", "overwrite", "out", "data", "init_from", "eval_every", "patience", "checkpoint_every", "keep",
    "log_every", "sample_every", "peak_tflops", "device", "compile",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Examples, or one part of them: the texts, the token ids of each, (T,) int64, and each one's label."""

    texts: list[str]
    examples: list[IDS]
    labels: list[str]

    def at(self, rows: Sequence[int]) -> Part:
        """Those at the given positions."""
        return Part([self.texts[i] for i in rows], [self.examples[i] for i in rows], [self.labels[i] for i in rows])

    def ids(self, names: Sequence[str]) -> list[int]:
        """The labels' positions in `names`. Raises InputError for a label that is not among them."""
        if unknown := set(self.labels) - set(names):
            raise InputError(f"label '{min(unknown)}' is unknown: the classifier's labels are {', '.join(names)}")
        return [names.index(label) for label in self.labels]


def finetune_classify(config: ClassifyConfig, console: Console | None = None) -> Path:
    """Train as configured, then test the best checkpoint; returns the run's folder.

    RUN/results.json has accuracy, macro-F1 and confusion matrix of all three parts. Raises PygptError for settings, data
    or files that do not fit.
    """
    console = console or Console()
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    latest = check_run(config, config.out, config.resume, config.overwrite, CHANGEABLE)
    torch.manual_seed(config.seed)
    if latest is None:
        gpt, tokenizer = _base(config)
        max_length = config.max_length or gpt.config.block_size
        parts, report = load_parts(config, tokenizer, max_length, tell)
        model = Classifier(gpt, sorted(set(parts["train"].labels)), tokenizer, max_length)
    else:
        model = Classifier.from_pretrained(latest)
        parts, report = load_parts(config, model.tokenizer, model.max_length, tell)
        check_same_data(config.out, report["sha256"])
    freeze(model, config)
    labels = parts["train"].ids(model.labels)
    sampler = LengthBuckets(parts["train"].examples, labels, config.batch_size, config.seed)
    weights = label_weights(labels) if config.balance == "weights" else None
    trainer = Trainer(
        model, sampler.batch, config, config.out, console=console, loss_fn=partial(_loss, weights=weights),
        evaluate=partial(_validate, part=parts["val"], weights=weights),
    )  # fmt: skip
    results = config.out / RESULTS_FILE
    if latest is not None:
        trainer.resume(latest, tested=results.is_file())
        results.unlink(missing_ok=True)  # of fewer steps: should the test be cut off, the file must not be there
    if config.overwrite:
        remove_run(config.out)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tell(
        f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters train on {trainer.device} in "
        f"{config.dtype}; {config.steps} steps are {config.steps * config.accumulate / len(sampler):.1f} epochs of "
        f"{len(labels):,} texts; run folder {config.out}"
    )
    write_json(config.out / DATASET_FILE, report)
    trainer.train()
    if not trainer.stop_requested:
        _test(config.out, parts, report, trainer.device, console)
        tell(f'results in {results}; to use the classifier: pygpt classify {config.out} "a text"')
    return config.out


def _base(config: ClassifyConfig) -> tuple[GPT, Tokenizer]:
    """The model to start from, and its tokenizer."""
    if config.preset is not None:
        tokenizer = get_tokenizer(config.tokenizer)
        options = {} if config.dropout is None else {"dropout": config.dropout}
        sizes = GPTConfig.preset(config.preset, vocab_size=tokenizer.vocab_size, **options)
        return new_model(sizes, config.device, config.train == "all"), tokenizer
    assert config.init_from is not None
    gpt, found = load_with_tokenizer(resolve_checkpoint(config.init_from), config.dropout)
    return GPT(gpt.config) if config.random_weights else gpt, found


def load_parts(
    config: ClassifyConfig, tokenizer: Tokenizer | None, max_length: int, tell: Callable[[str], None]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """train, val and test, read, encoded, balanced and split; and what was counted on the way, which is told as well."""
    found, report = encode_labelled(config, tokenizer, max_length, tell)
    if config.balance == "subsample":
        found = found.at(subsample(found.labels, config.seed))
    rows = split(found.labels, config.val_share, config.test_share, config.seed)
    parts = {name: found.at(part) for name, part in zip(("train", "val", "test"), rows, strict=True)}
    report["texts"] = {name: dict(sorted(Counter(part.labels).items())) for name, part in parts.items()}
    for name, counts in report["texts"].items():
        tell(f"{name}: " + ", ".join(f"{count:,} {label}" for label, count in counts.items()))
    seen = set(parts["train"].texts)
    report["test_texts_seen_in_training"] = repeated = sum(text in seen for text in parts["test"].texts)
    if repeated:
        tell(f"{repeated:,} of {len(rows[2]):,} test texts are word for word among the training texts too")
    return parts, report


def encode_labelled(
    config: ClassifyConfig, tokenizer: Tokenizer | None, max_length: int, tell: Callable[[str], None]
) -> tuple[Part, dict[str, Any]]:
    """All examples of the file; how many texts were left out, by reason, or cut; and the examples' SHA-256."""
    assert tokenizer is not None
    read = read_labelled(
        dataset_path(config.data), config.text_column, config.label_column, config.header, config.format
    )
    found, skipped, truncated = Part([], [], []), read.skipped, 0
    for text, label, line in zip(read.texts, read.labels, read.lines, strict=True):
        try:
            ids, is_long = encode_text(text, tokenizer, max_length)
        except InputError as error:
            raise InputError(f"'{config.data}', line {line}: {error}") from error
        if is_long and config.long == "skip":
            skipped[f"longer than {max_length} tokens"] += 1
            continue
        truncated += is_long
        found.texts.append(text)
        found.examples.append(ids)
        found.labels.append(label)
    for reason, count in skipped.items():
        tell(f"left out {count:,} of {len(found.texts) + skipped.total():,} texts: {reason}")
    if truncated:
        tell(f"{truncated:,} texts are longer than {max_length} tokens and were cut there")
    digest = hashlib.sha256(json.dumps([found.texts, found.labels]).encode()).hexdigest()
    return found, {"skipped": dict(skipped), "truncated": truncated, "sha256": digest}


def freeze(model: Classifier, config: ClassifyConfig) -> None:
    """Leave only those parameters trainable that `config.train` names; the head always is."""
    if config.train == "lora":
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    elif config.train != "all":
        model.requires_grad_(False)
    if config.train == "blocks":
        if config.blocks > len(model.transformer.h):
            raise InputError(f"blocks is {config.blocks}, and the model has {len(model.transformer.h)}")
        model.transformer.h[-config.blocks :].requires_grad_(True)
        model.transformer.ln_f.requires_grad_(True)
    model.score.requires_grad_(True)


def label_weights(labels: Sequence[int]) -> Tensor:
    """A weight per label, float32, in inverse proportion to its count; their mean over the examples is 1."""
    counts = torch.bincount(torch.tensor(labels))
    return len(labels) / (len(counts) * counts.float())


def _loss(model: Any, batch: Batch, weights: Tensor | None = None) -> Tensor:
    idx, lengths, labels = batch
    return _cross_entropy(model(idx, lengths), labels, weights)


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Divided by the number of texts, not by their weights' sum, so that a text counts the same in every batch."""
    weights = None if weights is None else weights.to(logits.device)
    return F.cross_entropy(logits.float(), labels, weights, reduction="sum") / len(labels)


def _validate(model: Classifier, part: Part, weights: Tensor | None) -> dict[str, float]:
    logits, labels = model.logits(part.examples), torch.tensor(part.ids(model.labels))
    scores = Scores.of(model.labels, labels, logits.argmax(-1))
    loss = _cross_entropy(logits, labels, weights).item()
    return {"val_loss": loss, "val_accuracy": scores.accuracy, "val_macro_f1": scores.macro_f1}


def _test(run: Path, parts: dict[str, Part], report: dict[str, Any], device: torch.device, console: Console) -> None:
    """Score the best checkpoint on all parts, print and write it."""
    model = Classifier.from_pretrained(run).to(device)
    losses = {row["val_loss"]: row["step"] for row in read_metrics(run)[::-1] if "val_loss" in row and row["step"] > 0}
    results = {"best_step": losses[min(losses)], "labels": model.labels, **report}
    for name, part in parts.items():
        scores = Scores.of(model.labels, part.ids(model.labels), model.logits(part.examples).argmax(-1))
        results[name] = scores.as_dict()
        console.print(
            f"{name}: accuracy {scores.accuracy:.2%}, macro-F1 {scores.macro_f1:.4f}, {len(part.labels):,} texts"
        )
    title = f"test, best checkpoint (step {results['best_step']})"
    console.print(scores.table(title))
    scores.plot(run / "confusion.png", title, console)
    write_json(run / RESULTS_FILE, results)
