"""Every op and GPT-2 124M on an NVIDIA GPU, against what a PyTorch user would otherwise run.

    python bench/gpu.py            # at most 5 minutes; writes bench/results/<device>/gpu.json and gpu.md
    python bench/gpu.py --smoke    # every line of it once, tiny, on any device, times meaningless: is the script alive?

Peers, each by name: eager PyTorch, torch.compile, SDPA's flash and cuDNN backends, FlexAttention; flash-attn, Liger-
Kernel and transformers where they are installed. Nothing is downloaded. What could not run, or for which no time was
left, is in the table with its reason; what has to be compiled first comes last. Times are medians with the second-level
cache flushed before every run. All is measured in a process of its own, each row written down at once: where a row breaks
the device, crashes or hangs, the table says so and a new process goes on behind it.
"""

# ruff: noqa: B023 - the closures of a loop are used within its turn

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import markdown, read, versions, write

import pygpt
from pygpt import GPT, GPTConfig, ops
from pygpt.ops import backends
from pygpt.optim import AdamW

Call = Callable[[], Any]
ROW_SECONDS = 120  # what takes longer hangs
BROKEN = 3  # exit status of a process that can no longer use the device


class NotMeasured(Exception):
    """Why a peer is left out."""

    def __str__(self) -> str:
        return f"not measured: {self.args[0]}"


class Bench:
    """The clock, the budget and the file of rows: JSON lines, of which the last one with an index counts."""

    def __init__(self, smoke: bool, seconds: float, file: Path, skip: int) -> None:
        self.smoke, self.deadline = smoke, time.monotonic() + seconds
        self.file, self.skip, self.index = file, skip, -1
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.copy_rate = math.nan  # bytes a second
        self.compiled = False  # whether this is the second round: of what has to be compiled first, which takes minutes
        self.flush = torch.empty(1 if smoke else 256 << 20, dtype=torch.int8, device=self.device)

    def put(self, entry: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def time(self, call: Call, seconds: float = 0.15) -> float:
        """Median seconds of one call."""
        if self.smoke or self.device.type != "cuda":
            call()
            return math.nan
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        times: list[float] = []
        stop = time.monotonic() + seconds
        while len(times) < 5 or (time.monotonic() < stop and len(times) < 200):
            marks = []
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the host gets ahead: no launch is waited for
            for _ in range(5):
                self.flush.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                marks.append((start, end))
            torch.cuda.synchronize()
            times += [start.elapsed_time(end) / 1e3 for start, end in marks]
        return statistics.median(times)

    def turn(self) -> None:
        """A new case begins: compile it for its own shapes, and leave no graphs of the last one behind."""
        torch._dynamo.reset()

    def row(
        self, op: str, case: str, who: str, make: Callable[[], Call], unit: str, work: float, memory: bool = False
    ) -> None:
        """Time make()() and put down work / time in the unit's scale, or what was in the way; memory: the peak too."""
        if ("torch.compile" in who or who == "FlexAttention") != self.compiled:
            return
        self.index += 1
        if self.index < self.skip:
            return
        entry: dict[str, Any] = {"index": self.index, "op": op, "case": case, "who": who, "unit": unit}
        if time.monotonic() > self.deadline:
            self.put(entry | {"problem": "not measured: out of time"})
            return
        limit = min(ROW_SECONDS, math.ceil(self.deadline - time.monotonic()) + 30)
        self.put(entry | {"problem": f"the process crashed here, or hung for {limit} s"})
        faulthandler.dump_traceback_later(limit, exit=True)
        broken = False
        try:
            entry |= self.measure(who, make, unit, work, memory)
        except Exception as error:  # a peer that cannot run is a result, and must not end the others
            kind = "" if isinstance(error, NotMeasured) else f"{type(error).__name__}: "
            entry["problem"] = f"{kind}{error}".split("\n")[0][:160]
            broken = not self.alive()
        faulthandler.cancel_dump_traceback_later()
        self.put(entry)
        print(" ", *(f"{v:.3g}" if isinstance(v, float) else v for v in entry.values()), flush=True)
        if broken:
            os._exit(BROKEN)  # at once: tearing down a broken device may hang

    def measure(self, who: str, make: Callable[[], Call], unit: str, work: float, memory: bool) -> dict[str, float]:
        # Around backward too: its operators are chosen when it runs.
        backend = who.removeprefix("pygpt ").split(",")[0] if who.startswith("pygpt ") else None
        # On compute capability 9.0 attention has kernels of its own, unless they are not wanted.
        os.environ["PYGPT_CUDA_HOPPER"] = str(int(not who.endswith(", portable")))
        with pygpt.use_backend(backend):
            call = make()
            seconds = self.time(call)
            found = {
                "ms": seconds * 1e3,
                "value": work / seconds / {"TFLOP/s": 1e12, "GB/s": 1e9, "tokens/s": 1.0}[unit],
            }
            if unit == "GB/s":
                found["of copy"] = work / seconds / self.copy_rate
            if memory and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                torch.cuda.synchronize()
                found["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return found

    def alive(self) -> bool:
        """Whether the device still answers: an illegal access ends it for the whole process."""
        try:
            torch.ones(1, device=self.device).item()
        except RuntimeError as error:
            return isinstance(error, torch.OutOfMemoryError)
        return True


def ours() -> list[str]:
    """pygpt's own columns that run here."""
    return [name for name in ("cuda", "triton") if backends.ready(name)] or ["eager"]


def backward(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor]) -> Call:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    grads = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def forward_and_backward(run: Call, inputs: list[Tensor]) -> Call:
    grad = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), inputs, grad)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def liger(module: str, function: str) -> Callable[..., Any]:
    """Imported within a row: where Liger-Kernel is broken, that row alone is."""
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply


