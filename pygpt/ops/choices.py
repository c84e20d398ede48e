"""What `auto` takes on a GPU: the only table of such choices, one line for each bench result it rests on.

A compiled or Triton kernel is preferred to the reference only where it measured faster on that chip; of the two CUDA, whose
calls cost the host a fraction of Triton's, unless Triton's took a good deal less in all. Lines come from runs of
bench/gpu.py on the chip itself; without a line `auto` runs the reference, and `use_backend` still reaches every kernel.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """`backend` is to answer `op` on values of 16 or 32 bits, on chips of this compute capability; `measured`: chip, figures
    and where they lie. An op's two widths have the same kernels: they are registered for an operator, not for a dtype."""

    op: str
    capability: tuple[int, int]
    bits: int
    backend: str
    measured: str


H200 = "NVIDIA H200, {}: bench/LOG.md, 2026-11-27, on an H200".format
MEASURED: tuple[Choice, ...] = (
    Choice(
        "causal_attention", (9, 0), 16, "cuda", H200("D 64 and 128, T 512 to 16,384, 1.07 to 1.84 times SDPA's flash")
    ),
    Choice("layer_norm", (9, 0), 16, "cuda", H200("C 768 to 4,096, 1.1 to 3.0 times eager, 12,288 1.0")),
    Choice("layer_norm", (9, 0), 32, "cuda", H200("C 1,024, 1.4 times eager")),
    Choice("add_layer_norm", (9, 0), 16, "cuda", H200("C 768 to 12,288, 1.1 to 2.8 times eager")),
    Choice("add_layer_norm", (9, 0), 32, "cuda", H200("C 1,024, 1.5 and 1.6 times eager")),
    Choice("embedding", (9, 0), 16, "cuda", H200("C 768 to 12,288, 1.2 to 3.4 times eager")),
    Choice("embedding", (9, 0), 32, "cuda", H200("C 768, 1.2 to 2.5 times eager")),
    Choice("gelu", (9, 0), 16, "cuda", H200("with a bias, forward and backward together 1.8 to 2.0 times eager")),
    Choice("linear_cross_entropy", (9, 0), 16, "triton", H200("4,096 and 16,384 tokens, 5.3 and 5.5 times eager")),
    Choice("adamw", (9, 0), 16, "triton", H200("GPT-2 124M, 27 times eager")),
    Choice("adamw", (9, 0), 32, "triton", H200("GPT-2 124M, 1.2 times eager")),
)


def preferred(op: str, capability: tuple[int, int], bits: int) -> tuple[str, ...]:
    """Backends to try for an op on a GPU, best first; `eager` is the last resort."""
    lines = [line.backend for line in MEASURED if (line.op, line.capability, line.bits) == (op, capability, bits)]
    return (*lines, "eager")
