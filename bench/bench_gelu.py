"""gelu against F.gelu."""

from __future__ import annotations

from harness import make_bench

bench_gelu = make_bench("gelu")
