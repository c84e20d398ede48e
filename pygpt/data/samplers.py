"""Batches of inputs and targets from a row of tokens.

Every sampler is a pure function of (seed, step): batch 1,000 is the same whether or not batches 0 to 999 were drawn
before it, so a resumed run sees exactly the batches it would have seen. Random numbers are the raw output of NumPy's
Philox counter generator with (seed, step) as its key; NumPy keeps that stream the same across versions.

Tokens are anything NumPy can see as a 1-D integer array: a `TokenFile`, a memory map, an array, a list, a CPU tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pygpt.errors import InputError, InputTypeError

Batch = tuple[torch.Tensor, torch.Tensor]
IGNORED = -1  # a target that does not count in the loss


class RandomOffsets:
    """Windows that start anywhere, drawn independently: nanoGPT's way to sample.

    Args:
        tokens: (N,) integers, N > block_size.
        block_size: T, tokens in a window.
        batch_size: B, windows in a batch.
        seed: 0 to 2**64 - 1; another seed gives other windows.
    """

    def __init__(self, tokens: Any, block_size: int, batch_size: int, seed: int = 0) -> None:
        self.tokens = _checked_tokens(tokens, block_size)
        self.block_size = block_size
        self.batch_size = _positive("batch_size", batch_size)
        self.seed = _seed(seed)

    def batch(self, step: int) -> Batch:
        """x and y, (B, T) int64 each, y being x shifted by one token."""
        bits = _random_bits(self.seed, step, self.batch_size)
        offsets = bits % np.uint64(len(self.tokens) - self.block_size)
        return _windows(self.tokens, offsets.astype(np.int64), self.block_size)


class SlidingWindows:
    """Windows every `stride` tokens: each once per epoch, in order or shuffled anew for every epoch.

    As in the data loader of Raschka's "Build a Large Language Model (From Scratch)": block_size is its max_length.
    Iterating gives the first epoch, `epoch(n)` any other. Shuffling takes 16 bytes of memory for each window.

    Args:
        tokens: (N,) integers, N > block_size.
        block_size: T, tokens in a window.
        stride: tokens from the start of one window to the next; block_size for windows that do not overlap.
        batch_size: B, windows in a batch.
        seed: order of the windows; None keeps them in the order of the text.
        drop_last: leaves out an epoch's last batch where it has fewer than B windows.
    """

    def __init__(
        self,
        tokens: Any,
        block_size: int,
        stride: int,
        batch_size: int,
        seed: int | None = None,
        drop_last: bool = True,
    ) -> None:
        self.tokens = _checked_tokens(tokens, block_size)
        self.block_size = block_size
        self.stride = _positive("stride", stride)
        self.batch_size = _positive("batch_size", batch_size)
        self.seed = None if seed is None else _seed(seed)
        self.windows = len(range(0, len(self.tokens) - block_size, stride))
        self._length = self.windows // batch_size if drop_last else -(-self.windows // batch_size)
        if self._length == 0:
            raise InputError(
                f"The text gives {self.windows} windows, fewer than batch_size {batch_size}, and drop_last leaves "
                "incomplete batches out: choose a smaller batch_size, a smaller stride or drop_last=False"
            )
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._length

    def batch(self, step: int) -> Batch:
        """x and y, (B, T) int64 each, y being x shifted by one token; steps go on from one epoch into the next."""
        epoch, index = divmod(_step(step), self._length)
        first = index * self.batch_size
        last = min(first + self.batch_size, self.windows)
        order = np.arange(first, last) if self.seed is None else self._order(epoch)[first:last]
        return _windows(self.tokens, order * self.stride, self.block_size)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0."""
        return (self.batch(epoch * self._length + index) for index in range(self._length))

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            assert self.seed is not None
            self._epoch = epoch, np.argsort(_random_bits(self.seed, epoch, self.windows), kind="stable")
        return self._epoch[1]


def sequential_windows(tokens: Any, block_size: int, batch_size: int) -> Iterator[Batch]:
    """Every token but the first as a target exactly once, in order: for an evaluation over a whole text.

    Gives x and y, (B, T) int64; the last batch may have fewer rows. The last window is filled up with input 0 and
    target -1, which the model's loss ignores.
    """
    array = _checked_tokens(tokens, 1)
    _positive("block_size", block_size)
    _positive("batch_size", batch_size)
    return _sequential_windows(array, block_size, batch_size)


def _sequential_windows(tokens: npt.NDArray[Any], block_size: int, batch_size: int) -> Iterator[Batch]:
    targets = len(tokens) - 1
    for start in range(0, targets, block_size * batch_size):
        stop = min(start + block_size * batch_size, targets)
        rows = -(-(stop - start) // block_size)
        x = np.zeros(rows * block_size, np.int64)
        y = np.full(rows * block_size, IGNORED, np.int64)
        x[: stop - start] = tokens[start:stop]
        y[: stop - start] = tokens[start + 1 : stop + 1]
        yield torch.from_numpy(x).view(rows, block_size), torch.from_numpy(y).view(rows, block_size)


def _windows(tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], block_size: int) -> Batch:
    rows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())


def _random_bits(seed: int, index: int, size: int) -> npt.NDArray[np.uint64]:
    key = np.array([seed, _step(index)], np.uint64)
    return np.random.Philox(key=key).random_raw(size)


def _checked_tokens(tokens: Any, block_size: int) -> npt.NDArray[Any]:
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputTypeError(f"Tokens must be a 1-D array of integers, got {array.dtype} of shape {array.shape}")
    if len(array) <= _positive("block_size", block_size):
        raise InputError(
            f"The text has {len(array)} tokens; block_size {block_size} needs at least {block_size + 1}: "
            "choose a smaller block_size or more text"
        )
    return array


def _positive(name: str, value: int) -> int:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _seed(seed: int) -> int:
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return int(seed)


def _step(step: int) -> int:
    if not isinstance(step, (int, np.integer)) or not 0 <= step < 2**64:
        raise InputError(f"step must be an integer of at least 0, got {step!r}")
    return int(step)
