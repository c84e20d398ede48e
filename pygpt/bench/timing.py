"""What every bench shares: the clock, whether two results agree, and what the figures depend on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pygpt
from pygpt.ops import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest difference from the peer, of the largest value. Tests hold the ops to far less, against float64; but torch sums
# LayerNorm's bfloat16 weight gradients in bfloat16, which is 9% off over 4,096 rows (ours: 0.3%).
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.2}


def seconds(function: Callable[[], Any], calls: int = 1) -> float:
    """Wall time of `calls` calls, work on a GPU included."""
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def disagreement(ours: Any, peer: Any, dtype: torch.dtype) -> str:
    """What is wrong with our results, a tensor or some, compared with the peer's; "" where nothing is. A benchmark of wrong
    results measures nothing."""
    ours, peer = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, peer))
    for a, b in zip(ours, peer, strict=True):
        if a.shape != b.shape:
            return f"results differ in shape: {tuple(a.shape)} and {tuple(b.shape)}"
        error, largest = (a.double() - b.double()).abs().max(), b.double().abs().max()
        if not error <= AGREE[dtype] * largest:  # so that NaN disagrees
            return f"results differ by {error:.3g} where values reach {largest:.3g}"
    return ""


def commit() -> str:
    """The commit of pygpt's working tree, with + where it holds changes; "unknown" outside a repository of its own."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "unknown"
    run = {"cwd": root, "capture_output": True, "text": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run)  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run)  # type: ignore[call-overload]
    except FileNotFoundError:  # no git
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else "unknown"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    about: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": backends.cpu_capability() if backends.extension else "no compiled extension",
        "torch": torch.__version__,
        "pygpt": pygpt.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    if hasattr(os, "getloadavg"):  # not on Windows
        about["load"] = round(os.getloadavg()[0], 1)
    return about
