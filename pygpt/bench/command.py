"""`pygpt bench`: every op and the whole model against their peers on this machine.

Contestants take turns, in an order that changes from round to round. Each runs in a process whose allocator is as it comes,
or tuned as pygpt's training loops tune their own (`pygpt.tune_allocator`): pygpt in a tuned one, its peers in both. Where
memory is measured, everyone has a process alone, one after the other, first in one order and then in the reverse.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pygpt.bench.model import PEERS, PROMPT
from pygpt.bench.ops import OPS
from pygpt.bench.report import PLAIN, TUNED, Row, plot, table, write_json
from pygpt.bench.timing import DTYPES, commit, machine
from pygpt.bench.worker import Case, Worker, WorkerError
from pygpt.errors import InputError
from pygpt.model import PRESETS
from pygpt.ops import backends
from pygpt.train.trainer import resolve_device

NAMES = (*OPS, *PEERS)
SPIN = 0.005  # seconds that the threads of an idle process may go on waiting busily


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure pygpt's ops, GPT-2's training step and its generation against eager PyTorch, and others, on this machine."""

    only: tuple[str, ...] = ()
    """Ops (embedding, layer_norm, ...), training, decode; all of them by default."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """float32, bfloat16. In bfloat16 the peers of the training step keep float32 weights under autocast, as nanoGPT does."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""
    quick: bool = False
    """Small shapes and a small model, about a minute; without the peak memory, which takes a process for each contestant,
    and without CTranslate2."""
    all_shapes: bool = False
    """Each op at every shape of the repository's benches, not at its first alone; not with quick."""
    compile: bool = False
    """Also against torch.compile, which takes minutes and a C++ compiler."""
    seconds: float = 1.0
    """Time for one op at one shape, all contestants together."""
    preset: str = "gpt2"
    """Size of the model."""
    batch_size: int = 1
    """Sequences in a training step."""
    block_size: int = 1024
    """Tokens of a sequence in a training step."""
    decode_batches: tuple[int, ...] = (1, 8)
    """Rows that are generated at a time."""
    decode_tokens: int = 64
    """New tokens of each row."""
    rounds: int = 4
    """Timed training steps and generations of each contestant."""
    threads: int | None = None
    """Threads of each process; torch's own number by default."""
    out: Path = Path("runs/bench")
    """Folder for bench.json and bench.png."""

    def __post_init__(self) -> None:
        for what, given, known in (("op", self.only, NAMES), ("dtype", self.dtypes, DTYPES)):
            for name in given:
                if name not in known:
                    raise InputError(f"unknown {what} '{name}': choose from {', '.join(known)}")
        if self.preset not in PRESETS:
            raise InputError(f"unknown preset '{self.preset}': choose one of {', '.join(PRESETS)}")
        numbers = {name: getattr(self, name) for name in ("batch_size", "block_size", "decode_tokens", "rounds")}
        numbers |= {"threads": self.threads or 1, "decode_batches": min(self.decode_batches, default=1)}
        for name, value in numbers.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not self.seconds > 0:
            raise InputError(f"seconds must be over 0, got {self.seconds}")
        if self.threads == 0:
            raise InputError("threads must be at least 1, got 0")
        if not self.dtypes:
            raise InputError(f"no dtypes were given: choose from {', '.join(DTYPES)}")
        longest = max(self.block_size, self.decode_tokens + PROMPT)
        if not self.quick and longest > PRESETS[self.preset][3]:
            raise InputError(
                f"preset '{self.preset}' takes {PRESETS[self.preset][3]} tokens, and {longest} were asked for: lower "
                f"block_size or decode_tokens ({PROMPT} tokens of prompt come before them)"
            )


def bench(config: BenchConfig, console: Console | None = None) -> list[Row]:
    """Measure, print a table, write OUT/bench.json and OUT/bench.png; returns the rows. OUT/bench.part.json is what a run that
    is cut short has measured."""
    console = console or Console()
    device = str(resolve_device(config.device))
    threads = config.threads or torch.get_num_threads()
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder '{config.out}' cannot be made ({error.strerror}); choose another --out"
        ) from error
    rows: list[Row] = []
    about, part = machine() | {"threads": threads, "commit": commit()}, config.out / "bench.part.json"
    with contextlib.ExitStack() as stack, console.status("starting") as status:
        shared: dict[str, Worker] = {}
        for case, label in cases(config, device):
            status.update(f"{case.op} {label}, {case.dtype}, {case.passes}")
            alone = case.op in PEERS and not config.quick
            if not alone and not shared:
                shared = {kind: stack.enter_context(Worker(kind == TUNED, threads)) for kind in allocators(device)}
            sides = contestants(case, config)
            seconds = min(config.seconds, 0.3) if config.quick else config.seconds
            found = _alone(case, sides, threads, config.rounds) if alone else _together(case, sides, shared, seconds)
            rows += found.rows(case, label, sides)
            write_json(rows, about, part)
    show(rows, about, config.out, console)
    part.unlink(missing_ok=True)
    return rows


def show(rows: list[Row], about: dict[str, Any], out: Path, console: Console) -> None:
    """Print the table and write bench.json and, where matplotlib is installed, bench.png."""
    console.print(table(rows, about))
    write_json(rows, about, out / "bench.json")
    console.print(f"figures: {out / 'bench.json'}")
    try:
        plot(rows, about, out / "bench.png")
        console.print(f"chart: {out / 'bench.png'}")
    except ImportError:
        console.print("no chart: matplotlib is not installed (pip install pygpt-kernels\\[train])")


