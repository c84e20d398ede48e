"""Checkpoints: a model folder that also holds what training needs to go on, bit for bit.

    RUN/checkpoints/step_00001000/
        config.json, model.safetensors     the model, as `GPT.save_pretrained` writes it
        pygpt_tokenizer.json               what its token ids mean
        training.safetensors               optimizer state, states of the random generators, and for a model with LoRA
                                           adapters its weights before merging
        training.json                      step and settings

A checkpoint is written under a temporary name, flushed to disk and renamed: under its final name it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pygpt.classifier import Classifier
from pygpt.errors import InputError, MissingFileError, PygptError
from pygpt.model import GPT
from pygpt.pretrained import checkpoint_tokenizer, checkpoints
from pygpt.pretrained import resolve_checkpoint as resolve_checkpoint  # exported: it belongs here as well
from pygpt.tokenizer import Tokenizer
from pygpt.train.lora import has_lora, merged

TEMPORARY, OLD = ".tmp-", ".old-"
TRAINING_FILE = "training.safetensors"


class NotWrittenError(PygptError):
    """A checkpoint could not be written."""


class Saved(Protocol):
    """What is saved beside a model: a tokenizer, a template."""

    def save(self, folder: Path) -> Path: ...


def check_vocabulary(folder: Path, vocab_size: int, data_tokenizer: Tokenizer | None, data_vocab_size: int) -> None:
    """Raise InputError unless token ids mean the same to the model in `folder` as in the data."""
    ours = checkpoint_tokenizer(folder, vocab_size)
    if vocab_size < data_vocab_size or (ours and data_tokenizer and ours.to_dict() != data_tokenizer.to_dict()):
        if ours and data_tokenizer and (ours.name, vocab_size) == (data_tokenizer.name, data_vocab_size):
            raise InputError(
                f"the data has another vocabulary than the model in '{folder}': as many tokens ({vocab_size}), but other "
                f"characters; prepare the text with the model's tokenizer, or train a new model"
            )
        names = [f"'{tokenizer.name}', " if tokenizer else "" for tokenizer in (data_tokenizer, ours)]
        raise InputError(
            f"the data has another vocabulary ({names[0]}{data_vocab_size} tokens) than the model in '{folder}' "
            f"({names[1]}{vocab_size} tokens): prepare the text with the model's tokenizer, or train a new model"
        )


def save_checkpoint(
    run: Path,
    step: int,
    model: GPT | Classifier,
    optimizer: torch.optim.Optimizer,
    beside: Sequence[Saved],
    settings: dict[str, Any],
    keep: int,
) -> Path:
    """Write the state after `step` steps, then delete all but the newest `keep` checkpoints. beside: what else belongs to
    the model."""
    final = run / "checkpoints" / f"step_{step:08d}"
    with _written_as(final) as folder:
        _save_model(folder, model, beside)
        save_file(_tensors(model, optimizer), folder / TRAINING_FILE)
        training = {"step": step, "settings": settings}
        (folder / "training.json").write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    for old in checkpoints(run)[:-keep]:
        _remove(old)
    return final


def save_best(run: Path, model: GPT | Classifier, beside: Sequence[Saved]) -> Path:
    """Write the model alone to RUN/checkpoints/best: the one with the lowest validation loss so far."""
    final = run / "checkpoints" / "best"
    with _written_as(final) as folder:
        _save_model(folder, model, beside)
    return final


def remove_leftovers(run: Path) -> None:
    """Delete what a crash left half written; bring back what it had only moved out of the way."""
    for folder in (run / "checkpoints").glob(".*"):
        if folder.name.startswith(OLD) and not (original := folder.with_name(folder.name.removeprefix(OLD))).exists():
            os.replace(folder, original)
        elif folder.name.startswith((OLD, TEMPORARY)):
            shutil.rmtree(folder)


def _save_model(folder: Path, model: GPT | Classifier, beside: Sequence[Saved]) -> None:
    with merged(model):
        model.save_pretrained(folder)
    for part in beside:
        part.save(folder)


@contextmanager
def _written_as(final: Path) -> Iterator[Path]:
    """A temporary folder which, once written and flushed to disk, takes the place of `final`. Raises NotWrittenError, with
    the temporary folder removed, where the disk is full or cannot be written to."""
    temporary, old = final.with_name(TEMPORARY + final.name), final.with_name(OLD + final.name)
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if final.exists():  # a folder cannot be renamed onto another one
            os.replace(final, old)
        os.replace(temporary, final)
        _flush(final.parent)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotWrittenError(
            f"'{final}' could not be written ({error}); {last_checkpoint(final.parent.parent)}"
        ) from error


def last_checkpoint(run: Path) -> str:
    """Where a run that failed can be resumed from, for its message."""
    saved = checkpoints(run)
    return f"the last good checkpoint is '{saved[-1]}'" if saved else "no checkpoint was written yet"


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a folder that is half deleted must not pass for a checkpoint."""
    doomed = checkpoint.with_name(TEMPORARY + checkpoint.name)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def load_checkpoint(folder: Path, model: GPT | Classifier, optimizer: torch.optim.Optimizer) -> int:
    """Put optimizer and random generators back as they were; returns the number of steps done. The model's weights are
    those of `GPT.from_pretrained(folder)`, which the caller has loaded. If there are LoRA adapters on it, so are they
    and the weights under them."""
    state = _read(folder)
    if has_lora(model):
        _load_unmerged(folder, model, state)
    for name, p in model.named_parameters():
        prefix = f"optimizer/{name}/"
        values = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        if values:
            if not _fits(values, p):
                raise _damaged(folder, f"its state for {name} does not fit")
            optimizer.state[p] = {key: value.to(p.device) for key, value in values.items()}
        elif p.requires_grad:
            raise InputError(f"'{folder}': {TRAINING_FILE} has no state for {name}; the run cannot be resumed from it")
    try:
        torch.set_rng_state(state.pop("rng/cpu"))
        if "rng/cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state.pop("rng/cuda"))
    except (KeyError, TypeError, RuntimeError) as error:
        raise _damaged(folder, f"its random generator's state cannot be used, {error}") from error
    return read_training(folder)["step"]


