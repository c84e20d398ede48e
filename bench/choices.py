"""Prints the lines of pygpt/ops/choices.py that a result of bench/gpu.py gives: which of pygpt's own GPU columns was the
fastest, per op and size, forward and backward together.

    python bench/choices.py bench/results/NVIDIA_H100_80GB_HBM3/gpu.json

Where none of them beat the best of eager's own, or eager has no figure, the line is a comment: `auto` then needs a decision
for the whole op, because it can change between our kernels from call to call, but not to the reference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPS = {
    "attention": "causal_attention", "layer_norm": "layer_norm", "add_layer_norm": "add_layer_norm",
    "embedding": "embedding", "bias_gelu": "gelu", "linear_cross_entropy": "linear_cross_entropy", "adamw": "adamw",
}  # fmt: skip
# How the sizes that a line may name stand in a row's case. The first is the outer one: its lines stay together.
SIZES = {"attention": {"D": r"D (\d+)", "T": r"T (\d+)"}}
OTHERS = {"C": r" x (\d+)"}
OURS = {"pygpt cuda": "cuda", "pygpt triton": "triton"}
EAGER = (
    "eager",
    "SDPA flash",
    "SDPA cuDNN",
    "pygpt eager",
)  # what the reference is or calls; the fastest of them counts

Sizes = tuple[tuple[str, int], ...]


def bits(case: str) -> int:
    """Of the values of a row's case, 16 where it does not say."""
    return 32 if "float32" in case and "bfloat16" not in case else 16


def totals(rows: list[dict[str, Any]], bench_op: str) -> dict[Sizes, dict[str, float]]:
    """Milliseconds of all passes by sizes and backend; infinite for whom a pass is missing that another one ran."""
    passes: dict[Sizes, dict[str, dict[tuple[str, str], float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        op, _, run = row["op"].partition(" ")
        if op != bench_op or (run == "both" and op == "layer_norm") or row["who"] not in {*OURS, *EAGER}:
            continue
        found = {name: re.search(pattern, row["case"]) for name, pattern in SIZES.get(op, OTHERS).items()}
        sizes = tuple((name, int(match[1])) for name, match in found.items() if match)
        passes[sizes][row["who"]][row["case"], run] = row.get("ms", math.inf)
    points: dict[Sizes, dict[str, float]] = {}
    for sizes, by_who in passes.items():
        every = {run for times in by_who.values() for run in times}
        sums = {who: sum(times.get(run, math.inf) for run in every) for who, times in by_who.items()}
        point = {backend: sums.get(who, math.inf) for who, backend in OURS.items()}
        point["eager"] = min((sums[who] for who in EAGER if who in sums), default=math.inf)
        if min(point["cuda"], point["triton"]) < math.inf:
            points[sizes] = point
    return points


@dataclass
class Line:
    """A line to be: the least and the largest speed over eager of the points that it stands for."""

    backend: str
    up_to: Sizes
    least: float
    most: float


def joined(lines: Iterable[Line]) -> list[Line]:
    """Neighbours of one backend become one, with the bounds of the last."""
    found: list[Line] = []
    for line in lines:
        if found and found[-1].backend == line.backend:
            before = found.pop()
            line = Line(line.backend, line.up_to, min(before.least, line.least), max(before.most, line.most))
        found.append(line)
    return found


def lines(points: dict[Sizes, dict[str, float]]) -> list[Line]:
    """The lines for one op, in the order that choices.py looks at them; the last is for all sizes."""
    found: list[Line] = []
    for outer, group in itertools.groupby(sorted(points), key=lambda sizes: sizes[:1]):
        within = []
        for sizes in group:
            point = points[sizes]
            backend = min(OURS.values(), key=lambda name: point[name])
            ratio = point["eager"] / point[backend]
            within.append(Line(backend, sizes, ratio, ratio))
        within = joined(within)
        within[-1].up_to = outer
        # Only whole groups may be joined: a bound on T of the larger D would cut off the smaller one's.
        whole = found and len(within) == 1 and len(found[-1].up_to) == 1
        found = joined([*found, *within]) if whole else found + within
    if found:
        found[-1].up_to = ()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("result", type=Path)
    result = parser.parse_args().result
    content = json.loads(result.read_text())
    capability = ", ".join(content["versions"]["capability"].split("."))
    for bench_op, op in OPS.items():
        for width in (16, 32):
            rows = [row for row in content["rows"] if bits(row["case"]) == width]
            for line in lines(totals(rows, bench_op)):
                measured = f"{content['versions']['device']}, {line.least:.2f} to {line.most:.2f} times eager: {result}"
                choice = f"Choice({op!r}, ({capability}), {width}, {line.backend!r}, {measured!r}, {dict(line.up_to)}),"
                print(choice if line.least > 1 and line.most < math.inf else f"# {choice}")


if __name__ == "__main__":
    main()
