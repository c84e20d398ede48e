"""The figures of `pygpt bench` as a table, a bar chart and JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

PLAIN, TUNED = "as it comes", "tuned"  # allocator settings


@dataclass(frozen=True)
class Row:
    """One contestant in one case.

    Times are medians of `rounds` turns, in milliseconds; `rate`, in `unit`, comes from them. speedup: this time / pygpt's,
    so that pygpt is that much faster. best_speedup compares the fastest turns instead: on a machine with other work the
    medians of threaded code tell little. peak_mib: the process's peak memory, where it had one to itself. problem: why
    there are no figures.
    """

    op: str
    case: str
    dtype: str
    passes: str
    who: str
    allocator: str
    ms: float | None = None
    best_ms: float | None = None
    rate: float | None = None
    unit: str = ""
    speedup: float | None = None
    best_speedup: float | None = None
    peak_mib: float | None = None
    rounds: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.who}, {self.allocator}" if self.allocator == TUNED and self.who != "pygpt" else self.who


def by_case(rows: list[Row]) -> list[dict[str, Row]]:
    """Rows of each case by contestant; pygpt's first."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.case, row.dtype, row.passes), {})[row.name] = row
    return list(cases.values())


def peers_of(rows: list[Row]) -> list[str]:
    """Everyone but pygpt, in order of appearance."""
    return list(dict.fromkeys(row.name for row in rows if row.who != "pygpt"))


def table(rows: list[Row], about: dict[str, Any]) -> Table:
    """A section for each case, a line for each contestant: its figures, and how many times as fast pygpt is."""
    caption = " · ".join(f"{name} {value}" for name, value in about.items())
    made = Table(title="How many times as fast as its peers pygpt is", caption=caption, box=box.SIMPLE_HEAD)
    made.add_column("who", overflow="fold")
    for name in ("time", "rate", "peak memory", "faster"):
        made.add_column(name, justify="right", overflow="fold")
    for case in by_case(rows):
        first = next(iter(case.values()))
        made.add_section()
        made.add_row(f"[bold]{escape(f'{first.op} {first.case}, {first.dtype}, {first.passes}')}[/]")
        for row in case.values():
            made.add_row(f"  {escape(row.name)}", *_figures(row))
    return made


def _figures(row: Row) -> tuple[str, ...]:
    if row.ms is None:
        return (escape(row.problem),)
    memory = "" if row.peak_mib is None else f"{row.peak_mib:,.0f} MiB"
    time = f"{row.ms:.3g} ms" if row.ms < 1000 else f"{row.ms / 1e3:.3g} s"
    faster = "" if row.speedup is None or row.who == "pygpt" else f"{row.speedup:.2f}x"
    return time, f"{row.rate:.4g} {row.unit}", memory, faster


def write_json(rows: list[Row], about: dict[str, Any], file: Path) -> None:
    """{"machine": {...}, "results": [row, ...]}; the file is never seen half written."""
    temporary = file.with_name(f"{file.name}.tmp")
    content = {"machine": about, "results": [asdict(row) for row in rows]}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def read_json(file: Path) -> tuple[list[Row], dict[str, Any]]:
    """What `write_json` wrote."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return [Row(**row) for row in content["results"]], content["machine"]


def plot(rows: list[Row], about: dict[str, Any], file: Path) -> None:
    """Speedups as bars, one group a case, on a logarithmic axis. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [case for case in by_case(rows) if any(row.speedup for row in case.values())]
    peers = peers_of(rows)
    figure = Figure(figsize=(9, 1.5 + 0.16 * len(cases) * (len(peers) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / max(1, len(peers))
    for at, peer in enumerate(peers):
        found = [(i, case[peer].speedup if peer in case else None) for i, case in enumerate(cases)]
        bars = [(i, speedup) for i, speedup in found if speedup is not None]
        if bars:
            places = [i + (at - (len(peers) - 1) / 2) * height for i, _ in bars]
            drawn = axes.barh(places, [speedup for _, speedup in bars], height, label=f"over {peer}")
            axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=6)
    labels = [next(iter(case.values())) for case in cases]
    axes.set_yticks(range(len(cases)), [f"{r.op} {r.case}\n{r.dtype} {r.passes}" for r in labels], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xlabel="times as fast", title=f"pygpt on {about.get('gpu', about['cpu'])}, {about['threads']} threads")
    if cases:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=130)
