"""Classification: finetune a GPT on labelled texts, and use the classifier.

pygpt finetune classify --init-from runs/base --data SMSSpamCollection.tsv --balance subsample --out runs/spam
pygpt classify runs/spam "You won! Call now"
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from torch import Tensor

from pygpt.classifier import Classifier
from pygpt.data.labelled import IDS, LengthBuckets, encode_text, read_labelled, read_texts, split, subsample
from pygpt.errors import InputError
from pygpt.model import GPT, PRESETS, GPTConfig
from pygpt.pretrained import checkpoint_tokenizer, resolve_checkpoint
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer
from pygpt.train.lora import add_lora
from pygpt.train.metrics import read_metrics
from pygpt.train.scores import Scores
from pygpt.train.trainer import Batch, TrainConfig, Trainer, check_run, remove_run, resolve_device


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TrainConfig):
    """Finetune a model to put texts into classes, from a file of labelled texts."""

    data: Path
    """Labelled texts: a .tsv, .csv or .jsonl file. Columns called text and label are found by themselves; a file of two
    columns without a header has the label first, as UCI's SMS Spam Collection."""
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
    """Share of each label's examples for the test at the end."""
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
    """One part of the split: token ids of each text, (T,) int64, and its label's id."""

    examples: list[IDS]
    labels: list[int]


@dataclass(frozen=True)
class Dataset:
    """labels: names by id. report: what was counted while reading, for results.json."""

    labels: list[str]
    train: Part
    val: Part
    test: Part
    report: dict[str, Any]


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
        max_length = min(config.max_length or gpt.config.block_size, gpt.config.block_size)
        data = load_dataset(config, tokenizer, max_length, tell)
        model = Classifier(gpt, data.labels, tokenizer, max_length)
    else:
        model = Classifier.from_pretrained(latest)
        data = load_dataset(config, model.tokenizer, model.max_length, tell)
        if model.labels != data.labels:
            raise InputError(f"cannot resume: the labels were {model.labels} and are {data.labels} now")
    freeze(model, config)
    sampler = LengthBuckets(data.train.examples, data.train.labels, config.batch_size, config.seed)
    weights = label_weights(data.train.labels) if config.balance == "weights" else None
    trainer = Trainer(
        model, sampler.batch, config, config.out, console=console, loss_fn=partial(_loss, weights=weights),
        evaluate=partial(_validate, part=data.val, weights=weights),
    )  # fmt: skip
    if latest is not None:
        trainer.resume(latest)
    if config.overwrite:
        remove_run(config.out)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tell(
        f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters train on {trainer.device} in "
        f"{config.dtype}; {config.steps} steps are {config.steps * config.accumulate / len(sampler):.1f} epochs of "
        f"{len(data.train.labels):,} texts; run folder {config.out}"
    )
    trainer.train()
    if not trainer.stop_requested:
        _test(config, data, trainer.device, console)
        tell(f'results in {config.out / "results.json"}; to use the classifier: pygpt classify {config.out} "a text"')
    return config.out


def _base(config: ClassifyConfig) -> tuple[GPT, Tokenizer]:
    """The model to start from, and its tokenizer."""
    if config.preset is not None:
        tokenizer = get_tokenizer(config.tokenizer)
        options = {} if config.dropout is None else {"dropout": config.dropout}
        return GPT(GPTConfig.preset(config.preset, vocab_size=tokenizer.vocab_size, **options)), tokenizer
    assert config.init_from is not None
    folder = resolve_checkpoint(config.init_from, prefer_best=True)
    gpt = GPT.from_pretrained(folder)
    found = checkpoint_tokenizer(folder, gpt.config.vocab_size)
    if found is None:
        raise InputError(f"'{folder}' does not say which tokenizer it uses: it holds no {TOKENIZER_FILE}")
    if config.dropout is not None or config.random_weights:
        trained = gpt.state_dict()
        gpt = GPT(gpt.config if config.dropout is None else replace(gpt.config, dropout=config.dropout))
        if not config.random_weights:
            gpt.load_state_dict(trained)
    return gpt, found


