"""AdamW, with float32 masters for bfloat16, against torch.optim.AdamW(fused=True) in float32."""

from __future__ import annotations

from harness import make_bench

bench_adamw = make_bench("adamw")
