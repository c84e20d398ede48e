"""causal_attention_qkvpacked against F.scaled_dot_product_attention, both from one projection to the next."""

from __future__ import annotations

from harness import make_bench

bench_causal_attention = make_bench("causal_attention")
