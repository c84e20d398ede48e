"""Text to token files (`prepare`), token files to batches (`load_tokens` and the samplers); labelled texts and
instructions."""

from pygpt.data.instructions import PackedBatches, PaddedBatches, read_instructions
from pygpt.data.labelled import LengthBuckets, read_labelled
from pygpt.data.preparation import PrepareConfig, PrepareSummary, prepare
from pygpt.data.samplers import RandomOffsets, SlidingWindows, sequential_windows
from pygpt.data.tokens import TokenFile, load_tokens

__all__ = [
    "LengthBuckets",
    "PackedBatches",
    "PaddedBatches",
    "PrepareConfig",
    "PrepareSummary",
    "RandomOffsets",
    "SlidingWindows",
    "TokenFile",
    "load_tokens",
    "prepare",
    "read_instructions",
    "read_labelled",
    "sequential_windows",
]
