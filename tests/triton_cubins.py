"""Compiles what the Triton kernels' host functions would launch, with no GPU, and reads the machine code.

A program for a process of its own: `python tests/triton_cubins.py layer_norm 80 90` prints JSON. It puts a stand-in
driver under Triton that names a target and never launches, calls the host functions with meta tensors, and collects
one Cubin for every kernel variant that they ask for. CASES is what the test suite compiles.
"""

from __future__ import annotations

import functools
import json
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

from pygpt.kernels import adamw, attention, cross_entropy, device, embedding, gelu, layer_norm

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
    hmma: int  # tensor-core instructions of a warp
    hgmma: int  # those of a warpgroup, Hopper's


class StandInDriver:
    """The few questions that a launch asks of a driver before it has compiled."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", device.assumed_architecture, 32)

    def get_current_device(self) -> int:
        return device.assumed_architecture  # one kernel cache per architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def read_cubin(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers a thread, bytes of local memory a thread, HMMA and HGMMA instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    if not (registers and stack and local):
        raise RuntimeError(f"cuobjdump printed something else than expected: {usage}")
    spills = int(stack[1]) + int(local[1])
    return int(registers[1]), spills, len(re.findall(r"\bHMMA\.", sass)), len(re.findall(r"\bHGMMA\.", sass))


def collect(cases: dict[str, Callable[[], Any]], architectures: list[int]) -> list[Cubin]:
    """Runs every case for every architecture; one Cubin per kernel variant."""
    found: dict[tuple[str, int, str], Cubin] = {}
    case = ""
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        constants = {k: v for k, v in options.items() if k != "enable_fp_fusion"}
        dtypes = [str(a.dtype).removeprefix("torch.") for a in args if hasattr(a, "dtype")]
        key = (self.__name__, device.assumed_architecture, f"{constants} {sorted(set(dtypes))}")
        registers, spills, *tensor_core = read_cubin(compiled.asm["cubin"])
        cubin = Cubin(key[0], key[1], case, key[2], registers, spills, compiled.metadata.shared, *tensor_core)
        if key not in found or found[key].spills < spills:
            found[key] = cubin
        return compiled

    driver.set_active(StandInDriver())
    JITFunction.run = compile_only
    try:
        for device.assumed_architecture in architectures:
            for case, call in cases.items():  # noqa: B007 - read by compile_only
                call()
    finally:
        JITFunction.run = launch
    return list(found.values())


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def layer_norm_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(C: int, dtype: torch.dtype, add: bool) -> None:
        x, weight = meta(4096, C, dtype=dtype), meta(C, dtype=torch.float32)
        mean = meta(4096, dtype=torch.float32)
        if add:
            layer_norm.add_layer_norm_forward(x, x, weight, None, 1e-5)
            layer_norm.add_layer_norm_backward(x, x, x, weight, mean, mean, True)
        else:
            layer_norm.layer_norm_forward(x, weight, weight, 1e-5)
            layer_norm.layer_norm_backward(x, x, weight, mean, mean, True)

    for C in (64, 768, 1600, 4096, 8192, 12288):
        yield f"{C} bf16", functools.partial(run, C, torch.bfloat16, C in (768, 12288))
    yield "8192 f32", functools.partial(run, 8192, torch.float32, True)


def embedding_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(C: int, dtype: torch.dtype) -> None:
        idx, tokens, positions = (
            meta(4, 1024, dtype=torch.int64),
            meta(50257, C, dtype=dtype),
            meta(1024, C, dtype=dtype),
        )
        x = embedding.embedding_forward(idx, tokens, positions, 0)
        embedding.embedding_backward_(x, idx, tokens, positions, 0)

    for C in (8, 64, 768, 12288):
        yield f"{C} bf16", functools.partial(run, C, torch.bfloat16)
    yield "768 f32", functools.partial(run, 768, torch.float32)


def attention_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def run(D: int, dtype: torch.dtype, dropout: bool, documents: bool, T: int, backward: bool) -> None:
        packed = meta(8, T, 3, 12, D, dtype=dtype)
        q, k, v = packed.unbind(2)
        if T == 1:  # decoding
            k = v = meta(1, 1024, 12, D, dtype=dtype)
            q = q[:1]
        seed = meta(1, dtype=torch.int64) if dropout else None
        starts = meta(8, T, dtype=torch.int32) if documents else None
        p = 0.1 if dropout else 0.0
        out, lse = attention.causal_attention_forward(q, k, v, 0.1, p, seed, starts)
        if backward:
            attention.causal_attention_backward(out, q, k, v, out, lse, 0.1, p, seed, starts)

    bf16, f32 = torch.bfloat16, torch.float32
    for D in (64, 128):
        for dropout in (False, True):
            yield f"D {D}{' dropout' if dropout else ''}", functools.partial(run, D, bf16, dropout, False, 1024, True)
        yield f"D {D} decoding", functools.partial(run, D, bf16, False, False, 1, False)
    yield "D 64 documents", functools.partial(run, 64, bf16, False, True, 1024, True)
    yield "D 96", functools.partial(run, 96, bf16, False, False, 1024, True)
    yield "D 256", functools.partial(run, 256, bf16, False, False, 1024, True)
    yield "D 64 short", functools.partial(run, 64, bf16, False, False, 48, False)
    yield "D 64 f32", functools.partial(run, 64, f32, True, False, 1024, True)


def other_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    def loss(V: int, dtype: torch.dtype) -> None:
        cross_entropy.loss_and_gradient_(meta(1024, V, dtype=dtype), meta(1024, dtype=torch.int64), True)

    def activation(C: int, dtype: torch.dtype) -> None:
        x, bias = meta(4096, C, dtype=dtype), meta(C, dtype=dtype)
        gelu.bias_gelu_forward(x, bias)
        gelu.bias_gelu_backward(x, x, bias)

    def update(dtype: torch.dtype) -> None:
        weight, state = meta(4096, dtype=dtype), meta(4096, dtype=torch.float32)
        master = weight if dtype == torch.float32 else state
        for factor in (None, meta(1, dtype=torch.float32)):
            adamw.adamw_(
                [weight], [weight], [master], [state], [state], [state],
                lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_factor=factor,
            )  # fmt: skip

    for dtype in (torch.bfloat16, torch.float32):
        yield f"adamw {dtype}", functools.partial(update, dtype)
        yield f"loss 50257 {dtype}", functools.partial(loss, 50257, dtype)
        yield f"gelu 3072 {dtype}", functools.partial(activation, 3072, dtype)
    yield "loss 65", functools.partial(loss, 65, torch.bfloat16)


CASES = {
    "layer_norm": layer_norm_cases,
    "embedding": embedding_cases,
    "attention": attention_cases,
    "cross_entropy and gelu": other_cases,
}


if __name__ == "__main__":
    cubins = collect(dict(CASES[sys.argv[1]]()), [int(a) for a in sys.argv[2:]])
    json.dump([asdict(c) for c in cubins], sys.stdout, indent=1)
