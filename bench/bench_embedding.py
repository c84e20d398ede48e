"""embedding against F.embedding, with and without the position table."""

from __future__ import annotations

from harness import make_bench

bench_embedding = make_bench("embedding")
