"""Text to token files (`prepare`), token files to batches (`load_tokens` and the samplers)."""

from pygpt.data.preparation import PrepareConfig, PrepareSummary, prepare
from pygpt.data.samplers import RandomOffsets, SlidingWindows, sequential_windows
from pygpt.data.tokens import TokenFile, load_tokens

__all__ = [
    "PrepareConfig",
    "PrepareSummary",
    "RandomOffsets",
    "SlidingWindows",
    "TokenFile",
    "load_tokens",
    "prepare",
    "sequential_windows",
]
