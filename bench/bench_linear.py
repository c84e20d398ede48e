"""linear of few rows, as in generation, against F.linear."""

from __future__ import annotations

from harness import make_bench

bench_linear = make_bench("linear")
