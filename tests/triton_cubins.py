"""Compiles what the Triton kernels' host functions would launch, with no GPU, and reads what came of it.

A program for a process of its own: `python tests/triton_cubins.py layer_norm 90` prints JSON. It puts a stand-in
driver under Triton that names a target and never launches, calls the host functions with meta tensors, and collects
one Cubin for every kernel variant that they ask for. CASES is what the test suite compiles.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pygpt.kernels import (
    adamw,
    attention,
    attention_backward,
    attention_tile,
    cross_entropy,
    device,
    embedding,
    gelu,
    layer_norm,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Cubin:
    kernel: str
    arch: int
    case: str
    constants: str  # the constexpr arguments and launch options of this variant
    registers: int
    spills: int  # bytes of local memory
    shared: int  # bytes
    mma: int  # tensor-core instructions of a warp, in PTX: to disassemble the machine's own took a quarter of the time
    wgmma: int  # those of a warpgroup, Hopper's
    operands: str  # dtype of the first argument: attention's products are of such values
    rows: int  # of attention's products: queries, or keys where a kernel's tiles are (keys, queries); else 0


class StandInDriver:
    """The few questions that a launch asks of a driver before it has compiled."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", device.assumed_architecture, 32)

    def get_current_device(self) -> int:
        return device.assumed_architecture  # one kernel cache per architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, bytes of local memory a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump printed something else than expected: {usage}")
    return int(registers[1]), int(stack[1]) + int(local[1])


def collect(cases: Callable[[], Iterator[tuple[str, Callable[[], Any]]]], arch: int) -> list[Cubin]:
    """Runs every case for one architecture; one Cubin per kernel variant."""
    found: dict[tuple[str, int, str], Cubin] = {}
    case = ""
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        constants = {k: v for k, v in options.items() if k != "enable_fp_fusion"}
        dtypes = [str(a.dtype).removeprefix("torch.") for a in args if hasattr(a, "dtype")]
        key = (self.__name__, device.assumed_architecture, f"{constants} {sorted(set(dtypes))}")
        registers, spills = read_cubin(compiled.asm["cubin"])
        mma, wgmma = (compiled.asm["ptx"].count(name) for name in ("mma.sync.", "wgmma.mma_async."))
        rows = options.get("KEYS" if self.__name__ == "_attention_grad_kv_kernel" else "QUERIES", 0)
        cubin = Cubin(*key[:2], case, key[2], registers, spills, compiled.metadata.shared, mma, wgmma, dtypes[0], rows)
        if key not in found or found[key].spills < spills:
            found[key] = cubin
        return compiled

    driver.set_active(StandInDriver())
    JITFunction.run = compile_only
    try:
        device.assumed_architecture = arch
        device.assumed_multiprocessors = 132  # an H100's: it decides what is split
        for case, call in cases():  # noqa: B007 - read by compile_only
            call()
    finally:
        JITFunction.run = launch
    return list(found.values())


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


bf16, f32 = torch.bfloat16, torch.float32
LARGE = {"layer_norm": 20000, "embedding": 12288, "gelu": 3072, "cross_entropy": 50257}  # stand for "any number above"


def sizes(table: tuple, op: str) -> list[int]:
    """A size for every line of a table of (largest size, tile)."""
    return [LARGE[op] if largest == math.inf else int(largest) for largest, _ in table]


def layer_norm_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(C: int, dtype: torch.dtype, add: bool) -> None:
        x, weight = meta(4096, C, dtype=dtype), meta(C, dtype=f32)
        mean = meta(4096, dtype=f32)
        if add:
            layer_norm.add_layer_norm_forward(x, x, weight, weight, 1e-5)
            layer_norm.add_layer_norm_backward(x, x, x, weight, mean, mean, True)
        else:
            layer_norm.layer_norm_forward(x, weight, weight, 1e-5)
            layer_norm.layer_norm_backward(x, x, weight, mean, mean, True)

    for C in sorted({*sizes(layer_norm.FORWARD, "layer_norm"), *sizes(layer_norm.BACKWARD, "layer_norm")}):
        yield f"{C} add", functools.partial(run, C, bf16, True)
    for C in (768, 12288):
        yield f"{C}", functools.partial(run, C, bf16, False)
    for C in (1024, 8192, 16384, 20000):
        yield f"{C} f32", functools.partial(run, C, f32, True)
    for C in (801, 5001):  # rows that are not aligned
        for dtype in (bf16, f32):
            yield f"{C} {dtype}", functools.partial(run, C, dtype, True)
    yield "768 float16", functools.partial(run, 768, torch.float16, True)


def embedding_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(C: int, dtype: torch.dtype, B: int = 4, T: int = 1024) -> None:
        idx = meta(B, T, dtype=torch.int64)
        tokens, positions = meta(50257, C, dtype=dtype), meta(1024, C, dtype=dtype)
        x = embedding.embedding_forward(idx, tokens, positions, 0)
        embedding.embedding_backward_(x, idx, tokens, positions, 0)

    tables = (embedding.FORWARD, embedding.PIECES, embedding.FINISH, embedding.POSITIONS)
    for C in sorted({C for table in tables for C in sizes(table, "embedding")}):
        yield f"{C} bf16", functools.partial(run, C, bf16)
    yield "768 f32", functools.partial(run, 768, f32)
    # A 1 is a constant of the compiler's, no value with methods.
    yield "all sizes 1", functools.partial(run, 1, f32, 1, 1)


