"""Builds the emulated device and the CUDA kernels on it with g++, three ways: plain, with ASan + UBSan, with TSan.

Objects go to build/cuda_emulation and are rebuilt by ninja when a source changes. By hand:
python tests/cuda_emulation/build.py [TARGET ...]
"""

from __future__ import annotations

import fcntl
import functools
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "cuda_emulation"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
OPERATORS = ["attention", "embedding", "layer_norm"]  # csrc/cuda/NAME.cpp is the host side

FLAGS = "-std=c++20 -fPIC -fno-strict-aliasing -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas"
SANITIZERS = {
    "plain": "-O2",
    "asan": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all",
    "tsan": "-O1 -g -fsanitize=thread",
}

RULES = """
rule compile
  command = g++ $flags -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule program
  command = g++ $flags $in -o $out
rule library
  command = g++ -shared $in -o $out $flags
"""


def missing() -> str:
    """What this machine lacks for the build; empty if nothing."""
    lacking = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"the emulation is built with {' and '.join(lacking)}, which is not on PATH" if lacking else ""


@functools.cache
def build(*targets: str) -> list[Path]:
    """Build the named targets: emulation.so, conformance.so, faults_plain, run_kernels_asan, ... Returns their paths."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = _ninja()
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that run side by side share the folder
        file = FOLDER / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        run = subprocess.run(["ninja", "-C", FOLDER, "-j2", *targets], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ninja {' '.join(targets)} failed:\n{run.stdout[-6000:]}{run.stderr[-1000:]}")
    return [FOLDER / target for target in targets]


def _ninja() -> str:
    import torch
    from torch.utils.cpp_extension import include_paths

    device = f"{FLAGS} -DPYGPT_CUDA_EMULATION -I{HERE}/include -I{HERE} -I{ROOT}/csrc"
    torch_flags = "-DUSE_CUDA -DPYGPT_CUDA_KEY=CPU -DPYGPT_CUDA_HOPPER -Dpygpt=pygpt_emulated "
    torch_flags += "-DTORCH_TARGET_VERSION=0x020a000000000000 "
    torch_flags += " ".join(f"-isystem {path}" for path in include_paths())
    lines = [RULES]

    def compile_(out: str, source: Path, flags: str) -> str:
        lines.append(f"build {out}: compile {source}\n  flags = {flags}")
        return out

    # A kernel for each wrapper of an instruction, called from Python.
    wrappers = compile_("library/conformance.o", HERE / "conformance.cu", f"{device} -O2")
    lines.append(f"build conformance.so: library {wrappers} library/runtime.o\n  flags = -Wl,--no-undefined")

    # The library for Python: operators pygpt_emulated::* on CPU tensors.
    objects = [compile_("library/runtime.o", HERE / "runtime.cpp", f"{FLAGS} -O2")]
    for kernel in KERNELS:
        objects.append(compile_(f"library/{kernel.name}.o", kernel, f"{device} -O2 -Dpygpt=pygpt_emulated"))
    for name in OPERATORS:
        host = ROOT / "csrc" / "cuda" / f"{name}.cpp"
        objects.append(compile_(f"library/{name}.o", host, f"{device} -O1 {torch_flags}"))
    objects.append(compile_("library/torch_library.o", HERE / "torch_library.cpp", f"{device} -O1 {torch_flags}"))
    torch_lib = Path(torch.__file__).parent / "lib"
    link = f"-L{torch_lib} -ltorch_cpu -Wl,-Bsymbolic,--no-undefined"
    lines.append(f"build emulation.so: library {' '.join(objects)}\n  flags = {link}")

    # For Python too: a kernel for each of Hopper's instructions.
    hopper = compile_("library/conformance_sm90.o", HERE / "conformance_sm90.cu", f"{device} -O2")
    lines.append(f"build conformance_sm90.so: library {hopper} library/runtime.o\n  flags = -Wl,--no-undefined")

    # Programs, under each sanitizer. The runtime is never instrumented itself; it only tells them what it does.
    for kind, flags in SANITIZERS.items():
        define = f"-DEMULATION_{kind.upper()}"
        runtime = compile_(f"{kind}/runtime.o", HERE / "runtime.cpp", f"{FLAGS} -O2 {define}")
        faults = compile_(f"{kind}/faults.o", HERE / "faults.cu", f"{device} {flags}")
        main = compile_(f"{kind}/run_kernels.o", HERE / "run_kernels.cpp", f"{device} {flags}")
        kernels = [compile_(f"{kind}/{kernel.name}.o", kernel, f"{device} {flags}") for kernel in KERNELS]
        lines.append(f"build faults_{kind}: program {faults} {runtime}\n  flags = {flags}")
        lines.append(f"build run_kernels_{kind}: program {main} {runtime} {' '.join(kernels)}\n  flags = {flags}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(*build(*(sys.argv[1:] or ["emulation.so", "faults_plain"])), sep="\n")
