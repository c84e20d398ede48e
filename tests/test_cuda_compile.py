"""nvcc compiles every kernel with warnings as errors; none spills registers, and attention runs on tensor cores."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
HOPPER = ("attention_hopper",)  # in instructions that no other architecture has
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the CUDA kernels cannot be compiled"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Object file and ptxas' report of each kernel file, by name."""
    folder = tmp_path_factory.mktemp("cuda")
    results = {}
    for source in KERNELS:
        targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in architectures(source.stem)]
        out = folder / f"{source.stem}.o"
        run = subprocess.run(["nvcc", *FLAGS, *targets, "-c", source, "-o", out], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-4000:]
        results[source.stem] = out, run.stderr
    return results


def architectures(name: str) -> tuple[str, ...]:
    return ("90a",) if name in HOPPER else ARCHITECTURES


def disassembler() -> str | None:
    """cuobjdump from the CUDA toolkit, or the one in the triton package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, and no triton package that carries one")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


@pytest.mark.parametrize("name", [source.stem for source in KERNELS])
def test_no_kernel_spills(compiled: dict[str, tuple[Path, str]], name: str):
    _, report = compiled[name]
    kernels = re.findall(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
        re.S,
    )
    assert {arch for _, arch, _, _ in kernels} == {f"sm_{n}" for n in architectures(name)}
    spilled = [
        f"{kernel} ({arch}): {out} stored, {back} loaded" for kernel, arch, out, back in kernels if out + back != "00"
    ]
    assert not spilled, "\n".join(spilled)


def test_attention_uses_tensor_cores(compiled: dict[str, tuple[Path, str]]):
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump to look at the machine code with")
    for name in ("attention", "attention_backward"):
        sass = subprocess.run([tool, "-sass", compiled[name][0]], capture_output=True, text=True, check=True).stdout
        functions = re.split(r"\n\s*Function : ", sass)[1:]
        wanted = [f for f in functions if re.match(r"\S*(forward|grad_keys|grad_queries)I", f)]
        assert len(wanted) == (8 if name == "attention" else 16) * len(ARCHITECTURES)
        for function in wanted:
            title = function.splitlines()[0]
            assert re.search(r"\bHMMA\.16816\.F32", function), f"{title}: no tensor-core instruction"
            assert "LDGSTS" in function, f"{title}: no asynchronous copy to shared memory"
            assert "LDSM" in function, f"{title}: no ldmatrix"


def test_hopper_attention_uses_hopper(compiled: dict[str, tuple[Path, str]]):
    path, report = compiled["attention_hopper"]
    # Registers that are not given and taken, products that wait for each other: ptxas says so, as information only.
    assert "Potential Performance Loss" not in report, report
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump to look at the machine code with")
    sass = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    functions = [f for f in re.split(r"\n\s*Function : ", sass)[1:] if re.match(r"\S*forwardI", f)]
    assert len(functions) == 8
    for function in functions:
        title = function.splitlines()[0]
        assert re.search(r"\bHGMMA\.64x128x16\.F32", function), f"{title}: no product of a warpgroup"
        assert not re.search(r"\bHMMA", function), f"{title}: a product of a single warp"
        assert "UTMALDG.4D" in function, f"{title}: no tensor copy"
        assert "USETMAXREG" in function, f"{title}: registers stay where they are"
