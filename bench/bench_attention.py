"""causal_attention against F.scaled_dot_product_attention, on q, k, v that are views of one projection."""

from __future__ import annotations

from harness import bench_of

bench_causal_attention = bench_of("causal_attention")
