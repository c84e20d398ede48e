"""How well a classifier does: accuracy, macro-F1 and the confusion matrix, as numbers, table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pygpt.errors import InputError


@dataclass(frozen=True)
class Scores:
    """confusion: (K, K) int64, rows the true labels, columns the predicted ones, in the order of `labels`."""

    labels: list[str]
    confusion: npt.NDArray[np.int64]

    @classmethod
    def of(cls, labels: Sequence[str], true: npt.ArrayLike, predicted: npt.ArrayLike) -> Scores:
        """From label ids, (N,) integers each, N >= 1, every one an index into `labels`."""
        size = len(labels)
        ids = np.asarray(true, np.int64) * size + np.asarray(predicted, np.int64)
        if ids.size == 0:
            raise InputError("there is nothing to score: no example")
        return cls(list(labels), np.bincount(ids, minlength=size * size).reshape(size, size))

    @property
    def accuracy(self) -> float:
        """Share of predictions that are right."""
        return float(self.confusion.trace() / self.confusion.sum())

    @property
    def f1(self) -> dict[str, float]:
        """F1 of each label that occurs, among the true or the predicted ones: 2 right / (true + predicted)."""
        right, total = self.confusion.diagonal(), self.confusion.sum(0) + self.confusion.sum(1)
        return {label: float(2 * r / t) for label, r, t in zip(self.labels, right, total, strict=True) if t}

    @property
    def macro_f1(self) -> float:
        """Mean of the labels' F1, each counting the same however rare it is."""
        return float(np.mean(list(self.f1.values())))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "examples": int(self.confusion.sum()),
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "f1": self.f1,
            "confusion": self.confusion.tolist(),
        }

    def table(self, title: str) -> Table:
        """The confusion matrix for a terminal."""
        table = Table("true \\ predicted", title=title)
        for label in self.labels:
            table.add_column(Text(label), justify="right")
        for label, row in zip(self.labels, self.confusion, strict=True):
            table.add_row(Text(label), *(f"{count:,}" for count in row))
        return table

    def plot(self, file: Path, title: str, console: Console) -> Path | None:
        """Draw the confusion matrix as a PNG; None, with a note, where matplotlib is not installed."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            console.print("no confusion.png: matplotlib is not installed (pip install pygpt-kernels\\[train])")
            return None
        size = len(self.labels)
        figure = Figure(figsize=(2.5 + 0.7 * size, 2 + 0.7 * size), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        share = self.confusion / np.maximum(self.confusion.sum(1, keepdims=True), 1)  # of each true label
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(size, size):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{self.confusion[row, column]:,}", ha="center", va="center", color=colour)
        names = [label.replace("$", r"\$") for label in self.labels]  # not matplotlib's formulas
        axes.set_xticks(range(size), names, rotation=45, ha="right")
        axes.set_yticks(range(size), names)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        figure.savefig(file, dpi=120)
        return file