def load_dataset(config: ClassifyConfig, tokenizer: Tokenizer | None, max_length: int, tell: Any) -> Dataset:
    """Read, encode, balance and split; whatever is left out or cut is told and counted."""
    assert tokenizer is not None
    read = read_labelled(config.data, config.text_column, config.label_column, config.header, config.format)
    skipped, texts, names, examples, truncated = read.skipped, [], [], [], 0
    for text, name, line in zip(read.texts, read.labels, read.lines, strict=True):
        try:
            ids, is_long = encode_text(text, tokenizer, max_length)
        except InputError as error:
            raise InputError(f"'{config.data}', line {line}: {error}") from error
        if is_long and config.long == "skip":
            skipped[f"longer than {max_length} tokens"] += 1
            continue
        truncated += is_long
        texts.append(text)
        names.append(name)
        examples.append(ids)
    for reason, count in skipped.items():
        tell(f"left out {count:,} of {len(texts) + skipped.total():,} texts: {reason}")
    if truncated:
        tell(f"{truncated:,} texts are longer than {max_length} tokens and were cut there")
    chosen = subsample(names, config.seed) if config.balance == "subsample" else range(len(names))
    parts = split([names[i] for i in chosen], config.val_share, config.test_share, config.seed)
    labels = sorted(set(names))
    rows = [[chosen[i] for i in part] for part in parts]
    train, val, test = (Part([examples[i] for i in part], [labels.index(names[i]) for i in part]) for part in rows)
    counts = {name: dict(Counter(names[i] for i in part)) for name, part in zip(("train", "val", "test"), rows, strict=True)}
    seen = {texts[i] for i in rows[0]}
    repeated = sum(texts[i] in seen for i in rows[2])
    tell("; ".join(f"{name}: " + ", ".join(f"{n:,} {label}" for label, n in c.items()) for name, c in counts.items()))
    if repeated:
        tell(f"{repeated:,} of {len(rows[2]):,} test texts are word for word among the training texts too")
    report = {
        "texts": counts, "skipped": dict(skipped), "truncated": truncated, "test_texts_seen_in_training": repeated,
    }  # fmt: skip
    return Dataset(labels, train, val, test, report)


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
    logits, labels = model.logits(part.examples), torch.tensor(part.labels)
    scores = Scores.of(model.labels, labels, logits.argmax(-1))
    loss = _cross_entropy(logits, labels, weights).item()
    return {"val_loss": loss, "val_accuracy": scores.accuracy, "val_macro_f1": scores.macro_f1}


def _test(config: ClassifyConfig, data: Dataset, device: torch.device, console: Console) -> None:
    """Score the best checkpoint on all parts, print and write it."""
    model = Classifier.from_pretrained(config.out).to(device)
    rows = [row for row in read_metrics(config.out) if "val_loss" in row and row["step"] > 0]
    results = {"best_step": min(rows, key=lambda row: row["val_loss"])["step"], "labels": data.labels, **data.report}
    for name, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        scores = Scores.of(data.labels, part.labels, model.logits(part.examples).argmax(-1))
        results[name] = scores.as_dict()
        console.print(
            f"{name}: accuracy {scores.accuracy:.2%}, macro-F1 {scores.macro_f1:.4f}, {len(part.labels):,} texts"
        )
    title = f"test, best checkpoint (step {results['best_step']})"
    console.print(scores.table(title))
    scores.plot(config.out / "confusion.png", title, console)
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (config.out / "results.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Put texts into the classes of a trained classifier: label, probability and text, one line each."""

    run: Annotated[Path, tyro.conf.Positional]
    """A classifier: its run's folder (the best checkpoint is used), or a model folder."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Texts to classify."""
    file: Path | None = None
    """Instead of texts: a .txt file with one text per line, or a .tsv, .csv or .jsonl file."""
    text_column: str | None = None
    """The text's column in that file: its name in the header, its JSON key, or its index from 0."""
    header: bool | None = None
    """Whether the file's first row is a header; by default it is where the column is found or given by name."""
    format: str | None = None
    """txt, tsv, csv or jsonl, where the file's name does not tell."""
    batch_size: int = 32
    """Texts in a batch."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        if (not self.texts) == (self.file is None):
            raise InputError("give either texts to classify or --file")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")


def predict(config: PredictConfig) -> None:
    """Print label, probability and text of each text, tab-separated; what was left out or cut goes to stderr."""
    classifier = Classifier.from_pretrained(config.run).to(resolve_device(config.device))
    texts = list(config.texts)
    if config.file is not None:
        texts, _, skipped = read_texts(config.file, config.text_column, config.header, config.format)
        for reason, count in skipped.items():
            print(f"left out {count:,} rows: {reason}", file=sys.stderr)
    predictions = classifier.classify(texts, config.batch_size)
    for text, prediction in zip(texts, predictions, strict=True):
        print(f"{prediction.label}\t{prediction.probability:.4f}\t{' '.join(text.split())}")
    if cut := sum(prediction.truncated for prediction in predictions):
        print(f"{cut:,} texts are longer than {classifier.max_length} tokens and were cut there", file=sys.stderr)
