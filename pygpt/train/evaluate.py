"""Evaluation: how well a model does on a text, on labelled texts, or on multiple-choice questions.

pygpt eval runs/base --data data/stdlib               # loss, perplexity and bits per byte
pygpt eval runs/base --text book.txt
pygpt eval runs/spam --labelled SMSSpamCollection.tsv  # a classifier's accuracy and macro-F1
pygpt eval runs/base --choices hellaswag_val.jsonl     # accuracy, see `pygpt.train.multiple_choice`
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from pygpt.classifier import Classifier
from pygpt.data import load_tokens, sequential_windows
from pygpt.data.labelled import encode_text, read_labelled
from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT
from pygpt.pretrained import checkpoint_tokenizer, refuse_classifier, resolve_checkpoint
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from pygpt.train.checkpoint import check_vocabulary
from pygpt.train.multiple_choice import MultipleChoice, answer, read_questions
from pygpt.train.scores import Scores
from pygpt.train.trainer import resolve_device


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on all of a text, on labelled texts, or on multiple-choice questions."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best checkpoint), a checkpoint or a model folder."""
    data: Path | None = None
    """Folder that `pygpt prepare` wrote; its validation part is read."""
    split: str = "val"
    """Which part of --data: train or val."""
    text: Path | None = None
    """A UTF-8 text file."""
    labelled: Path | None = None
    """A .tsv, .csv or .jsonl file of texts and labels, for a classifier."""
    text_column: str | None = None
    """The text's column in --labelled: its name in the header, its JSON key, or its index from 0."""
    label_column: str | None = None
    """The label's column in --labelled: its name in the header, its JSON key, or its index from 0."""
    header: bool | None = None
    """Whether the first row of --labelled is a header; by default it is where columns are found or given by name."""
    format: str | None = None
    """tsv, csv or jsonl, where the name of --labelled does not tell."""
    choices: Path | None = None
    """A .jsonl file of multiple-choice questions in HellaSwag's format."""
    batch_size: int = 8
    """Sequences in a batch."""
    int8: bool = False
    """Measure the model with weights of 8 bits, as `pygpt generate --int8` has it."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.data, self.text, self.labelled, self.choices)) != 1:
            raise InputError(
                "eval needs one of --data (a prepared folder), --text (a text file), --labelled (texts and labels) and "
                "--choices (multiple-choice questions)"
            )
        if self.int8 and self.labelled is not None:
            raise InputError(
                "int8 is for language models: a classifier reads labelled texts with its weights as they are"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. bits_per_byte: comparable between tokenizers; None where the text's bytes are unknown."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None

    def __str__(self) -> str:
        bits = f", {self.bits_per_byte:.4f} bits per byte" if self.bits_per_byte is not None else ""
        return f"{self.tokens:,} tokens: loss {self.loss:.4f}, perplexity {self.perplexity:.2f}{bits}"


@dataclass(frozen=True)
class LabelledEvaluation:
    """A classifier's scores; truncated: texts whose end it did not read; skipped: rows left out, by reason."""

    scores: Scores
    truncated: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        scores, texts = self.scores, self.scores.confusion.sum()
        notes = [f"; {count:,} more left out: {reason}" for reason, count in self.skipped.items()]
        if self.truncated:
            notes.append(f"; {self.truncated:,} of them longer than what the classifier reads, and cut")
        return f"{texts:,} texts: accuracy {scores.accuracy:.2%}, macro-F1 {scores.macro_f1:.4f}{''.join(notes)}"


def evaluate(
    config: EvaluateConfig, console: Console | None = None
) -> Evaluation | LabelledEvaluation | MultipleChoice:
    """What `config` asks for; its text, `str(...)`, is what the command line prints.

    Raises PygptError for files that are missing or broken, with the line's number where there are lines, and for a model
    that does not fit the task.
    """
    console, device = console or Console(), resolve_device(config.device)
    if config.labelled is not None:
        return _evaluate_labelled(config, config.labelled, device)
    folder = resolve_checkpoint(config.run)
    refuse_classifier(folder, "give --labelled FILE")
    model = GPT.from_pretrained(folder).to(device).eval()
    if config.int8:
        model = model.to_int8()
    tokenizer = checkpoint_tokenizer(folder, model.config.vocab_size)
    if config.choices is not None:
        questions = read_questions(config.choices)
        rows = sum(len(question.endings) for question in questions)
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("Scoring", total=rows)
            return answer(
                model, _known(tokenizer, folder), questions, config.batch_size, lambda rows: bar.advance(task, rows)
            )
    if config.text is not None:
        tokens = _encode(config.text, _known(tokenizer, folder))
    else:
        tokens, tokenizer = _load(config, folder, model.config.vocab_size, tokenizer)
    return _evaluate_tokens(model, tokens, tokenizer, config.batch_size, console)


