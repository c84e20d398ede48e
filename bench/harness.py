"""Times one of pygpt's ops and its eager PyTorch peer in turns, so that noise hits both, and tabulates the medians.

Each round is one timing of the peer (pytest-benchmark's untimed `setup`) and one of ours, in an order that changes from
round to round: peer, ours, ours, peer. Before timing, the two results are compared: a benchmark of wrong results measures
nothing. GB/s counts each input and output once, and attention's FLOPs count the visible half of the scores only.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import pygpt
from pygpt.ops import backends

SECONDS = 1.5  # per case, ours and the peer together
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference from the peer, of the largest value. Tests hold the ops to far less, against float64; but torch sums
# LayerNorm's bfloat16 weight gradients in bfloat16, which is 9% off over 4,096 rows (ours: 0.3%).
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Times are medians in milliseconds; rates, in `unit`, and speedup (peer time / our time) come from them. best_speedup
    compares the fastest rounds instead: on a machine with other work the medians of threaded code tell little.
    """

    op: str
    case: str
    dtype: str
    passes: str
    peer: str
    our_ms: float
    peer_ms: float
    speedup: float
    best_speedup: float
    our_rate: float
    peer_rate: float
    unit: str
    threads: int
    rounds: int
    commit: str
    date: str


ROWS: list[Row] = []


def forward_backward(
    function: Callable[[], Any], inputs: list[torch.Tensor], cotangents: list[torch.Tensor]
) -> Callable[[], list[torch.Tensor]]:
    """A call that runs `function` and returns its outputs and the gradients of `inputs`."""

    def run() -> list[torch.Tensor]:
        outputs = function()
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        return outputs + list(torch.autograd.grad(outputs, inputs, cotangents))

    return run


def compare(
    benchmark: Any,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    op: str,
    case: str,
    dtype: torch.dtype,
    passes: str,
    peer_name: str,
    work: float,
    unit: str,
) -> None:
    """Time both and add a Row. work: bytes (unit "GB/s") or floating-point operations (unit "GFLOP/s") of one call.

    A forward pass alone is that of generation and evaluation, without autograd; training always runs both passes.
    """
    ours, peer = (torch.no_grad()(f) if passes == "forward" else f for f in (ours, peer))
    _check_agreement(ours(), peer(), dtype)
    once = min(_seconds(ours, 1), _seconds(ours, 1)) + min(_seconds(peer, 1), _seconds(peer, 1))
    calls = max(1, round(1e-3 / once))  # per round, so that a round is long against the clock
    rounds = min(200, max(12, int(SECONDS / (once * calls)))) // 2 * 2
    peer_times: list[float] = []
    turns = peer_turns(lambda: peer_times.append(_seconds(peer, calls) / calls), rounds)
    benchmark.pedantic(lambda: _seconds(ours, calls), setup=turns, rounds=rounds, iterations=1)
    turns()
    if benchmark.stats is None:  # --benchmark-disable: only the comparison above was wanted
        return
    our_time, peer_time = benchmark.stats.stats.median / calls, statistics.median(peer_times)
    row = Row(
        op=op,
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        passes=passes,
        peer=peer_name,
        our_ms=our_time * 1e3,
        peer_ms=peer_time * 1e3,
        speedup=peer_time / our_time,
        best_speedup=min(peer_times) / (benchmark.stats.stats.min / calls),
        our_rate=work / our_time / 1e9,
        peer_rate=work / peer_time / 1e9,
        unit=unit,
        threads=torch.get_num_threads(),
        rounds=rounds,
        commit=commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )
    benchmark.extra_info.update(asdict(row))
    ROWS.append(row)


def peer_turns(time_peer: Callable[[], None], rounds: int) -> Callable[[], None]:
    """To be called before each of `rounds` (an even number) of ours and once after the last: peer, ours, ours, peer, ...

    Whoever always goes first finds other caches, and other freed memory, than whoever follows.
    """
    done = 0

    def turn() -> None:
        nonlocal done
        if done % 2 == 0:
            for _ in range(1 if done in (0, rounds) else 2):
                time_peer()
        done += 1

    return turn


def _seconds(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def _check_agreement(ours: Any, peer: Any, dtype: torch.dtype) -> None:
    ours, peer = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (ours, peer))
    for a, b in zip(ours, peer, strict=True):
        assert a.shape == b.shape
        error, largest = (a.double() - b.double()).abs().max(), b.double().abs().max()
        assert error <= AGREE[dtype] * largest, f"results differ by {error:.3g} where values reach {largest:.3g}"


def commit() -> str:
    """The commit of the working tree, with + where it holds changes; "unknown" outside a repository."""
    run = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run)  # type: ignore[call-overload]
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run)  # type: ignore[call-overload]
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    level = backends.extension.cpu_capability() if backends.extension else "no compiled extension"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": level,
        "torch": torch.__version__,
        "pygpt": pygpt.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 1),
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "case", "dtype", "passes", "peer", "threads"))


def write_results(folder: Path) -> Path:
    """Merge ROWS into <folder>/<machine>/cpu.json and write cpu.md beside it; returns the Markdown file.

    A run of one op's bench replaces that op's rows and keeps the others, each with the commit it was measured at.
    """
    about = machine()
    words = f"{about['cpu']} {about['cores']} cores {about['capability']}".lower().replace("_", " ")
    target = folder / "-".join("".join(c if c.isalnum() else " " for c in words).split())
    target.mkdir(parents=True, exist_ok=True)
    path = target / "cpu.json"
    rows = {_key(row): row for row in (json.loads(path.read_text())["results"] if path.exists() else [])}
    rows.update({_key(asdict(row)): asdict(row) for row in ROWS})
    results = sorted(rows.values(), key=lambda row: row["op"])
    path.write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")
    (target / "cpu.md").write_text(_markdown(about, results))
    return target / "cpu.md"


def _markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "# CPU kernels against eager PyTorch",
        "",
        " · ".join(f"{name} {value}" for name, value in about.items()),
        "",
    ]
    lines += [
        "Medians of rounds in which ours and the peer take turns. Speedup: the peer's time / ours; in brackets between the"
    ]
    lines += ["fastest rounds, which other work on the machine disturbs least.", ""]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [f"## {op}", "", "| case | dtype | passes | threads | pygpt | | peer | | | speedup | commit |"]
        lines.append("|---|---|---|--:|--:|--:|---|--:|--:|--:|---|")
        for r in (row for row in rows if row["op"] == op):
            cells = [r["case"], r["dtype"], r["passes"], r["threads"]]
            cells += [f"{r['our_ms']:.3g} ms", f"{r['our_rate']:.3g} {r['unit']}", r["peer"]]
            cells += [f"{r['peer_ms']:.3g} ms", f"{r['peer_rate']:.3g} {r['unit']}"]
            cells += [f"{r['speedup']:.2f} ({r['best_speedup']:.2f})", f"{r['commit']} {r['date']}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def console_table() -> list[str]:
    """ROWS for a terminal."""
    return [
        f"{r.op:17} {r.case:24} {r.dtype:9} {r.passes:17} {r.our_ms:9.3f} ms {r.our_rate:7.1f} {r.unit:7}"
        f"   {r.peer:32} {r.peer_ms:9.3f} ms {r.peer_rate:7.1f} {r.unit:7} {r.speedup:6.2f}x ({r.best_speedup:.2f}x)"
        for r in ROWS
    ]
