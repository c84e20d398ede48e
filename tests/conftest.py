from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Test processes side by side have more threads than the machine has cores: a thread that spins
# while it waits for another keeps that one from running, and operators of microseconds take a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be asked for before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from pygpt.ops import backends

# The same examples in every run: whether a change passes must not depend on chance. `--hypothesis-profile=search` looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=1000, deadline=None)
settings.load_profile("repeatable")

LEVELS = backends.extension.available_cpu_capabilities() if backends.extension else ["not built"]


@pytest.fixture(params=LEVELS)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per CPU instruction set of this machine, with the compiled kernels forced."""
    if backends.extension is None:
        pytest.skip("pygpt._C is not built: there are no compiled CPU kernels to test")
    backends.extension.set_cpu_capability(request.param)
    with backends.use_backend("cpp"):
        yield request.param
    backends.extension.set_cpu_capability("")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of texts that are used by some tests and are not part of the project."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the text files that this test reads (tiny_shakespeare.txt, ...) are not on this machine")
    return folder
