"""pytest-benchmark's side of the benches: times one of pygpt's ops and its eager PyTorch peer in turns, so that noise hits
both, and tabulates the medians.

Each round is one timing of the peer (pytest-benchmark's untimed `setup`) and one of ours, in an order that changes from
round to round: peer, ours, ours, peer. Before timing, the two results are compared: a benchmark of wrong results measures
nothing. Ops, shapes and peers are those of `pygpt bench`; both sides run in this one process, as its allocator comes.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from pygpt.bench.ops import OPS
from pygpt.bench.timing import DTYPES, commit, disagreement, machine, seconds

SECONDS = 1.5  # per case, ours and the peer together


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


def make_bench(name: str) -> Callable[..., None]:
    """The bench of an op: over its shapes, its passes and the dtypes."""
    op = OPS[name]

    @pytest.mark.parametrize("passes", op.passes)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", op.shapes)
    def bench(benchmark: Any, case: str, dtype: str, passes: str) -> None:
        compare(benchmark, name, case, dtype, passes)

    return bench


def compare(benchmark: Any, op: str, case: str, dtype: str, passes: str) -> None:
    """Time both and add a Row."""
    torch.manual_seed(0)
    pair = OPS[op].make(OPS[op].shapes[case], DTYPES[dtype], "cpu")
    ours, peer = (pair.call(side, passes) for side in (True, False))
    assert not (problem := disagreement(ours(), peer(), DTYPES[dtype])), problem
    once = min(seconds(ours), seconds(ours)) + min(seconds(peer), seconds(peer))
    calls = max(1, round(1e-3 / once))  # per round, so that a round is long against the clock
    rounds = min(200, max(12, int(SECONDS / (once * calls)))) // 2 * 2
    # Both by one clock: pytest-benchmark's own, outside, would count what it does before and after as ours.
    our_times: list[float] = []
    peer_times: list[float] = []
    turns = peer_turns(lambda: peer_times.append(seconds(peer, calls) / calls), rounds)
    benchmark.pedantic(lambda: our_times.append(seconds(ours, calls) / calls), setup=turns, rounds=rounds, iterations=1)
    turns()
    if benchmark.stats is None:  # --benchmark-disable: only the comparison above was wanted
        return
    our_time, peer_time = statistics.median(our_times), statistics.median(peer_times)
    work = pair.work[passes]
    row = Row(
        op=op,
        case=case,
        dtype=dtype,
        passes=passes,
        peer=pair.peer_name,
        our_ms=our_time * 1e3,
        peer_ms=peer_time * 1e3,
        speedup=peer_time / our_time,
        best_speedup=min(peer_times) / min(our_times),
        our_rate=work / our_time / 1e9,
        peer_rate=work / peer_time / 1e9,
        unit=pair.unit,
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


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "case", "dtype", "passes", "peer", "threads"))


def results_folder(results: Path) -> Path:
    """The folder of this machine's results, made where it is missing."""
    about = machine()
    words = f"{about['cpu']} {about['cores']} cores {about['capability']}".lower().replace("_", " ")
    target = results / "-".join("".join(c if c.isalnum() else " " for c in words).split())
    target.mkdir(parents=True, exist_ok=True)
    return target


def write_results(folder: Path) -> Path:
    """Merge ROWS into <folder>/<machine>/cpu.json and write cpu.md beside it; returns the Markdown file.

    A run of one op's bench replaces that op's rows and keeps the others, each with the commit it was measured at.
    """
    about = machine()
    target = results_folder(folder)
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
