"""Checkpoints: a model folder that also holds what training needs to go on, bit for bit.

    RUN/checkpoints/step_00001000/
        config.json, model.safetensors     the model, as `GPT.save_pretrained` writes it
        pygpt_tokenizer.json               what its token ids mean
        training.safetensors               optimizer state and states of the random generators
        training.json                      step and settings

A checkpoint is written under a temporary name, flushed to disk and renamed: under its final name it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer

NAME = re.compile(r"step_(\d{8})")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step_*") if NAME.fullmatch(p.name) and p.is_dir())


def resolve_checkpoint(path: str | Path) -> Path:
    """The model folder that a user means: the folder itself, or a run's latest checkpoint."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    found = checkpoints(folder)
    if found:
        return found[-1]
    if not folder.exists():
        raise MissingFileError(f"no run or model at '{path}'")
    raise MissingFileError(f"'{path}' holds neither a model (config.json) nor a checkpoint (checkpoints/step_*)")


def save_checkpoint(
    run: Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer | None,
    settings: dict[str, Any],
    keep: int,
) -> Path:
    """Write the state after `step` steps, then delete all but the newest `keep` checkpoints."""
    final = run / "checkpoints" / f"step_{step:08d}"
    temporary = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    if tokenizer is not None:
        tokenizer.save(temporary)
    save_file(_tensors(model, optimizer), temporary / "training.safetensors")
    (temporary / "training.json").write_text(json.dumps({"step": step, "settings": settings}, indent=2) + "\n")
    for file in [*temporary.iterdir(), temporary]:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if final.exists():  # the same step again, after a resume at it
        shutil.rmtree(final)
    os.replace(temporary, final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Put optimizer and random generators back as they were; returns the number of steps done. The model's weights are
    those of `GPT.from_pretrained(folder)`, which the caller has loaded."""
    state = _read(folder)
    for name, p in model.named_parameters():
        prefix = f"optimizer/{name}/"
        values = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        if values:
            optimizer.state[p] = {key: value.to(p.device) for key, value in values.items()}
        elif p.requires_grad:
            raise InputError(
                f"'{folder}': training.safetensors has no state for {name}; the run cannot be resumed from it"
            )
    torch.set_rng_state(state.pop("rng/cpu"))
    if "rng/cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.pop("rng/cuda"))
    return read_training(folder)["step"]


def read_training(folder: Path) -> dict[str, Any]:
    """training.json of a checkpoint."""
    file = folder / "training.json"
    if not file.is_file():
        raise MissingFileError(
            f"'{folder}' is a model, not a checkpoint of a run (no training.json); it cannot be resumed"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"'{file}' is damaged ({error})") from error


def _read(folder: Path) -> dict[str, Tensor]:
    file = folder / "training.safetensors"
    if not file.is_file():
        raise MissingFileError(f"'{folder}' has no training.safetensors; the run cannot be resumed from it")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(
            f"'{file}' cannot be read ({error}); delete this checkpoint and resume from the one before"
        ) from error


def _tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.contiguous()
    return tensors
