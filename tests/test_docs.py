"""The examples in README and docs run, and do what they are there to show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from pygpt import ops
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
