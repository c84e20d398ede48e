"""layer_norm against F.layer_norm, and add_layer_norm against an addition and F.layer_norm."""

from __future__ import annotations

from harness import make_bench

bench_layer_norm = make_bench("layer_norm")
bench_add_layer_norm = make_bench("add_layer_norm")