def attention_cases(later: bool = False) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every line of the tables at its widest head, plain and with all that costs registers; and cases of their own. later:
    those lines alone that are for architectures after Hopper."""

    def run(
        D: int, dtype: torch.dtype, dropout: bool, documents: bool, T: int, forward: bool, backward: bool,
        heads: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        B, H = heads or ((8, 32) if T > 64 else (1, 1))
        q, k, v = meta(B, T, 3, H, D, dtype=dtype).unbind(2)
        if T <= 64:  # decoding: one head and many keys, which are split
            k = v = meta(B, 1024, H, D, dtype=dtype)
        seed = meta(1, dtype=torch.int64) if dropout else None
        starts = meta(B, T, dtype=torch.int32) if documents else None
        p = 0.1 if dropout else 0.0
        if forward:
            attention.causal_attention_forward(q, k, v, 0.1, p, seed, starts)
        if backward:
            attention.causal_attention_backward(q, q, k, v, q, meta(B, H, T, dtype=f32), 0.1, p, seed, starts)

    for table in (attention.FORWARD, attention_backward.GRAD_Q, attention_backward.GRAD_KV):
        for row in table:
            if later and row.arch != attention.LATER:
                continue
            dtype, T = {16: bf16, 32: f32}[row.bits], min(row.T, 1024)
            for dropout in (False, True) if row.dropout is None else (row.dropout,):
                if attention_tile.choose(table, meta(1, T, 1, row.D, dtype=dtype), dropout) != row.config:
                    continue  # this line is for other architectures
                forward = table is attention.FORWARD
                name = f"D {row.D} T {T}{' dropout' if dropout else ''}"
                yield name, functools.partial(run, row.D, dtype, dropout, dropout, T, forward, not forward)
    if later:
        return
    for dropout in (False, True):  # documents alone, and dropout alone, where they matter most
        name = f"D 64 T 1024 {'dropout' if dropout else 'documents'}"
        yield name, functools.partial(run, 64, bf16, dropout, not dropout, 1024, True, True)
    yield "D 96", functools.partial(run, 96, bf16, False, False, 1024, True, True)
    for dropout in (False, True):
        yield "D 40, padded", functools.partial(run, 40, bf16, dropout, False, 1024, True, True)
        for D in (64, 128):
            yield f"D {D} float16", functools.partial(run, D, torch.float16, dropout, False, 1024, True, True)
            # What is split where heads are few, and is not where they are many.
            yield f"D {D} split", functools.partial(run, D, bf16, dropout, dropout, 1024, True, False, (1, 12))
            yield f"D {D} T 1", functools.partial(run, D, bf16, dropout, dropout, 1, True, False, (8, 32))
        yield "one head", functools.partial(run, 64, bf16, dropout, dropout, 1024, True, True, (1, 1))


def other_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def loss(V: int, dtype: torch.dtype) -> None:
        logits, targets = meta(1024, V, dtype=dtype), meta(1024, dtype=torch.int64)
        for factor in (None, meta(1, dtype=f32)):
            cross_entropy.cross_entropy_rows_(logits, targets, -100, factor)

    def activation(C: int, dtype: torch.dtype, with_bias: bool, rows: int = 4096) -> None:
        x, bias = meta(rows, C, dtype=dtype), meta(C, dtype=dtype) if with_bias else None
        gelu.bias_gelu_forward(x, bias)
        gelu.bias_gelu_backward(x, x, bias)

    def update(dtype: torch.dtype) -> None:
        weight, state = meta(4096, dtype=dtype), meta(4096, dtype=f32)
        residuals = [] if dtype == f32 else [meta(4096, dtype=torch.int16)]
        for factor in (None, meta(1, dtype=f32)):
            adamw.adamw_(
                [weight], [weight], residuals, [state], [state], [state],
                lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_factor=factor,
            )  # fmt: skip

    for dtype in (bf16, f32):
        yield f"adamw {dtype}", functools.partial(update, dtype)
        for V in sizes(cross_entropy.WARPS, "cross_entropy"):
            yield f"loss {V} {dtype}", functools.partial(loss, V, dtype)
        for C in sizes(gelu.TILES, "gelu"):
            yield f"gelu {C} {dtype}", functools.partial(activation, C, dtype, True)
    yield "gelu 3072 without bias", functools.partial(activation, 3072, bf16, False)
    yield "gelu of one element", functools.partial(activation, 1, f32, True, 1)


CASES = {
    "layer_norm": layer_norm_cases,
    "embedding": embedding_cases,
    "attention": attention_cases,
    "later attention": functools.partial(attention_cases, later=True),
    "cross_entropy, gelu and adamw": other_cases,
}


if __name__ == "__main__":
    cubins = collect(CASES[sys.argv[1]], int(sys.argv[2]))
    json.dump([asdict(c) for c in cubins], sys.stdout, indent=1)
