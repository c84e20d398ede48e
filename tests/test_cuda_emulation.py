"""The emulated CUDA device catches the mistakes it is there for, and the kernels run clean under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from cuda_emulation import build

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "built")

# Kernel with a planted mistake -> how the plain, the ASan + UBSan and the TSan build end, and what they say.
WRONG, STOPPED = 3, 4
FAULTS = {
    "missing_syncthreads": [("plain", WRONG, "wrong number"), ("tsan", 66, "data race")],
    "missing_syncwarp": [("plain", WRONG, "wrong number"), ("tsan", 66, "data race")],
    "buffer_reused_early": [("plain", WRONG, "wrong number"), ("tsan", 66, "data race")],
    "missing_copy_wait": [("plain", WRONG, "nan"), ("tsan", 66, "data race")],
    "wrong_copy_group": [("plain", WRONG, "nan"), ("tsan", 66, "data race")],
    "shared_out_of_bounds": [("asan", 1, "use-after-poison")],
    "global_out_of_bounds": [("asan", 1, "heap-buffer-overflow")],
    "misaligned_load": [("asan", 1, "misaligned address")],
    "index_overflow": [("asan", 1, "signed integer overflow")],
    "misaligned_copy": [("plain", STOPPED, "cp.async of 16 bytes: an address is not aligned")],
    "copy_never_awaited": [("plain", STOPPED, "ends with a cp.async that it never waited for")],
    "shared_not_written": [("plain", WRONG, "nan")],
    "more_shared_than_launched": [("plain", STOPPED, "shared memory: 388 bytes taken, 384 launched with")],
    "divergent_barrier": [("plain", STOPPED, "divergent block barrier")],
    "barrier_after_return": [("plain", STOPPED, "thread 5 ends while others wait|barrier after a thread")],
    "divergent_shuffle": [("plain", STOPPED, "deadlock|ends|divergent warp")],
    "missing_barrier_wait": [("plain", WRONG, "nan"), ("tsan", 66, "data race")],
    "wrong_barrier_parity": [("tsan", 66, "data race")],
    "wrong_byte_count": [("plain", STOPPED, "waits at a shared-memory barrier")],
    "stage_released_early": [("plain", WRONG, "nan"), ("tsan", 66, "data race")],
    "missing_product_fence": [("plain", STOPPED, "wgmma without a wgmma.fence")],
    "missing_product_wait": [("plain", WRONG, "nan")],
    "product_register_changed": [("plain", STOPPED, "a wgmma's registers changed before the wait")],
    "product_tile_changed": [("plain", STOPPED, "a wgmma's shared memory changed before the wait")],
    "wrong_product_operand": [("plain", WRONG, "wrong number")],
    "wrong_fragment_layout": [("plain", WRONG, "wrong number")],
}
SEEDS = [0, 1, 2, 3]


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    (path,) = build.build(program)
    command = [str(path), *map(str, arguments)]
    if program.endswith("tsan") and shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # ThreadSanitizer of GCC 12 cannot map its shadow everywhere
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_every_fault_is_expected():
    assert set(run("faults_plain").stdout.split()) == set(FAULTS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FAULTS)
def test_planted_mistake_is_caught(name: str, seed: int):
    for kind, status, message in FAULTS[name]:
        found = run(f"faults_{kind}", name, "planted", seed)
        assert found.returncode == status, f"{kind}: {found.stderr}"
        assert any(text in found.stderr for text in message.split("|")), found.stderr


@pytest.mark.parametrize("kind", build.SANITIZERS)
@pytest.mark.parametrize("name", FAULTS)
def test_the_kernel_without_the_mistake_passes(name: str, kind: str):
    for seed in SEEDS[:2]:
        clean = run(f"faults_{kind}", name, "right", seed)
        assert clean.returncode == 0, clean.stderr


@pytest.mark.parametrize(("kind", "seed"), [("asan", 0), ("asan", 1), ("tsan", 0)])  # two minutes each of the last
def test_kernels_run_clean_under_sanitizers(kind: str, seed: int):
    clean = run(f"run_kernels_{kind}", seed)
    assert clean.returncode == 0, clean.stderr[-3000:]
    assert clean.stdout.split() == build.OPERATORS
