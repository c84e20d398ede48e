"""nvcc compiles every kernel with warnings as errors; none spills registers, and attention runs on tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90)
TENSOR_CORE_KERNELS = {"attention": 8, "attention_backward": 16}  # file -> its kernels that must use them
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the CUDA kernels cannot be compiled"),
    pytest.mark.timeout(600),
]


def disassembler() -> str | None:
    """cuobjdump from the CUDA toolkit, or the one in the triton package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, and no triton package that carries one")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


@pytest.mark.parametrize("name", [source.stem for source in KERNELS])
def test_no_warnings_no_spills_and_attention_on_tensor_cores(name: str, tmp_path: Path):
    out = tmp_path / f"{name}.o"
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    source = CSRC / "cuda" / f"{name}.cu"
    run = subprocess.run(["nvcc", *FLAGS, *targets, "-c", source, "-o", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    check_spills(run.stderr)
    if name in TENSOR_CORE_KERNELS:
        check_tensor_cores(out, TENSOR_CORE_KERNELS[name])


def check_spills(report: str) -> None:
    """In what ptxas printed."""
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
        re.S,
    )
    assert {arch for _, arch, _, _ in kernels} == {f"sm_{n}" for n in ARCHITECTURES}
    spilled = [
        f"{kernel} ({arch}): {out} stored, {back} loaded" for kernel, arch, out, back in kernels if out + back != "00"
    ]
    assert not spilled, "\n".join(spilled)


def check_tensor_cores(compiled: Path, count: int) -> None:
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump to look at the machine code with")
    sass = subprocess.run([tool, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\n\s*Function : ", sass)[1:]
    wanted = [f for f in functions if re.match(r"\S*(forward|grad_keys|grad_queries)I", f)]
    assert len(wanted) == count * len(ARCHITECTURES)
    for function in wanted:
        title = function.splitlines()[0]
        assert re.search(r"\bHMMA\.16816\.F32", function), f"{title}: no tensor-core instruction"
        assert "LDGSTS" in function, f"{title}: no asynchronous copy to shared memory"
        assert "LDSM" in function, f"{title}: no ldmatrix"
