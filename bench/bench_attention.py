"""Attention against F.scaled_dot_product_attention: causal_attention_qkvpacked, both from one projection to the next, and of a
token to a cache of keys and values."""

from __future__ import annotations

from harness import make_bench

bench_causal_attention = make_bench("causal_attention")
bench_causal_attention_decode = make_bench("causal_attention_decode")
