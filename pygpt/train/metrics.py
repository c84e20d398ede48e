"""What a run tells: a progress bar on the terminal, metrics.jsonl, TensorBoard, and a plot of the loss at the end."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pygpt.errors import InputError

FILE = "metrics.jsonl"
DATASET_FILE = "dataset.json"  # what was counted while a run's data were read, and their sha256
RESULTS_FILE = "results.json"  # of the test after finetuning, written last: with it the run is complete


class Metrics:
    """Appends one JSON object per line to RUN/metrics.jsonl, and the same numbers to TensorBoard where it is installed.

    Lines of steps after `first_step` are dropped when it is opened: a resumed run writes them again.
    """

    def __init__(self, run: Path, first_step: int, console: Console) -> None:
        make_folder(run)
        kept = [row for row in read_metrics(run) if row["step"] <= first_step] if first_step else []
        temporary = run / f"{FILE}.tmp"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, run / FILE)
        self._file = (run / FILE).open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            console.print(
                "TensorBoard is not installed (pip install pygpt-kernels\\[train]); metrics go to metrics.jsonl only"
            )
            self._board = None
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, **values: float) -> None:
        """Values after `step` steps."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of RUN/metrics.jsonl; a last line that a crash cut off is left out. Raises InputError for any other line that
    is no row."""
    file = run / FILE
    lines = file.read_bytes().split(b"\n") if file.is_file() else [b""]
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"'{file}', line {number} is no row of metrics: delete that line, or the run") from error
    return rows


def holds_run(run: Path) -> bool:
    """Whether there is anything in a folder that a new run would overwrite."""
    return any((run / "checkpoints").glob("step_*")) or any(row["step"] > 0 for row in read_metrics(run))


def best_validation_loss(run: Path) -> float:
    """The lowest validation loss after a step of training so far; infinite if there is none."""
    return min(_validation_losses(run), default=math.inf)


def evaluations_since_best(run: Path) -> int:
    """Evaluations after the one with the lowest validation loss."""
    losses = _validation_losses(run)
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def _validation_losses(run: Path) -> list[float]:
    return [row["val_loss"] for row in read_metrics(run) if "val_loss" in row and row["step"] > 0]


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object for people to read, and the folders above it; the file is never seen half written."""
    make_folder(file.parent)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def make_folder(run: Path) -> None:
    """Make a run's folder where it is missing. Raises InputError where that cannot be done."""
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run's folder '{run}' cannot be made ({error.strerror}); choose another --out") from error


def check_same_data(run: Path, sha256: str) -> None:
    """Raise InputError unless RUN/dataset.json has this sha256: other examples would be split anew, and what was trained on
    could end up in the test; other tokens would be another training."""
    file = run / DATASET_FILE
    try:
        saved = json.loads(file.read_bytes())["sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot resume: '{file}', which says what the run was trained on, is not readable") from error
    if saved != sha256:
        raise InputError(
            f"cannot resume: the data are not those that '{run}' was trained on; give the same, wherever they are now, or "
            f"start a new run with --init-from {run}"
        )


def progress_bar(console: Console) -> Progress:
    """A bar with loss, tokens per second, MFU where it is known, and the time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


def plot_loss(run: Path, console: Console) -> Path | None:
    """Draw RUN/loss.png from the metrics; None, with a note, where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no loss plot: matplotlib is not installed (pip install pygpt-kernels\\[train])")
        return None
    rows = read_metrics(run)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style, label in (("loss", "-", "training"), ("val_loss", "o-", "validation")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats)", title=run.name)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(run / "loss.png", dpi=120)
    return run / "loss.png"
