"""bench/gpu.py loses nothing that it measured: rows that crash, hang or raise are in the table, and so are those after."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from pygpt.ops import choices

# The script with rows of its own; its processes run this program again, as it runs itself.
PROGRAM = """
import os, sys, time
sys.path.insert(0, BENCH)
import gpu
def crash(): os.abort()
def hang(): time.sleep(1000)
def fail(): raise ValueError("a | b")
def gelu(bench):
    for call in (gpu_row, crash, gpu_row, hang, fail, gpu_row):
        bench.row("gelu forward", "a case", call.__name__, lambda call=call: call, "GB/s", 1.0)
def adamw(bench):
    bench.row("adamw", "a case", "last", lambda: gpu_row, "GB/s", 1.0)
    raise RuntimeError("after its only row")
def gpu_row(): pass
gpu.__file__, gpu.ROW_SECONDS, gpu.SECTIONS = __file__, 5, (gpu.copy, gelu, adamw)
gpu.main()
"""


def test_a_table_of_rows_that_crash_hang_and_raise(tmp_path: Path):
    bench = Path(__file__).parents[1] / "bench"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("BENCH", repr(str(bench))))
    run = subprocess.run([sys.executable, program, "--smoke"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "bench/gpu.py: failed: adamw" in run.stderr
    table = [line.strip("|").split("|") for line in run.stdout.splitlines() if line.startswith("| a case")]
    lost = "the process crashed here, or hung for 5 s"
    found = [(cells[1].strip(), cells[3].strip()) for cells in table]
    assert [who for who, _ in found] == ["gpu_row", "crash", "gpu_row", "hang", "fail", "gpu_row", "last"]
    assert [figure for _, figure in found] == [
        "nan GB/s", lost, "nan GB/s", lost, "ValueError: a / b", "nan GB/s", "nan GB/s",
    ]  # fmt: skip


def test_lines_of_choices_from_a_result(tmp_path: Path):
    """bench/choices.py's lines, read as choices.py reads them, name the fastest of our columns at every measured size."""
    cuda_is_faster = {(64, 512), (64, 16384), (128, 1024), (128, 16384)}
    rows = []
    for D in (128, 64):
        for T in (1024, 512, 16384):
            fast, slow = ("cuda", "triton") if (D, T) in cuda_is_faster else ("triton", "cuda")
            for run in ("forward", "backward"):
                for who, ms in ((f"pygpt {fast}", 1.0), (f"pygpt {slow}", 2.0), ("SDPA flash", 1.5), ("eager", 9.0)):
                    rows.append({"op": f"attention {run}", "case": f"D {D}, T {T}", "who": who, "ms": ms})
    for who, forward, backward in (("pygpt cuda", 1.0, 4.0), ("pygpt triton", 3.0, 1.0), ("eager", 2.0, 1.0)):
        for run, ms in (("forward", forward), ("backward", backward), ("both", 0.0)):
            rows.append({"op": f"layer_norm {run}", "case": "8 x 768 bfloat16", "who": who, "ms": ms})
    for who, case, ms in (
        ("pygpt cuda", "124M bfloat16 with float32 masters", 2.0),  # the same op in two dtypes: a line each
        ("pygpt eager", "124M bfloat16 with float32 masters", 3.0),
        ("pygpt cuda", "124M float32", 4.0),
        ("pygpt eager", "124M float32", 5.0),
    ):
        rows.append({"op": "adamw", "case": case, "who": who, "ms": ms})
    for who, run in (
        ("pygpt cuda", "forward"),
        ("pygpt triton", "forward"),
        ("pygpt triton", "backward"),
        ("eager", "forward"),
    ):
        rows.append({"op": f"embedding {run}", "case": "8 tokens x 768 uniform bfloat16", "who": who, "ms": 1.0})
    rows.append(
        {"op": "embedding backward", "case": "8 tokens x 768 uniform bfloat16", "who": "eager", "problem": "no time"}
    )
    rows.append({"op": "bias_gelu forward", "case": "8 x 768 bfloat16", "who": "pygpt cuda", "problem": "crashed"})
    result = tmp_path / "gpu.json"
    result.write_text(json.dumps({"versions": {"device": "A card", "capability": "9.0"}, "rows": rows}))
    program = Path(__file__).parents[1] / "bench" / "choices.py"
    run = subprocess.run([sys.executable, program, result], capture_output=True, text=True, check=True)
    found = run.stdout.splitlines()
    read = [eval(line.removeprefix("# "), {"Choice": choices.Choice})[0] for line in found]
    attention = [line for line in read if line.op == "causal_attention"]
    assert attention[-1].up_to == {}
    assert attention[0].capability == (9, 0)
    assert attention[0].measured.startswith("A card, 1.50 to 1.50 times eager: ")
    for D in (64, 128):
        for T in (512, 1024, 16384):
            first = next(line for line in attention if line.up_to.get("D", D) >= D and line.up_to.get("T", T) >= T)
            assert first.backend == ("cuda" if (D, T) in cuda_is_faster else "triton"), (D, T)
    adamw = [(line.bits, line.measured[:22]) for line in read if line.op == "adamw"]
    assert adamw == [(16, "A card, 1.50 to 1.50 t"), (32, "A card, 1.25 to 1.25 t")]
    # One of ours lacks a pass, and so does eager: no comparison.
    (embedding,) = [line for line in found if "'embedding'" in line]
    assert embedding.startswith("# Choice('embedding', (9, 0), 16, 'triton', 'A card, inf ")
    # No faster than eager: for a person to decide. Nothing for what did not run.
    (layer_norm,) = [line for line in found if "'layer_norm'" in line]
    assert layer_norm.startswith("# Choice('layer_norm', (9, 0), 16, 'triton', 'A card, 0.75 ")
    assert not [line for line in found if "gelu" in line]