def _fits(values: dict[str, Tensor], parameter: Tensor) -> bool:
    """Whether an optimizer's state is one of this parameter."""
    return values.keys() >= {"step", "exp_avg", "exp_avg_sq"} and all(
        value.shape == (() if key == "step" else parameter.shape)
        and value.dtype == (torch.int16 if key == "residual" else torch.float32)
        for key, value in values.items()
    )


def _load_unmerged(folder: Path, model: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """The weights of a model with adapters, whose model folder holds them merged: that addition cannot be undone exactly."""
    for name, p in model.named_parameters():
        saved = state.pop(f"model/{name}", None)
        if saved is None or saved.shape != p.shape:
            raise InputError(
                f"'{folder}' was not written with the LoRA adapters that the model has: use the same settings"
            )
        p.data.copy_(saved)


def read_training(folder: Path) -> dict[str, Any]:
    """training.json of a checkpoint."""
    file = folder / "training.json"
    if not file.is_file():
        raise MissingFileError(
            f"'{folder}' is a model, not a checkpoint of a run (no training.json); it cannot be resumed"
        )
    try:
        training = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{file}' is damaged ({error})") from error
    known = isinstance(training, dict) and isinstance(training.get("settings"), dict)
    if not known or not isinstance(training.get("step"), int):
        raise InputError(f"'{file}' is damaged: it lacks the step or the settings of the run")
    return training


def _read(folder: Path) -> dict[str, Tensor]:
    file = folder / TRAINING_FILE
    if not file.is_file():
        raise MissingFileError(f"'{folder}' has no {TRAINING_FILE}; the run cannot be resumed from it")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        f"'{folder / TRAINING_FILE}' is damaged ({reason}); delete this checkpoint and resume from the one before"
    )


def _tensors(model: GPT | Classifier, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    if has_lora(model):  # what the model folder holds is merged
        tensors |= {f"model/{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.contiguous()
    return tensors
