"""linear of few rows, as in generation, and of many with its gradients, as in training, against F.linear."""

from __future__ import annotations

from harness import make_bench

bench_linear = make_bench("linear")
bench_linear_training = make_bench("linear_training")
