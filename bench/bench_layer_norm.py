"""layer_norm against F.layer_norm, and add_layer_norm against an addition and F.layer_norm."""

from __future__ import annotations

from harness import bench_of

bench_layer_norm = bench_of("layer_norm")
bench_add_layer_norm = bench_of("add_layer_norm")
