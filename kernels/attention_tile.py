"""What the Triton kernels of causal_attention, forward and backward, share: tiles, products and dropout on the device; tables of
configurations and launch options on the host.

Dropout is counter-based: whether element (b, h, i, j) is kept depends on the seed and on its place alone, so that
every pass, tile shape and backend drops the same ones. See `kept`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pygpt.kernels.device import FUSED, architecture, l2_bytes, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Config(NamedTuple):
    queries: int  # rows of a tile
    keys: int  # columns of a tile: 16, 32, or a multiple of 64 (one dropout counter covers 64)
    warps: int
    stages: int  # blocks in flight
    registers: int | None = None  # most a thread may use, where fewer let one more program run beside this one


class Row(NamedTuple):
    """A line of the tables below: the first that fits is taken."""

    bits: int  # of a value: 16 or 32
    D: int  # head dimensions up to this
    T: int  # queries up to this
    arch: range  # compute capabilities
    dropout: bool | None  # None: with and without
    config: Config


MANY = 1 << 31
ANY, HOPPER, LATER = range(80, 1000), range(90, 100), range(100, 1000)


def choose(table: tuple[Row, ...], q: Tensor, dropout: bool) -> Config:
    """The configuration of `table` for queries q (B, T, H, D) on their device."""
    (_, T, _, D), bits, arch = q.shape, q.dtype.itemsize * 8, architecture(q)
    for row in table:
        fits = row.bits == bits and D <= row.D and T <= row.T and arch in row.arch
        if fits and row.dropout in (None, dropout):
            return row.config
    raise AssertionError(f"no configuration for heads of {D} {q.dtype}: pygpt.ops.causal_attention lets none through")


@triton.jit
def kept(seed_ptr, threshold, head, row, first_key, KEYS: tl.constexpr):
    """(rows, KEYS) booleans: which probabilities dropout keeps.

    Element (b, h, i, j) uses Philox4x32-10 (Salmon et al., 2011) with the seed as key and the counter
    ((j // 64) * 16 + j % 16, i, b * H + h, 0), of which it takes word (j // 16) % 4, and is kept if word >= threshold.
    """
    groups: tl.constexpr = (KEYS + 63) // 64
    counter = first_key // 64 * 16 + tl.arange(0, groups * 16)
    words = tl.philox(tl.load(seed_ptr), counter[None, :], row[:, None], head, 0)
    limit = threshold.to(tl.uint32)
    shape: tl.constexpr = [row.shape[0], groups, 16]
    a = tl.reshape((words[0] >= limit).to(tl.int8), shape)
    b = tl.reshape((words[1] >= limit).to(tl.int8), shape)
    c = tl.reshape((words[2] >= limit).to(tl.int8), shape)
    d = tl.reshape((words[3] >= limit).to(tl.int8), shape)
    if KEYS == 16:  # one of the four words
        word = first_key // 16 % 4
        ab, cd = tl.where(word == 1, b, a), tl.where(word == 3, d, c)
        together = tl.where(word >= 2, cd, ab)
    elif KEYS == 32:  # half a group: two of the four words
        second = first_key % 64 != 0
        halves = tl.join(tl.where(second, c, a), tl.where(second, d, b))
        together = tl.permute(halves, (0, 1, 3, 2))
    else:  # (row, group of 64, 16, low bit of the word, high bit) -> (row, group, high bit, low bit, 16)
        together = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 1, 4, 3, 2))
    return tl.reshape(together, [row.shape[0], KEYS]) != 0


@triton.jit
def place(sections, heads, blocks):
    """(head, n-th block to start) of this program: within a section of heads, all their first blocks come first."""
    program = tl.program_id(0)
    per_section = sections * blocks
    section = program // per_section
    width = tl.minimum(sections, heads - section * sections)
    within = program % per_section
    return section * sections + within % width, within // width


@triton.jit
def load_tile(matrix, first, column, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK x BLOCK_D values from (first, column) on of a matrix, (pointer, rows, stride), of D columns; zero outside."""
    pointer, rows, stride = matrix
    d = column + tl.arange(0, BLOCK_D)
    row = tl.arange(0, BLOCK)
    # 64 bits for the tile's start alone: offsets within a tile are small, and the same for every tile of a loop.
    at = pointer + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if MASKED:
        return tl.load(at, mask=(row < rows - first)[:, None] & (d < D)[None, :], other=0.0)
    if D % BLOCK_D != 0:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def first_column(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first of the head's columns that this program writes: heads wider than a tile go to several programs, which
    all write the same statistics."""
    if D <= BLOCK_D:
        return 0
    return tl.program_id(2) * BLOCK_D


@triton.jit
def dot_rows(
    a, b, a_matrix, b_matrix, a_first, b_first, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """a b' of two tiles; where these hold a part of the head's columns, over all of them, read again from the cache."""
    if D <= BLOCK_D:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    product = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    for column in range(0, D, BLOCK_D):
        a_part = load_tile(a_matrix, a_first, column, D, BLOCK_D, a.shape[0], True)
        b_part = load_tile(b_matrix, b_first, column, D, BLOCK_D, b.shape[0], True)
        product = tl.dot(a_part, tl.trans(b_part), product, input_precision=PRECISION)
    return product


@triton.jit
def first_key_of(document_ptr, row, T, shift):
    """The first key that a query sees, in range whatever was given; a row beyond the last reads the last one's."""
    start = tl.load(document_ptr + tl.minimum(row, T - 1))
    return tl.minimum(tl.maximum(start, 0), row + shift)


def unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def by_head(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """q, k and v, (B, T, H, D) each, of a packed projection (B, T, 3C)."""
    B, T, width = qkv.shape
    return qkv.view(B, T, 3, n_head, width // (3 * n_head)).unbind(2)


def padded(*tensors: Tensor) -> list[Tensor]:
    """With heads padded by zeros to a multiple of 16."""
    return [F.pad(x, (0, -x.shape[3] % 16)) for x in tensors]


def strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def heads_in_section(q: Tensor, k: Tensor) -> int:
    """Heads whose keys and values together take up at most a quarter of the second-level cache, to last beside all else."""
    S, D = k.shape[1], k.shape[3]
    return max(1, min(q.shape[0] * q.shape[2], l2_bytes(q) // 4 // max(1, 2 * S * D * k.element_size())))


def block_d(q: Tensor) -> int:
    """Columns of a tile: the whole head, but of wide float32 heads, of which no tile fits the registers, a part."""
    D, widest = q.shape[3], 64 if architecture(q) in LATER else 128
    return 64 if q.dtype == torch.float32 and widest < D else max(16, next_power_of_2(D))


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """(threshold as the bits of an int32, 1 / (1 - p))."""
    threshold = min(int(dropout_p * 2**32), 2**32 - 1)
    return (threshold if threshold < 2**31 else threshold - 2**32), (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


def shared_options(q: Tensor, tile: Config) -> dict[str, Any]:
    D = q.shape[3]
    options = dict(
        D=D, BLOCK_D=block_d(q), QUERIES=tile.queries, KEYS=tile.keys,
        PRECISION=("ieee" if torch.version.hip else "tf32x3") if q.dtype == torch.float32 else "tf32",  # good as float32
        num_warps=tile.warps, num_stages=tile.stages, **FUSED,
    )  # fmt: skip
    return options if tile.registers is None else options | {"maxnreg": tile.registers}
