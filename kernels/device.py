"""What the kernels' heuristics know about the device of a tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

# Tensors on no CUDA device (Triton's interpreter, compilation without a GPU) are treated as being on this one.
assumed_architecture = 90
assumed_multiprocessors = 2

# Triton 3.9 warns that contraction of a * b + c will stop being the default; these kernels want it.
FUSED = {"enable_fp_fusion": True}


@functools.cache
def _properties(index: int) -> tuple[int, int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count, properties.L2_cache_size


def architecture(x: Tensor) -> int:
    """Compute capability as one number: 80, 86, 89, 90, 100, ... An AMD GPU counts as 80, the plainest."""
    if torch.version.hip:
        return 80
    return _properties(x.get_device())[0] if x.is_cuda else assumed_architecture


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors x's device has."""
    return _properties(x.get_device())[1] if x.is_cuda else assumed_multiprocessors


def l2_bytes(x: Tensor) -> int:
    """Size of the second-level cache in bytes."""
    return _properties(x.get_device())[2] if x.is_cuda else 50 << 20


Tile = TypeVar("Tile")


def up_to(table: Iterable[tuple[float, Tile]], n: int) -> Tile:
    """Of a table of (largest n, configuration), ascending, the first configuration that n is not too large for."""
    return next(tile for largest, tile in table if n <= largest)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()
