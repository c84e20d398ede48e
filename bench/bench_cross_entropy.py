"""linear_cross_entropy against F.linear and F.cross_entropy on all logits at once."""

from __future__ import annotations

from harness import make_bench

bench_linear_cross_entropy = make_bench("linear_cross_entropy")