def copy(bench: Bench) -> None:
    source = torch.randn(1 << (10 if bench.smoke else 27), device=bench.device)
    target = torch.empty_like(source)
    bench.copy_rate = 2 * source.nbytes / bench.time(lambda: target.copy_(source))
    bench.row(
        "copy", f"{source.nbytes >> 20} MiB", "torch", lambda: lambda: target.copy_(source), "GB/s", 2 * source.nbytes
    )


# --- attention ---------------------------------------------------------------------------------------------------


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, D) as in nanoGPT without SDPA."""
    T = q.shape[2]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


def attention_peers(T: int, device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> function of (B, T, H, D) views of a packed projection."""

    def sdpa(backend: SDPBackend | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend) if backend is not None else nullcontext():
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)

        return run

    def absent(why: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            raise NotMeasured(why)

        return run

    peers = {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}
    eager = lambda q, k, v: naive_attention(*(x.transpose(1, 2) for x in (q, k, v)))  # noqa: E731
    peers["eager"] = eager if T <= 4096 else absent("its T x T scores do not fit")
    if T in (64, 1024, 4096):
        peers["torch.compile"] = compiled(eager)
        mask = functools.cache(lambda: create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device))
        flex = compiled(flex_attention)
        peers["FlexAttention"] = lambda q, k, v: flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask())
    else:
        peers["torch.compile"] = peers["FlexAttention"] = absent("compiling takes most of the time that there is")
    if importlib.util.find_spec("flash_attn"):
        peers["flash-attn"] = lambda q, k, v: importlib.import_module("flash_attn").flash_attn_func(
            q, k, v, causal=True
        )
    return peers


