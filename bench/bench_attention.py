"""causal_attention against F.scaled_dot_product_attention, on q, k, v that are views of one projection."""

from __future__ import annotations

from harness import make_bench

bench_causal_attention = make_bench("causal_attention")
