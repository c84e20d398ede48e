"""embedding against F.embedding, with and without the position table."""

from __future__ import annotations

from harness import bench_of

bench_embedding = bench_of("embedding")
