"""nvcc compiles every kernel with warnings as errors; none spills registers, and attention runs on tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = sorted(source.stem for source in (CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")  # 86 and 89 have the instructions of 80, 120 those of 100 that these kernels use
HOPPER = ("attention_hopper", "attention_hopper_backward")  # in instructions that no other architecture has
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]

TENSOR_CORES = {
    "tensor-core instruction": r"\bHMMA\.16816\.F32",
    "asynchronous copy to shared memory": "LDGSTS",
    "ldmatrix": "LDSM",
}
TENSOR_CORES_OF_HOPPER = {
    "product of a warpgroup": r"\bHGMMA\.64x(64|128)x16\.F32",
    "tensor copy": r"UTMALDG\.4D",
    "registers given and taken": "USETMAXREG",
}
# File -> how many of its kernels must have which instructions.
NEEDED = {
    "attention": (8, TENSOR_CORES),
    "attention_backward": (16, TENSOR_CORES),
    "attention_hopper": (8, TENSOR_CORES_OF_HOPPER),
    "attention_hopper_backward": (16, TENSOR_CORES_OF_HOPPER),
}

# One kernel with more live values than the registers it is allowed, and no instruction of tensor cores.
PLANTED = """
__global__ void __launch_bounds__(768, 2) crowded(const float* in, float* out) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = x[i] * x[63 - i] + x[(i + 31) % 64];
}
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the CUDA kernels cannot be compiled"),
    pytest.mark.timeout(600),
]


def architectures(name: str) -> tuple[str, ...]:
    return ("90a",) if name in HOPPER else ARCHITECTURES


@pytest.mark.parametrize("name", KERNELS)
def test_no_warnings_no_spills_and_attention_on_tensor_cores(name: str, tmp_path: Path):
    out = tmp_path / f"{name}.o"
    report = compile_(CSRC / "cuda" / f"{name}.cu", out, architectures(name))
    spills = spilled(report, architectures(name))
    assert not spills, "\n".join(spills)
    # Registers that are not given and taken, products that wait for each other: ptxas says so, as information only.
    assert "Potential Performance Loss" not in report, report
    if name in NEEDED:
        count, needed = NEEDED[name]
        functions = [f for f in disassemble(out) if re.match(r"\S*(forward|grad_keys|grad_queries)I", f)]
        assert len(functions) == count * len(architectures(name))
        for function in functions:
            missing = lacking(function, needed)
            assert not missing, f"{function.splitlines()[0]}: no {', no '.join(missing)}"


def test_planted_faults_are_found(tmp_path: Path):
    source, out = tmp_path / "planted.cu", tmp_path / "planted.o"
    source.write_text(PLANTED)
    found = "\n".join(spilled(compile_(source, out, ARCHITECTURES), ARCHITECTURES))
    for n in ARCHITECTURES:
        assert re.search(rf"crowded\w* \(sm_{n}\): [1-9]\d* stored, [1-9]\d* loaded", found), found
    functions = disassemble(out)
    assert len(functions) == len(ARCHITECTURES)
    for needed in (TENSOR_CORES, TENSOR_CORES_OF_HOPPER):
        assert all(lacking(function, needed) == list(needed) for function in functions)


def compile_(source: Path, out: Path, targets: tuple[str, ...]) -> str:
    """Returns ptxas' report."""
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in targets]
    run = subprocess.run(["nvcc", *FLAGS, *codes, "-c", source, "-o", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stderr


def spilled(report: str, targets: tuple[str, ...]) -> list[str]:
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
        re.S,
    )
    assert {arch for _, arch, _, _ in kernels} == {f"sm_{n}" for n in targets}
    return [
        f"{kernel} ({arch}): {out} stored, {back} loaded" for kernel, arch, out, back in kernels if out + back != "00"
    ]


def disassemble(path: Path) -> list[str]:
    """Machine code of an object file: a text for each function and architecture, which begins with its name."""
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump to look at the machine code with")
    sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    return re.split(r"\n\s*Function : ", sass)[1:]


def disassembler() -> str | None:
    """cuobjdump from the CUDA toolkit, or the one in the triton package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, and no triton package that carries one")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def lacking(function: str, needed: dict[str, str]) -> list[str]:
    """What an attention kernel needs and this one has not."""
    return [what for what, pattern in needed.items() if not re.search(pattern, function)]
