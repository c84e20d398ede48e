"""Evaluation of a language model: loss, perplexity and bits per byte over a whole text.

pygpt eval runs/mine --data data/stdlib
pygpt eval runs/mine --text book.txt
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

from pygpt.data import load_tokens, sequential_windows
from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from pygpt.train.checkpoint import check_vocabulary, checkpoint_tokenizer, resolve_checkpoint
from pygpt.train.trainer import resolve_device


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model's loss on all of a text."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder, a checkpoint or a model folder."""
    data: Path | None = None
    """Folder that `pygpt prepare` wrote; its validation part is read."""
    split: str = "val"
    """Which part of --data: train or val."""
    text: Path | None = None
    """A UTF-8 text file, instead of --data."""
    batch_size: int = 8
    """Sequences in a batch."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        if (self.data is None) == (self.text is None):
            raise InputError("eval needs either --data (a prepared folder) or --text (a text file)")


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. bits_per_byte: comparable between tokenizers; None where the text's bytes are unknown."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float | None


@torch.no_grad()
def evaluate(config: EvaluateConfig, console: Console | None = None) -> Evaluation:
    """Mean loss over every token but the first, in windows of the model's block_size that do not overlap."""
    folder = resolve_checkpoint(config.run)
    device = resolve_device(config.device)
    model = GPT.from_pretrained(folder).to(device).eval()
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    tokenizer = checkpoint_tokenizer(folder, vocab_size)
    if config.text is not None:
        tokens = _encode(config.text, tokenizer, folder)
    else:
        tokens, tokenizer = _load(config, folder, vocab_size, tokenizer)
    batches = math.ceil((len(tokens) - 1) / (block_size * config.batch_size))
    total, occurrences = 0.0, np.zeros(vocab_size, np.int64)
    with Progress(console=console or Console(), transient=True) as bar:
        for x, y in bar.track(sequential_windows(tokens, block_size, config.batch_size), total=batches):
            targets = y[y >= 0]
            total += model(x.to(device), y.to(device))[1].item() * len(targets)
            occurrences += np.bincount(targets, minlength=vocab_size)
    count = int(occurrences.sum())
    loss = total / count
    size = _bytes(occurrences, tokenizer) if tokenizer else 0
    bits = total / math.log(2) / size if size else None
    return Evaluation(count, loss, math.exp(loss) if loss < 700 else math.inf, bits)


def _encode(text: Path, tokenizer: Tokenizer | None, folder: Path) -> npt.NDArray[Any]:
    if not text.is_file():
        raise MissingFileError(f"no text file at '{text}'")
    if tokenizer is None:
        raise InputError(f"'{folder}' does not say which tokenizer it uses; prepare the text and pass --data")
    try:
        tokens = tokenizer.encode_array(text.read_text(encoding="utf-8"))
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
