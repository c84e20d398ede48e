"""GPT-2 124M on this machine: a training step of B4 T1024 and decoding at batch 1 and 8, with every peer and the peak memory.

    python bench/model.py                  # bfloat16; about 20 minutes on 2 cores, torch.compile included
    python bench/model.py --no-compile --batch-size 1

It is `pygpt bench --only training decode` with the settings that the project quotes. Writes model.json and model.md, stamped
with machine and commit, into bench/results/<machine>/.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tyro
from harness import results_folder

from pygpt.bench import BenchConfig, bench
from pygpt.bench.report import Row, by_case


@dataclass(frozen=True, kw_only=True)
class ModelBench:
    """Measure GPT-2's training step and decoding against their peers; see the top of this file."""

    preset: str = "gpt2"
    """Size of the model."""
    batch_size: int = 4
    """Sequences in a training step."""
    block_size: int = 1024
    """Tokens of a sequence in a training step."""
    decode_batches: tuple[int, ...] = (1, 8)
    """Rows that are generated at a time."""
    decode_tokens: int = 64
    """New tokens of each row."""
    dtypes: tuple[str, ...] = ("bfloat16",)
    """float32, bfloat16."""
    compile: bool = True
    """Whether torch.compile takes part."""
    rounds: int = 4
    """Timed steps of each contestant."""
    threads: int | None = None
    """Threads of each process; torch's own number by default."""
    out: Path = Path("runs/bench_model")
    """Folder for the chart."""


def main(options: ModelBench) -> None:
    rows = bench(BenchConfig(only=("training", "decode"), **asdict(options)))
    content = json.loads((options.out / "bench.json").read_text(encoding="utf-8"))
    content["machine"]["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    target = results_folder(Path(__file__).parent / "results")
    (target / "model.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (target / "model.md").write_text(markdown(rows, content["machine"]), encoding="utf-8")
    print(f"written: {target / 'model.md'}")


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    lines = ["# GPT-2 against its peers", "", " · ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += [
        "Medians; in brackets the fastest, which other work on the machine disturbs least. Everyone has a process",
        "",
    ]
    lines[-2] += " alone; peers once with the allocator as it comes and once tuned as pygpt tunes its own."
    for case in by_case(rows):
        first = next(iter(case.values()))
        lines += [f"## {first.op}: {first.case}, {first.dtype}", ""]
        lines += ["| who | seconds | tokens/s | peak MiB | pygpt is so many times as fast |", "|---|--:|--:|--:|--:|"]
        for row in case.values():
            if row.ms is None or row.best_ms is None or row.rate is None:
                lines.append(f"| {row.name} | {row.problem.replace('|', '/')} | | | |")
                continue
            memory = "" if row.peak_mib is None else f"{row.peak_mib:,.0f}"
            ratio = "" if row.speedup is None else f"{row.speedup:.2f} ({row.best_speedup:.2f})"
            seconds = f"{row.ms / 1e3:.3g} ({row.best_ms / 1e3:.3g})"
            lines.append(f"| {row.name} | {seconds} | {row.rate:.4g} | {memory} | {ratio} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(ModelBench, description=__doc__))