def attention(bench: Bench) -> None:
    lengths = (64,) if bench.smoke else (1024, 512, 2048, 4096, 16384)
    for D in (64, 128):
        for T in lengths:
            bench.turn()
            B, H = (1, 2) if bench.smoke else (16384 // T, 2048 // D)
            flops = 2 * B * H * T * T * D  # two products, half of them masked
            packed = torch.randn(B, T, 3, H, D, dtype=torch.bfloat16, device=bench.device)
            q, k, v = (x.detach().requires_grad_() for x in packed.unbind(2))
            runs = {f"pygpt {name}": (lambda: ops.causal_attention(q, k, v)) for name in ours()}
            if bench.device.type == "cuda" and torch.cuda.get_device_capability()[0] == 9 and "cuda" in ours():
                runs["pygpt cuda, portable"] = runs["pygpt cuda"]
            for name, peer in attention_peers(T, bench.device).items():
                runs[name] = lambda peer=peer: peer(q, k, v)
            for name, run in runs.items():
                case = f"D {D}, T {T}"
                bench.row("attention forward", case, name, lambda run=run: torch.no_grad()(run), "TFLOP/s", flops)
                both = lambda run=run: backward(run(), [q, k, v])  # noqa: E731
                bench.row("attention backward", case, name, both, "TFLOP/s", 2.5 * flops)


# --- ops that memory bounds --------------------------------------------------------------------------------------


def passes(
    bench: Bench, op: str, case: str, runs: dict[str, Call], inputs: list[Tensor], forward: int, back: int
) -> None:
    """Rows for the passes of each of `runs`, which move `forward` and `back` bytes."""
    for name, run in runs.items():
        bench.row(f"{op} forward", case, name, lambda run=run: torch.no_grad()(run), "GB/s", forward)
        bench.row(f"{op} backward", case, name, lambda run=run: backward(run(), inputs), "GB/s", back)
        if op == "layer_norm":
            both = lambda run=run: forward_and_backward(run, inputs)  # noqa: E731
            bench.row(f"{op} both", case, name, both, "GB/s", forward + back)


def layer_norm(bench: Bench) -> None:
    for C, rows, dtype in ((768, 32768, torch.bfloat16), (1024, 4096, torch.float32), (1600, 16384, torch.bfloat16),
                           (4096, 8192, torch.bfloat16), (12288, 4096, torch.bfloat16)):  # fmt: skip
        bench.turn()
        rows = 8 if bench.smoke else rows
        x = torch.randn(rows, C, dtype=dtype, device=bench.device, requires_grad=True)
        residual = torch.randn_like(x, requires_grad=True)
        weight = torch.ones(C, dtype=dtype, device=bench.device, requires_grad=True)
        bias = torch.zeros(C, dtype=dtype, device=bench.device, requires_grad=True)
        case = f"{rows} x {C} {str(dtype)[6:]}"
        runs: dict[str, Call] = {f"pygpt {name}": (lambda: ops.layer_norm(x, weight, bias)) for name in ours()}
        runs["eager"] = lambda: F.layer_norm(x, (C,), weight, bias)
        runs["torch.compile"] = compiled(runs["eager"])
        if importlib.util.find_spec("liger_kernel"):
            runs["Liger"] = lambda: liger("layer_norm", "LigerLayerNormFunction")(x, weight, bias, 1e-5)
        passes(bench, "layer_norm", case, runs, [x, weight, bias], 2 * x.nbytes, 3 * x.nbytes)

        def add() -> tuple[Tensor, Tensor]:
            total = x + residual
            return F.layer_norm(total, (C,), weight, bias), total

        runs = {f"pygpt {name}": (lambda: ops.add_layer_norm(x, residual, weight, bias)) for name in ours()}
        runs |= {"eager": add, "torch.compile": compiled(add)}
        passes(bench, "add_layer_norm", case, runs, [x, residual, weight, bias], 4 * x.nbytes, 4 * x.nbytes)


def embedding(bench: Bench) -> None:
    V, B, T = (100, 2, 16) if bench.smoke else (50257, 16, 1024)
    uniform = torch.randint(V, (B, T), device=bench.device)
    zipf = (V ** torch.rand(B, T, device=bench.device)).long().clamp(max=V) - 1  # P(rank) about 1 / rank
    for C, dtype in ((768, torch.bfloat16), (768, torch.float32), (1600, torch.bfloat16), (4096, torch.bfloat16),
                     (12288, torch.bfloat16)):  # fmt: skip
        wte = torch.randn(V, C, dtype=dtype, device=bench.device, requires_grad=True)
        wpe = torch.randn(T, C, dtype=dtype, device=bench.device, requires_grad=True)
        bench.turn()
        for ids, idx in (("uniform", uniform), ("Zipf", zipf)) if C == 768 else (("uniform", uniform),):
            runs: dict[str, Call] = {f"pygpt {name}": lambda idx=idx: ops.embedding(idx, wte, wpe) for name in ours()}
            runs["eager"] = lambda idx=idx: F.embedding(idx, wte) + wpe[:T]
            runs["torch.compile"] = compiled(runs["eager"])
            if importlib.util.find_spec("liger_kernel"):
                gather = "LigerEmbeddingFunction"
                runs["Liger"] = lambda idx=idx: liger("experimental.embedding", gather)(wte, idx) + wpe[:T]
            moved = B * T * C * wte.element_size()
            case = f"{B * T} tokens x {C} {ids} {str(dtype)[6:]}"
            passes(bench, "embedding", case, runs, [wte, wpe], 2 * moved, moved + wte.nbytes)


def linear_cross_entropy(bench: Bench) -> None:
    V, C = (97, 32) if bench.smoke else (50257, 768)
    for N in (64,) if bench.smoke else (4096, 16384):
        bench.turn()
        hidden = torch.randn(N, C, dtype=torch.bfloat16, device=bench.device, requires_grad=True)
        weight = (torch.randn(V, C, device=bench.device) * 0.02).bfloat16().requires_grad_()
        targets = torch.randint(V, (N,), device=bench.device)

        def eager() -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).float(), targets)

        runs = {f"pygpt {name}": (lambda: ops.linear_cross_entropy(hidden, weight, targets)) for name in ours()}
        runs |= {"eager": eager, "torch.compile": compiled(eager)}
        if importlib.util.find_spec("liger_kernel"):
            fused = "LigerFusedLinearCrossEntropyFunction"
            runs["Liger"] = lambda: liger("fused_linear_cross_entropy", fused)(hidden, weight, targets)[0]
        for name, run in runs.items():
            both = lambda run=run: lambda: torch.autograd.grad(run(), [hidden, weight])  # noqa: E731
            bench.row("linear_cross_entropy both", f"{N} tokens", name, both, "TFLOP/s", 6 * N * C * V, memory=True)


