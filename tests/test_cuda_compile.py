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
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the CUDA kernels cannot be compiled"),
    pytest.mark.timeout(600),
]


# One kernel with more live values than the registers it is allowed, and no instruction of tensor cores.
PLANTED = """
__global__ void __launch_bounds__(1024, 2) crowded(const float* in, float* out) {
  float x[64];
  for (int i = 0; i < 64; ++i) x[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = x[i] * x[63 - i] + x[(i + 31) % 64];
}
"""


def compile_(source: Path, out: Path) -> str:
    """Compiles for every architecture; returns ptxas' report."""
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    run = subprocess.run(["nvcc", *FLAGS, *targets, "-c", source, "-o", out], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Object file and ptxas' report of each kernel file, by name."""
    folder = tmp_path_factory.mktemp("cuda")
    return {source.stem: (out := folder / f"{source.stem}.o", compile_(source, out)) for source in KERNELS}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same of a kernel with both faults."""
    source = tmp_path_factory.mktemp("planted") / "planted.cu"
    source.write_text(PLANTED)
    return source.with_suffix(".o"), compile_(source, source.with_suffix(".o"))


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


def spilled(report: str) -> list[str]:
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
        re.S,
    )
    assert {arch for _, arch, _, _ in kernels} == {f"sm_{n}" for n in ARCHITECTURES}
    return [
        f"{kernel} ({arch}): {out} stored, {back} loaded" for kernel, arch, out, back in kernels if out + back != "00"
    ]


def lacking(function: str) -> list[str]:
    """What an attention kernel needs and this one has not."""
    needed = {
        "tensor-core instruction": r"\bHMMA\.16816\.F32",
        "asynchronous copy to shared memory": "LDGSTS",
        "ldmatrix": "LDSM",
    }
    return [what for what, pattern in needed.items() if not re.search(pattern, function)]


@pytest.mark.parametrize("name", [source.stem for source in KERNELS])
def test_no_kernel_spills(compiled: dict[str, tuple[Path, str]], name: str):
    spills = spilled(compiled[name][1])
    assert not spills, "\n".join(spills)


def test_a_planted_spill_is_found(planted: tuple[Path, str]):
    found = "\n".join(spilled(planted[1]))
    for n in ARCHITECTURES:
        assert re.search(rf"crowded\w* \(sm_{n}\): [1-9]\d* stored, [1-9]\d* loaded", found), found


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_attention_uses_tensor_cores(compiled: dict[str, tuple[Path, str]], name: str):
    functions = [f for f in disassemble(compiled[name][0]) if re.match(r"\S*(forward|grad_keys|grad_queries)I", f)]
    assert len(functions) == (8 if name == "attention" else 16) * len(ARCHITECTURES)
    for function in functions:
        assert not lacking(function), f"{function.splitlines()[0]}: no {', no '.join(lacking(function))}"


def test_a_kernel_without_tensor_cores_is_found(planted: tuple[Path, str]):
    functions = disassemble(planted[0])
    assert len(functions) == len(ARCHITECTURES)
    assert all(len(lacking(function)) == 3 for function in functions)
