"""Every Triton kernel variant that the heuristics can choose, compiled for sm_80 and sm_90 with no GPU, and for sm_100 and
sm_120 where attention has lines of its own for them. What is compiled for sm_80 stands for sm_86 and sm_89, which have its
instructions and less shared memory.

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
import torch

pytest.importorskip("triton", reason="triton is not installed: the Triton kernels are not compiled")

SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block may use
OPS = ["layer_norm", "embedding", "attention", "cross_entropy, gelu and adamw"]


@pytest.mark.parametrize(
    ("op", "arch"),
    [*((op, arch) for op in OPS for arch in (80, 90)), ("later attention", 100), ("later attention", 120)],
)
def test_every_configuration(op: str, arch: int):
    for cubin in compiled(op, arch):
        assert cubin["arch"] == arch
        assert cubin["spills"] == 0, f"spills {cubin['spills']} bytes a thread: {cubin}"
        assert cubin["shared"] <= SHARED_LIMIT[arch], f"too much shared memory: {cubin}"
        # On sm_100 the products are the instructions of another unit, where tiles are large enough for it.
        if cubin["kernel"].startswith("_attention") and arch != 100:
            assert cubin["mma"] + cubin["wgmma"] > 0, f"no tensor-core instruction: {cubin}"
            # Hopper's own instruction wherever tiles are large enough for it: 64 rows, 16-bit operands.
            if arch == 90 and "float32" not in cubin["operands"] and cubin["rows"] >= 64:
                assert cubin["wgmma"] > 0, f"not on the warpgroup tensor cores: {cubin}"


def compiled(op: str, arch: int) -> list[dict]:
    """What one op compiles to for one architecture, from a process in which Triton does not interpret."""
    program = Path(__file__).with_name("triton_cubins.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, program, op, str(arch)], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_what_holds_for_sm_80_holds_for_sm_86_and_sm_89():
    from pygpt.kernels import attention, attention_backward

    for row in (*attention.FORWARD, *attention_backward.GRAD_Q, *attention_backward.GRAD_KV):
        assert len({arch in row.arch for arch in (80, 86, 89)}) == 1, row


def test_every_line_of_the_attention_tables_is_taken_somewhere(monkeypatch: pytest.MonkeyPatch):
    from pygpt.kernels import attention, attention_backward, attention_tile, device

    for table in (attention.FORWARD, attention_backward.GRAD_Q, attention_backward.GRAD_KV):
        taken = set()
        for arch in (80, 90, 120):
            monkeypatch.setattr(device, "assumed_architecture", arch)
            for row in table:
                q = torch.empty(1, min(row.T, 1024), 1, row.D, dtype={16: torch.bfloat16, 32: torch.float32}[row.bits])
                taken |= {attention_tile.choose(table, q, dropout) for dropout in (False, True)}
        assert taken == {row.config for row in table}
