"""The examples in README and docs run, and do what they are there to show."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import pygpt
from pygpt import ops
from pygpt.cli import COMMANDS
from pygpt.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def run_example(file: str) -> dict[str, Any]:
    """Run the first Python block of a file; returns its variables."""
    (code, *_) = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, file, "exec"), names)
    return names


def test_readme(capsys):
    torch.manual_seed(0)
    run_example("README.md")
    assert capsys.readouterr().out.startswith("The quick brown fox jumps over the lazy dog.")


def test_the_books_data_loader():
    names = run_example("docs/book.md")
    ids, inputs, targets = (names[name] for name in ("ids", "inputs", "targets"))
    assert ids.count(get_tokenizer("gpt2").eot_id) == 8
    assert inputs.shape == targets.shape == (names["batch_size"], names["max_length"])
    windows = [ids[i : i + 5] for i in range(0, len(ids) - 4, names["stride"])]
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [*x, y[-1]] in windows
        assert x[1:] == y[:-1]
    fused = ops.embedding(inputs, names["token_embedding"].weight, names["position_embedding"].weight)
    torch.testing.assert_close(fused, names["x"])


@pytest.mark.parametrize("file", ["README.md", "docs/book.md"])
def test_commands_and_their_flags_exist(file):
    found = re.findall(r"\bpygpt (finetune \w+|[a-z]+)([^`\n]*)", (ROOT / file).read_text(encoding="utf-8"))
    found = [(command, rest) for command, rest in found if command.split()[0] in " ".join(COMMANDS).split()]
    assert len(found) > 5
    for command, rest in found:
        flags = {"--" + field.name.replace("_", "-") for field in fields(COMMANDS[command])} | {"--help"}
        assert set(re.findall(r"--[a-z-]+", rest.split("#")[0])) <= flags, f"pygpt {command}{rest}"


def test_the_books_names_exist():
    """Each file and each name with a dot that the table names, and the classes and functions that it calls."""
    table = [line for line in (ROOT / "docs/book.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    quoted = re.findall(r"`([^`]+)`", "\n".join(table))
    files = [name for name in quoted if name.endswith(".py")]
    names = [match[1] for name in quoted if (match := re.match(r"((?:pygpt|ops|GPT)(?:\.\w+)+)", name))]
    assert len(files) > 2
    assert len(names) > 10
    for file in files:
        assert (ROOT / file).is_file(), file
    for name in names:
        first, *rest = name.split(".")
        value = {"pygpt": pygpt, "ops": ops, "GPT": pygpt.GPT}[first]
        for part in rest:
            value = getattr(value, part)
