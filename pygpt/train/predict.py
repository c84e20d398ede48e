"""Put texts into the classes of a trained classifier.

pygpt classify runs/spam "You won! Call now" "see you at 8"
pygpt classify runs/spam --file texts.txt
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pygpt.classifier import Classifier
from pygpt.data.labelled import read_texts
from pygpt.errors import InputError
from pygpt.train.trainer import resolve_device


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