def gelu(bench: Bench) -> None:
    for C, rows in ((768, 32768), (1600, 16384), (3072, 16384), (4096, 8192), (12288, 4096)):
        bench.turn()
        rows = 8 if bench.smoke else rows
        x = torch.randn(rows, C, dtype=torch.bfloat16, device=bench.device, requires_grad=True)
        bias = torch.randn(C, dtype=torch.bfloat16, device=bench.device, requires_grad=True)
        runs: dict[str, Call] = {f"pygpt {name}": (lambda: ops.gelu(x, bias)) for name in ours()}
        runs["eager"] = lambda: F.gelu(x + bias, approximate="tanh")
        runs["torch.compile"] = compiled(runs["eager"])
        passes(bench, "bias_gelu", f"{rows} x {C} bfloat16", runs, [x, bias], 2 * x.nbytes, 3 * x.nbytes)


def adamw(bench: Bench) -> None:
    """GPT-2 124M's parameters: what each setting must read and write once is its work."""
    size = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 97, "block_size": 16} if bench.smoke else {}
    shapes = [p.shape for p in GPT(GPTConfig(**size)).parameters()]
    for dtype in (torch.bfloat16, torch.float32):
        bench.turn()

        def parameters(dtype: torch.dtype = dtype) -> list[Tensor]:
            found = [torch.randn(shape, device=bench.device).to(dtype).requires_grad_() for shape in shapes]
            for p in found:
                p.grad = torch.randn_like(p)
            return found

        # Gradient read; float32 weight, or 16-bit weight and residual, mean and square read and written.
        each = dtype.itemsize + 24
        work = each * sum(shape.numel() for shape in shapes)
        runs: dict[str, Callable[[], Call]] = {
            f"pygpt {name}": lambda: AdamW(parameters(), lr=1e-3, weight_decay=0.1).step
            for name in dict.fromkeys([*ours(), "eager"])
        }
        if dtype == torch.float32:
            runs["torch fused"] = lambda: torch.optim.AdamW(parameters(), lr=1e-3, weight_decay=0.1, fused=True).step
        for name, make in runs.items():
            case = f"124M {str(dtype)[6:]}{' with float32 masters' if dtype == torch.bfloat16 else ''}"
            bench.row("adamw", case, name, make, "GB/s", work)


# --- GPT-2 124M --------------------------------------------------------------------------------------------------


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, loss: Callable[[], Tensor]) -> Call:
    """Without an optimizer: forward and backward alone."""

    def step() -> None:
        loss().backward()
        if optimizer is None:
            model.zero_grad(set_to_none=True)
            return
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gpt2(bench: Bench) -> None:
    gpt2_rows(bench, "training step", *((2, 16) if bench.smoke else (16, 1024)))
    gpt2_rows(bench, "forward and backward", *((1, 8) if bench.smoke else (1, 256)))


