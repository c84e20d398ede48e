"""gelu against F.gelu."""

from __future__ import annotations

from harness import bench_of

bench_gelu = bench_of("gelu")
