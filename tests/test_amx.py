"""Attention for AMX: the instructions and their emulation, and that its answers are those of the level below.

tests/test_attention.py covers the level like every other, where there is one: on a processor with AMX, or in the build of
`make test-amx`, whose kernels run on an emulation of the instructions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from common import document_starts, leaf
from test_attention import draw_seed, dropout_mask, explicit

from pygpt import ops
from pygpt.ops import backends

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "amx_emulation" / "conformance.cpp"
LEVELS = backends.extension.available_cpu_capabilities() if backends.extension else []
EMULATED = bool(backends.extension) and b"AMX emulation: " in Path(backends.extension.__file__).read_bytes()


def output(*command: object) -> str:
    """What a command prints; nothing if there is no such command."""
    if shutil.which(str(command[0])) is None:
        return ""
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def assembles_amx() -> bool:
    if shutil.which("g++") is None:
        return False
    command = ["g++", "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input='asm("tilerelease");', text=True, capture_output=True).returncode == 0


ASSEMBLES = assembles_amx()
CPU = Path("/proc/cpuinfo")
AVX512 = CPU.exists() and "avx512f" in CPU.read_text()  # of the processor: a level may be emulated
needs_gcc = pytest.mark.skipif(not ASSEMBLES, reason="no g++ here whose assembler knows AMX (binutils 2.36)")
needs_avx2 = pytest.mark.skipif("avx2" not in LEVELS, reason="the emulation is written with AVX2, which is not here")
needs_level = pytest.mark.skipif(
    "amx" not in LEVELS, reason="no AMX here; `make test-amx` runs this test on an emulation"
)


@pytest.fixture(scope="module")
def conformance(tmp_path_factory):
    """The two builds of conformance.cpp, on the instructions and on the emulation; made when first asked for."""
    folder = tmp_path_factory.mktemp("amx")

    def build(emulated: bool) -> Path:
        program = folder / ("emulated" if emulated else "real")
        if not program.exists():
            flags = ["-DPYGPT_AMX_EMULATED=1"] if emulated else []
            flags += ["-DPYGPT_AVX512_EMULATED=1", "-Wno-psabi"] if emulated and not AVX512 else []
            flags += ["-std=c++20", "-O3", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}"]
            done = subprocess.run(["g++", *flags, SOURCE, "-o", program], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return program

    return build


@needs_gcc
def test_instructions(conformance):
    done = subprocess.run([conformance(emulated=False)], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("this processor has no AMX")
    assert done.returncode == 0, done.stdout


@needs_gcc
@needs_avx2
def test_emulated_instructions(conformance):
    done = subprocess.run([conformance(emulated=True)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


MISTAKES = {
    "load_not_configured": "tileloadd: tiles are not configured",
    "zero_not_configured": "tilezero: tiles are not configured",
    "dot_not_configured": "tdpbf16ps: tiles are not configured",
    "store_after_release": "tilestored: tiles are not configured",
    "release_forgotten": "ldtilecfg: tiles are still configured",
    "palette_forgotten": "ldtilecfg: palette must be 1",
    "reserved_byte": "ldtilecfg: reserved bytes must be zero",
    "rows_too_long": "ldtilecfg: a tile is 16 rows of 64 bytes",
    "too_many_rows": "ldtilecfg: a tile is 16 rows of 64 bytes",
    "rows_without_bytes": "ldtilecfg: a tile has rows without bytes",
    "ninth_tile": "ldtilecfg: there are eight tiles",
    "tile_not_configured": "tileloadd: this tile is not configured",
    "dot_of_unconfigured": "tdpbf16ps: this tile is not configured",
    "rows_differ": "tdpbf16ps: shapes do not fit",
    "columns_differ": "tdpbf16ps: shapes do not fit",
    "sums_differ": "tdpbf16ps: shapes do not fit",
    "load_not_aligned": "tileloadd: rows straddle cache lines",
    "stride_not_aligned": "tilestored: rows straddle cache lines",
    "stored_rows_overlap": "tilestored: rows overlap",
}


@needs_gcc
@needs_avx2
@pytest.mark.parametrize("name", MISTAKES)
def test_planted_mistake_is_caught(conformance, name):
    done = subprocess.run([conformance(emulated=True), name], capture_output=True, text=True, timeout=60)
    assert done.returncode == -6, done.stdout
    assert done.stderr.startswith(f"AMX emulation: {MISTAKES[name]}")


@pytest.mark.skipif(not LEVELS, reason="pygpt._C is not built")
@pytest.mark.skipif(EMULATED, reason="this pygpt._C is built on the emulation; the plain build runs this test")
def test_the_extension_holds_the_instructions():
    if shutil.which("objdump") is None:
        pytest.skip("objdump, which lists a binary's instructions, is not here")
    if not ASSEMBLES or "lang" in backends.extension.compiler:
        pytest.skip("pygpt._C has this level only from GCC with an assembler that knows AMX (binutils 2.36)")
    text = output("objdump", "-d", "--no-show-raw-insn", backends.extension.__file__)
    counts = {
        name: len(re.findall(rf"\s{name}\b", text))
        for name in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tilezero", "tdpbf16ps")
    }
    assert all(counts.values()), counts
    assert counts["ldtilecfg"] >= 2, "one for forward, one for backward"
    assert counts["tilerelease"] >= 2


# --- the kernels ---------------------------------------------------------------------------------------------------

CASES = {  # B, T, S, H, D, documents, dropout
    "whole tiles": (1, 128, 128, 2, 64, None, 0.0),
    "dropout": (2, 80, 80, 1, 64, None, 0.2),
    "a cache": (1, 33, 90, 2, 48, None, 0.0),
    "steps begin and end inside": (1, 85, 150, 2, 96, None, 0.1),
    "wide": (1, 70, 70, 1, 256, None, 0.0),
    "narrow": (1, 70, 83, 1, 1, None, 0.0),
    "few queries": (2, 5, 500, 1, 64, None, 0.0),
    "documents": (1, 150, 150, 2, 64, [[17, 40, 1, 31, 61]], 0.0),
    "documents in a cache": (2, 77, 160, 1, 40, [[20, 100, 40], [95, 33, 32]], 0.3),
    "documents that begin with a block": (1, 200, 200, 2, 64, [[64, 64, 72]], 0.0),
    "growing scores": (1, 150, 260, 2, 64, None, 0.0),  # later keys have larger ones: what was summed is rescaled
    "growing dropped scores": (1, 150, 260, 2, 64, None, 0.3),
    "faraway scores": (1, 150, 260, 2, 64, None, 0.0),  # too large for the table of powers of two
    "falling scores": (1, 150, 260, 2, 64, None, 0.0),  # the first block of keys has the largest: nothing is
    "equal scores": (1, 260, 260, 2, 64, None, 0.0),  # all of a query's probabilities have one mantissa, nearly
}


def run(level, case, dtype=torch.bfloat16):
    """Output, its logarithm of the sums of exponentials and the three gradients under a level; and the inputs."""
    B, T, S, H, D, documents, dropout_p = CASES[case]
    q, k, v = (leaf(B, n, H, D, dtype=dtype, seed=i) for i, n in enumerate((T, S, S)))
    if case.endswith("scores"):
        factor = {
            "growing": torch.linspace(0, 8, S),
            "falling": torch.linspace(8, 0, S),
            "faraway": torch.full((S,), 1e7),
            "equal": torch.full((S,), 1e-3),
        }
        factor = factor[case.split()[0]].to(dtype)
        k = (k * factor[:, None, None]).detach().requires_grad_()
    starts = document_starts(documents, T) if documents else None
    cotangent = leaf(B, T, H, D, dtype=dtype, seed=9).detach()
    backends.extension.set_cpu_capability(level)
    try:
        with backends.use_backend("cpp"):
            torch.manual_seed(5)
            seed = draw_seed() if dropout_p else None
            lse = torch.ops.pygpt.causal_attention_forward.default(q, k, v, D**-0.5, dropout_p, seed, starts)[1]
            torch.manual_seed(5)
            out = ops.causal_attention(q, k, v, None, dropout_p, starts)
            grads = torch.autograd.grad(out, (q, k, v), cotangent)
    finally:
        backends.extension.set_cpu_capability("")
    keep = dropout_mask(seed, (B, H, T, S), dropout_p) if dropout_p else None
    return [out.detach(), lse, *grads], (q, k, v, keep, dropout_p, starts, cotangent)


@needs_level
@pytest.mark.parametrize("case", CASES)
def test_as_good_as_the_level_below(case):
    amx, (q, k, v, keep, dropout_p, starts, cotangent) = run("amx", case)
    below, _ = run("avx512_bf16", case)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = explicit(*wide, None, keep, dropout_p, starts)
    exact = [out, lse, *torch.autograd.grad(out, wide, cotangent.double())]
    compared = list(zip(("out", "lse", "grad q", "grad k", "grad v"), amx, below, exact, strict=True))
    if case == "faraway scores":  # gradients there are what float32 leaves of differences of such numbers
        compared = compared[:2]
    # A sum of powers of 2 has no larger relative error than they: rounding to bfloat16, 2^-8 at most, and the table's.
    _, lse_amx, _, lse_exact = compared.pop(1)
    error, float32 = (lse_amx.double() - lse_exact).abs(), 1e-6 * lse_exact.abs().max()
    equal = case == "equal scores"  # where all are rounded the same way, and the table has no error
    assert error.max() <= (2**-9 if equal else 0.0058) + float32
    assert error.square().mean().sqrt() <= (2**-9 if equal else 2**-10) + float32
    for name, a, b, e in compared:
        e = e.detach()
        error, error_below = ((x.double() - e).norm() for x in (a, b))
        most = 1.1 + e.numel() ** -0.5  # norms of so many independent roundings differ by that much by chance
        assert error <= most * error_below + 1e-6 * e.norm(), f"{name}: {error:.3g} against {error_below:.3g}"
        assert (a.double() - b.double()).abs().max() <= 0.02 * e.abs().max() + 1e-6, name
    if case == "wide":  # in float32, not rounded away
        assert not torch.equal(amx[1], below[1]), "the level has a kernel of its own"


@needs_level
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_that_was_not_written(case):
    """Workspaces are allocated uninitialised: torch fills them with NaN on request. Whole tiles read beyond what is summed."""
    plain, _ = run("amx", case)
    torch.use_deterministic_algorithms(True)
    try:
        filled, _ = run("amx", case)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(plain, filled, strict=True):
        assert torch.equal(a, b)


@needs_level
@pytest.mark.parametrize("case", ["steps begin and end inside", "documents in a cache"])
def test_same_bits_for_one_and_two_threads(case):
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run("amx", case)[0])
    torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_level
def test_float32_is_the_level_below():
    amx, below = (run(level, "a cache", torch.float32)[0] for level in ("amx", "avx512_bf16"))
    for a, b in zip(amx, below, strict=True):
        assert torch.equal(a, b)


@needs_level
def test_tiles_are_left_as_they_were_found():
    """torch's own products of bfloat16 take AMX too, by the same threads."""
    x = torch.randn(256, 256).bfloat16()
    product = x @ x
    for _ in range(3):
        run("amx", "whole tiles")
        assert torch.equal(x @ x, product)
