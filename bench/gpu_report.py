"""What bench/gpu.py's figures come back as: the rows that its processes wrote down, a JSON file and a table."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import pygpt


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "pygpt": pygpt.__version__}
    packages = importlib.metadata.packages_distributions()  # Triton comes under several names
    for module in ("triton", "transformers", "liger_kernel", "flash_attn"):
        if module in packages:
            found[module] = importlib.metadata.version(packages[module][0])
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["cuda"], found["capability"] = (
            str(torch.version.cuda),
            "{}.{}".format(*torch.cuda.get_device_capability()),
        )
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver, clock, power"] = "nvidia-smi is not there"
        if shutil.which(query[0]):
            answer = subprocess.run(query, capture_output=True, text=True)
            found["driver, clock, power"] = answer.stdout.strip().split("\n")[0] or "nvidia-smi did not answer"
    return found


def markdown(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    lines = ["# GPU figures", "", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [f"## {op}", "", "| case | who | ms | figure | of copy | peak MiB |", "|---|---|---|---|---|---|"]
        for row in (row for row in rows if row["op"] == op):
            if "problem" in row:
                lines.append(f"| {row['case']} | {row['who']} | | {row['problem'].replace('|', '/')} | | |")
                continue
            share = f"{row['of copy']:.0%}" if "of copy" in row else ""
            memory = f"{row['peak MiB']:.0f}" if "peak MiB" in row else ""
            figure = f"{row['value']:.0f} {row['unit']}"
            lines.append(f"| {row['case']} | {row['who']} | {row['ms']:.3f} | {figure} | {share} | {memory} |")
        lines.append("")
    return "\n".join(lines)


def read(file: Path) -> tuple[list[dict[str, Any]], list[str] | None]:
    """The rows so far, and once all is measured the names of the sections that failed."""
    rows: dict[int, dict[str, Any]] = {}
    failed = None
    for line in file.read_text().rpartition("\n")[0].splitlines():  # the last line may be half written
        entry = json.loads(line)
        if "failed" in entry:
            failed = entry["failed"]
        else:
            rows[entry.pop("index")] = entry
    return list(rows.values()), failed


def write(rows: list[dict[str, Any]], about: dict[str, str], out: Path) -> None:
    folder = out / about["device"].replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps({"versions": about, "rows": rows}, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(rows, about))
