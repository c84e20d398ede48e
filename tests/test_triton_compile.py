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

TUNED = {"D 64", "D 64 dropout", "D 128", "D 128 dropout", "D 64 documents", "D 96"}
SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes a block may use


OPS = ["layer_norm", "embedding", "attention", "cross_entropy and gelu"]


@pytest.fixture(
    scope="module", params=[(op, arch) for op in OPS for arch in SHARED_LIMIT], ids=lambda p: f"{p[0]} sm_{p[1]}"
)
def cubins(request: pytest.FixtureRequest) -> list[dict]:
    """What one op compiles to for one architecture, from a process in which Triton does not interpret."""
    op, arch = request.param
    program = Path(__file__).with_name("triton_cubins.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, program, op, str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    assert {cubin["arch"] for cubin in found} == {arch}
    return found


def test_no_spills_and_shared_memory_fits(cubins):
    for cubin in cubins:
        assert cubin["spills"] == 0, f"spills {cubin['spills']} bytes a thread: {cubin}"
        assert cubin["shared"] <= SHARED_LIMIT[cubin["arch"]], f"too much shared memory: {cubin}"


def test_attention_runs_on_tensor_cores(cubins):
    kernels = [c for c in cubins if c["kernel"].startswith("_attention")]
    assert len(kernels) in (0, len(cubins) - sum(c["kernel"] == "_combine_kernel" for c in cubins))
    for cubin in kernels:
        assert cubin["hmma"] + cubin["hgmma"] > 0, f"no tensor-core instruction: {cubin}"
        # Hopper's own instruction wherever tiles are large enough for it: 64 rows, 16-bit operands.
        if cubin["arch"] == 90 and "bfloat16" in cubin["constants"] and cubin["case"] in TUNED:
            assert cubin["hgmma"] > 0, f"not on the warpgroup tensor cores: {cubin}"