def gpt2_rows(bench: Bench, what: str, B: int, T: int) -> None:
    bench.turn()
    trains = what == "training step"
    size = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 97, "block_size": 16} if bench.smoke else {}
    V = size.get("vocab_size", 50257)
    idx, targets = torch.randint(V, (2, B, T), device=bench.device)
    kind = bench.device.type

    def pygpt_step(compile_it: bool) -> Call:
        model = GPT(GPTConfig(**size)).to(bench.device, torch.bfloat16)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), kind) if trains else None
        forward = torch.compile(model) if compile_it else model
        return training_step(model, optimizer, lambda: forward(idx, targets)[1])

    def nanogpt_step(compile_it: bool) -> Call:
        baseline = importlib.import_module("pygpt.bench.baseline")
        model = baseline.GPT(baseline.GPTConfig(**size)).to(bench.device)
        options = {"lr": 6e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
        optimizer = torch.optim.AdamW(model.parameters(), **options) if trains else None
        forward = torch.compile(model) if compile_it else model

        def loss() -> Tensor:
            with torch.autocast(kind, torch.bfloat16):
                return forward(idx, targets)[1]

        return training_step(model, optimizer, loss)

    def transformers_step() -> Call:
        module = importlib.import_module("transformers")
        names = {
            "n_layer": "n_layer",
            "n_head": "n_head",
            "n_embd": "n_embd",
            "vocab_size": "vocab_size",
            "block_size": "n_positions",
        }
        config = module.GPT2Config(
            **{names[k]: v for k, v in size.items()}, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        model = module.GPT2LMHeadModel(config).to(bench.device, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, fused=True) if trains else None
        return training_step(model, optimizer, lambda: model(idx, labels=idx).loss)

    runs: dict[str, Callable[[], Call]] = {}
    for name in ("", *ours()):  # left alone first: the ops that measured fastest
        for compile_it in (False, True):
            step = lambda c=compile_it: pygpt_step(c)  # noqa: E731
            runs[f"{f'pygpt {name}'.strip()}{', torch.compile' if compile_it else ''}"] = step
    runs["nanoGPT eager (SDPA, autocast)"] = lambda: nanogpt_step(False)
    runs["nanoGPT torch.compile (SDPA, autocast)"] = lambda: nanogpt_step(True)
    runs["transformers"] = transformers_step
    for name, make in runs.items():
        bench.row(f"GPT-2 124M {what}", f"B {B}, T {T}, bf16", name, make, "tokens/s", B * T)


# --- running them -------------------------------------------------------------------------------------------------


SECTIONS = (copy, gpt2, attention, linear_cross_entropy, layer_norm, embedding, adamw, gelu)


def measure(bench: Bench, only: list[str]) -> None:
    """The work of the process that measures: every section, from row number bench.skip on."""
    torch.manual_seed(0)
    torch._functorch.config.donated_buffer = False  # compiled backward passes may run again on the graph that they have
    failed = []
    for bench.compiled, section in itertools.product((False, True), SECTIONS):
        if section is not copy and only and section.__name__ not in only:
            continue
        try:
            section(bench)
        except Exception:  # the other sections' figures are worth having; the exit status tells
            failed.append(section.__name__)
            traceback.print_exc()
            if not bench.alive():
                break
    bench.put({"failed": failed})


def supervise(options: argparse.Namespace, about: dict[str, str]) -> list[str]:
    """Starts processes that measure until all rows are there, writes what there is after each; sections that failed."""
    end = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.touch()
        while True:
            command = [sys.executable, __file__, "--rows", str(file), "--skip", str(len(rows))]
            command += ["--seconds", str(end - time.monotonic()), *(["--smoke"] if options.smoke else [])]
            process = subprocess.Popen([*command, "--only", *options.only])
            before = len(rows)
            while process.poll() is None:
                time.sleep(0.2)
                if len(read(file)[0]) > len(rows) and not options.smoke:
                    rows = read(file)[0]
                    write(rows, about, options.out)
            rows, failed = read(file)
            if not options.smoke:
                write(rows, about, options.out)
            if failed is None and len(rows) > before:
                print(
                    f"bench/gpu.py: the process ended with status {process.returncode}; a new one goes on", flush=True
                )
                continue
            if options.smoke:
                print(markdown(rows, about))
            return ["the process that measures did not start"] if failed is None else failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="every line once, tiny, on any device; writes nothing")
    parser.add_argument("--only", nargs="*", default=[], help=f"of {', '.join(s.__name__ for s in SECTIONS[1:])}")
    parser.add_argument(
        "--seconds", type=float, default=270.0, help="budget; what is left over is listed as not measured"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.only) - {section.__name__ for section in SECTIONS}
    if unknown:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")
    if options.rows:
        measure(Bench(options.smoke, options.seconds, options.rows, options.skip), options.only)
        return
    if not torch.cuda.is_available() and not options.smoke:
        sys.exit("bench/gpu.py: no CUDA device here; nothing was measured")
    failed = supervise(options, versions(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if failed:
        sys.exit(f"bench/gpu.py: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
