"""Evaluation of a language model: loss, perplexity and bits per byte over a whole text.

pygpt eval runs/mine --data data/stdlib
pygpt eval runs/mine --text book.txt
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from pygpt.data import load_tokens, sequential_windows
from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from pygpt.train.checkpoint import resolve_checkpoint
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
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
    tokens = _tokens(config, tokenizer)
    model = GPT.from_pretrained(folder).to(device).eval()
    if len(tokens) and int(tokens.max()) >= model.config.vocab_size:
        raise InputError(
            f"the text has token id {int(tokens.max())}, the model's vocabulary ends at {model.config.vocab_size - 1}; it was "
            f"prepared with another tokenizer"
        )
    total, count, block_size = 0.0, 0, model.config.block_size
    batches = math.ceil((len(tokens) - 1) / (block_size * config.batch_size))
    with Progress(console=console or Console(), transient=True) as bar:
        for x, y in bar.track(sequential_windows(tokens, block_size, config.batch_size), total=batches):
            n = int((y >= 0).sum())
            loss = model(x.to(device), y.to(device))[1]
            total, count = total + loss.item() * n, count + n
    loss = total / count
    size = len(tokenizer.decode_bytes(tokens[1:])) if tokenizer else None
    bits = total / math.log(2) / size if size else None
    return Evaluation(count, loss, math.exp(loss) if loss < 700 else math.inf, bits)


def _tokens(config: EvaluateConfig, tokenizer: Tokenizer | None) -> np.ndarray:
    if config.data is not None:
        return np.asarray(load_tokens(config.data, config.split))
    assert config.text is not None
    if not config.text.is_file():
        raise MissingFileError(f"no text file at '{config.text}'")
    if tokenizer is None:
        raise InputError(f"'{config.run}' does not say which tokenizer it uses; prepare the text and pass --data")
    try:
        text = config.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"'{config.text}' is not UTF-8 text ({error.reason} at byte {error.start})") from error
    ids = tokenizer.encode_array(text)
    if len(ids) < 2:
        raise InputError(f"'{config.text}' has {len(ids)} tokens; at least 2 are needed")
    return ids
