"""linear of few rows, as in generation, of a prompt, and of many with its gradients, as in training, against F.linear."""

from __future__ import annotations

from harness import make_bench

bench_linear = make_bench("linear")
bench_linear_prompt = make_bench("linear_prompt")
bench_linear_training = make_bench("linear_training")