@torch.no_grad()
def _evaluate_tokens(
    model: GPT, tokens: npt.NDArray[Any], tokenizer: Tokenizer | None, batch_size: int, console: Console
) -> Evaluation:
    """Mean loss over every token but the first, in windows of the model's block_size that do not overlap."""
    block_size, device = model.config.block_size, model.lm_head.weight.device
    batches = math.ceil((len(tokens) - 1) / (block_size * batch_size))
    total, occurrences = 0.0, np.zeros(model.config.vocab_size, np.int64)
    with Progress(console=console, transient=True) as bar:
        for x, y in bar.track(sequential_windows(tokens, block_size, batch_size), total=batches):
            targets = y[y >= 0]
            total += model(x.to(device), y.to(device))[1].item() * len(targets)
            occurrences += np.bincount(targets, minlength=len(occurrences))
    count = int(occurrences.sum())
    loss = total / count
    size = _bytes(occurrences, tokenizer) if tokenizer else 0
    bits = total / math.log(2) / size if size else None
    return Evaluation(count, loss, math.exp(loss) if loss < 700 else math.inf, bits)


def _evaluate_labelled(config: EvaluateConfig, file: Path, device: torch.device) -> LabelledEvaluation:
    model = Classifier.from_pretrained(config.run).to(device)
    tokenizer = _known(model.tokenizer, config.run)
    read = read_labelled(file, config.text_column, config.label_column, config.header, config.format)
    examples, labels, truncated = [], [], 0
    for text, label, line in zip(read.texts, read.labels, read.lines, strict=True):
        if label not in model.labels:
            raise InputError(
                f"'{file}', line {line}: the classifier does not know the label '{label}', only {', '.join(model.labels)}"
            )
        try:
            ids, is_long = encode_text(text, tokenizer, model.max_length)
        except InputError as error:
            raise InputError(f"'{file}', line {line}: {error}") from error
        examples.append(ids)
        labels.append(model.labels.index(label))
        truncated += is_long
    scores = Scores.of(model.labels, labels, model.logits(examples, config.batch_size).argmax(-1))
    return LabelledEvaluation(scores, truncated, dict(read.skipped))


def _known(tokenizer: Tokenizer | None, folder: Path) -> Tokenizer:
    if tokenizer is None:
        raise InputError(f"'{folder}' does not say which tokenizer it uses; prepare the text and pass --data")
    return tokenizer


def _encode(text: Path, tokenizer: Tokenizer) -> npt.NDArray[Any]:
    if not text.is_file():
        raise MissingFileError(f"no text file at '{text}'")
    try:
        tokens = tokenizer.encode_array(text.read_bytes().decode("utf-8-sig"))  # as `prepare` reads it
    except UnicodeDecodeError as error:
        raise InputError(f"'{text}' is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if len(tokens) < 2:
        raise InputError(f"'{text}' has {len(tokens)} tokens; at least 2 are needed")
    return tokens


def _load(
    config: EvaluateConfig, folder: Path, vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[npt.NDArray[Any], Tokenizer | None]:
    """The tokens of --data, and what they mean."""
    assert config.data is not None
    file = load_tokens(config.data, config.split)
    data_tokenizer = load_tokenizer(config.data) if (config.data / TOKENIZER_FILE).is_file() else None
    check_vocabulary(folder, vocab_size, data_tokenizer, file.vocab_size or 0)
    tokens = np.asarray(file)
    if int(tokens.max()) >= vocab_size:
        raise InputError(f"'{file.path}' has token id {tokens.max()}, the model's vocabulary ends at {vocab_size - 1}")
    return tokens, data_tokenizer or tokenizer


def _bytes(occurrences: npt.NDArray[np.int64], tokenizer: Tokenizer) -> int:
    """Bytes of text in as many tokens of each id. Special tokens stand for no text."""
    special = set(tokenizer.special_tokens.values())
    ids = [int(token) for token in np.flatnonzero(occurrences) if int(token) not in special]
    return sum(int(occurrences[token]) * len(tokenizer.decode_bytes([token])) for token in ids)
