"""linear_cross_entropy against F.linear and F.cross_entropy on all logits at once."""

from __future__ import annotations

from harness import bench_of

bench_linear_cross_entropy = bench_of("linear_cross_entropy")