def allocators(device: str) -> tuple[str, ...]:
    """Both settings where there are two: `pygpt.tune_allocator` works with glibc, and on a GPU the memory is torch's own."""
    can_tune = backends.extension is not None and platform.libc_ver()[0] == "glibc"
    return (TUNED, PLAIN) if device == "cpu" and can_tune else (PLAIN,)


def cases(config: BenchConfig, device: str) -> Iterator[tuple[Case, str]]:
    """Everything that is to be measured, each with its shape in words."""
    chosen = config.only or NAMES
    for name, op in OPS.items():
        labels = [op.quick] if config.quick else [*op.shapes][: None if config.all_shapes else 1]
        for label in labels if name in chosen else ():
            for dtype in config.dtypes:
                for passes in op.passes:
                    yield Case(name, op.shapes[label], dtype, passes, device), label
    for job in PEERS:
        for shape in _model_shapes(job, config):
            for dtype in config.dtypes:
                if job in chosen:
                    label = f"{shape[0]}, batch {shape[1]}, {shape[2]} tokens"
                    yield Case(job, shape, dtype, "step" if job == "training" else "greedy", device), label


def _model_shapes(job: str, config: BenchConfig) -> list[tuple[str, int, int]]:
    if config.quick:
        return [("mini", 1, 128)] if job == "training" else [("mini", 1, 16)]
    if job == "training":
        return [(config.preset, config.batch_size, config.block_size)]
    return [(config.preset, batch, config.decode_tokens) for batch in config.decode_batches]


def contestants(case: Case, config: BenchConfig) -> list[tuple[str, str]]:
    """Who takes part in a case: (name, allocator)."""
    peers = PEERS.get(case.op, ("eager", "torch.compile"))
    kinds = allocators(case.device)
    sides = [("pygpt", kinds[0])]
    for peer in peers:
        if peer == "torch.compile" and (not config.compile or case.op == "adamw"):
            continue
        if peer.endswith("int8") and (config.quick or case.device != "cpu" or case.dtype != config.dtypes[-1]):
            continue  # the weights take a while to convert, and have but one form, which is shown beside the last dtype
        sides += [(peer, kind) for kind in (kinds[:1] if peer == "pygpt int8" else reversed(kinds))]
    return sides


Side = tuple[str, str]


@dataclass
class _Measured:
    """What the contestants of one case did."""

    times: dict[Side, list[float]] = field(default_factory=dict)
    problems: dict[Side, str] = field(default_factory=dict)
    peaks: dict[Side, float | None] = field(default_factory=dict)
    work: float = 0.0
    unit: str = ""

    def prepare(self, worker: Worker, kind: str, case: Case, names: list[str]) -> list[Side]:
        """Those of `names` that can run."""
        prepared = worker.prepare(case, names)
        self.work, self.unit = prepared.work, prepared.unit
        self.problems |= {(name, kind): problem for name, problem in prepared.problems.items()}
        return [(name, kind) for name in names if name not in prepared.problems]

    def rows(self, case: Case, label: str, sides: list[Side]) -> list[Row]:
        rows, ours = [], self.times.get(sides[0])
        for side in sides:
            row, times = Row(case.op, label, case.dtype, case.passes, *side), self.times.get(side)
            if not times:
                rows.append(replace(row, problem=self.problems[side]))
                continue
            median, best = statistics.median(times), min(times)
            row = replace(row, ms=median * 1e3, best_ms=best * 1e3, rate=self.work / median, unit=self.unit)
            row = replace(row, rounds=len(times), peak_mib=self.peaks.get(side))
            if ours:
                row = replace(row, speedup=median / statistics.median(ours), best_speedup=best / min(ours))
            rows.append(row)
        return rows


def _together(case: Case, sides: list[Side], workers: dict[str, Worker], seconds: float) -> _Measured:
    """The contestants take turns call by call."""
    found = _Measured()
    try:
        ready: list[Side] = []
        for kind, worker in workers.items():
            ready += found.prepare(worker, kind, case, [name for name, allocator in sides if allocator == kind])
        once = sum(workers[kind].time(name) for name, kind in ready)
        calls = max(1, round(0.005 * len(ready) / once)) if once else 1  # a turn is long against the clock
        rounds = max(4, min(50, int(seconds / (once * (calls + 1))))) // 2 * 2 if once else 0
        for round_ in range(rounds):
            for name, kind in ready if round_ % 2 == 0 else reversed(ready):
                time.sleep(SPIN)
                found.times.setdefault((name, kind), []).append(workers[kind].time(name, calls))
    except WorkerError as error:
        found.problems |= {side: str(error) for side in sides if side not in found.times}
    return found


def _alone(case: Case, sides: list[Side], threads: int, rounds: int) -> _Measured:
    """The contestants have a process each, one at a time, twice: there and back."""
    found = _Measured()
    for side in [*sides, *reversed(sides)]:
        name, kind = side
        if side in found.problems:
            continue
        try:
            with Worker(kind == TUNED, threads) as worker:
                if found.prepare(worker, kind, case, [name]):
                    times = [worker.time(name) for _ in range((rounds + 1) // 2)]
                    found.times.setdefault(side, []).extend(times)
                    found.peaks[side] = worker.peak()
        except WorkerError as error:
            found.problems[side] = str(error)
            found.times.pop(side, None)
    return found
