"""bench/gpu.py loses nothing that it measured: rows that crash, hang or raise are in the table, and so are those after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
