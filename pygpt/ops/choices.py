"""What `auto` takes on a GPU: the only table of such choices, one line for each bench result it rests on.

A compiled or Triton kernel is preferred to the reference only where it measured faster on that chip. Lines come from
bench runs on the chip itself; without a line `auto` runs the reference, and `use_backend` still reaches every kernel.
"""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """`backend` was fastest for `op` on chips of this compute capability; `measured`: date, chip, figures."""

    op: str
    capability: tuple[int, int]
    backend: str
    measured: str


# Not measured: no GPU has run the benches yet, so there is no line.
MEASURED: tuple[Choice, ...] = ()


def preferred(op: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """Backends to try for an op on a GPU, best first; `eager` is always the last resort."""
    return (*(line.backend for line in MEASURED if (line.op, line.capability) == (op, capability)), "eager")
