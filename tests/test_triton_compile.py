"""Every Triton kernel variant that the heuristics can choose, compiled for sm_80, sm_89 and sm_90 with no GPU.

The compiler's own figures are the evidence: no register spills, shared memory within the architecture's limit, and
tensor-core instructions where products are meant to run on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: the Triton kernels are not compiled")

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes a block may use


@pytest.fixture(scope="module", params=["layer_norm", "embedding"])
def cubins(request: pytest.FixtureRequest) -> list[dict]:
    program = Path(__file__).with_name("triton_cubins.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, program, request.param, *map(str, SHARED_LIMIT)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_no_spills_and_shared_memory_fits(cubins):
    assert {cubin["arch"] for cubin in cubins} == set(SHARED_LIMIT)
    for cubin in cubins:
        assert cubin["spills"] == 0, f"spills {cubin['spills']} bytes a thread: {cubin}"
        assert cubin["shared"] <= SHARED_LIMIT[cubin["arch"]], f"too much shared memory: {cubin}"


def test_products_run_on_tensor_cores(cubins):
    products = [cubin for cubin in cubins if cubin["kernel"].startswith("_attention")]
    for cubin in products:
        assert cubin["tensor_core"] > 0, f"no tensor-core instruction: {cubin}"
