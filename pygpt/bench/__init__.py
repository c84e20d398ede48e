"""Benches that come with the package: `pygpt bench`, or `bench(BenchConfig(quick=True))`."""

from pygpt.bench.command import BenchConfig, bench

__all__ = ["BenchConfig", "bench"]
