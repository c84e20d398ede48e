"""What `auto` takes on a GPU: the only table of such choices, one line for each bench result it rests on.

A compiled or Triton kernel is preferred to the reference only where it measured faster on that chip; of the two CUDA, whose
calls cost the host a fraction of Triton's, unless Triton's took a good deal less in all. Lines come from
bench runs on the chip itself (`python bench/choices.py` prints them from a result of bench/gpu.py); without a line
`auto` runs the reference, and `use_backend` still reaches every kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """`backend` is to answer `op` on values of 16 or 32 bits, on chips of this compute capability; `measured`: chip, figures
    and where they lie. up_to: the largest of the `sizes` that the line is for; none: all. The first line that holds counts."""

    op: str
    capability: tuple[int, int]
    bits: int
    backend: str
    measured: str
    up_to: Mapping[str, int] = {}


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


def preferred(
    op: str, capability: tuple[int, int], bits: int, sizes: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Backends to try for an op on a GPU, best first, for inputs of these sizes or of any; `eager` is the last resort."""
    lines = [
        line.backend
        for line in MEASURED
        if (line.op, line.capability, line.bits) == (op, capability, bits)
        and (sizes is None or all(sizes[name] <= largest for name, largest in line.up_to.items()))
    ]
    return tuple(dict.fromkeys([*lines, "eager"]))


def value_of(*inputs: Any) -> Tensor:
    """The first floating-point tensor of an operator's arguments."""
    return next(value for value in inputs if isinstance(value, Tensor) and value.is_floating_point())


def sizes(op: str, *inputs: Any) -> dict[str, int]:
    """What a line's `up_to` may name, from an operator's arguments, those of forward and backward alike: T (queries) and D
    (head dimension) of causal_attention, rows (or tokens) and C (last dimension) of the others."""
    first, x = inputs[0], value_of(*inputs)
    if op == "causal_attention" and x.dim() == 3:  # a packed projection; in backward it stands behind a gradient
        qkv = x if isinstance(inputs[1], int) else inputs[1]
        n_head = next(value for value in inputs if isinstance(value, int))
        return {"T": qkv.shape[1], "D": qkv.shape[2] // (3 * n_head)}
    if op == "causal_attention":
        return {"T": x.shape[1], "D": x.shape[3]}
    C = x.shape[-1] if x.dim() else 1
    return {"rows": first.numel() // max(C, 1) if first is x else first.numel(), "C": C}
