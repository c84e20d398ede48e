"""What every op's test shares: the tolerance table and the comparison with a float64 reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# Largest error allowed, relative to |reference| + its largest magnitude: a few roundings of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_close(
    actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype | None = None, what: str = "", floor: float = 1e-3
) -> None:
    """Elementwise |actual - reference| <= tolerance * (|reference| + max |reference|); NaN and wrong shapes fail.

    The maximum counts as at least `floor`, for results that are zero in real arithmetic.
    """
    assert actual.shape == reference.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(reference.shape)}"
    if actual.numel() == 0:
        return
    reference = reference.detach().double()
    error = (actual.detach().double() - reference).abs()
    largest = reference.abs().max().clamp(min=floor)
    allowed = TOLERANCE[dtype or actual.dtype] * (reference.abs() + largest)
    assert (error <= allowed).all(), f"{what}: error {error.max().item():.3g} against values up to {largest.item():.3g}"


@contextlib.contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What an operator leaves out of its results is NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# The shapes that every column's tests go over, beside those that their own tiles suggest: sizes 0 and 1, primes, and one
# more or less than a tile.
LAYER_NORM_SHAPES = [
    (1, 1), (3, 1), (2, 5, 7), (4, 16), (5, 17), (2, 3, 64), (1, 768), (33, 768), (700, 40), (0, 8), (2, 0, 8)
]  # fmt: skip
EMBEDDING_SHAPES = [  # B, T, V, C
    (1, 1, 1, 1), (2, 3, 5, 1), (3, 7, 11, 17), (2, 16, 65, 64), (1, 31, 300, 130), (2, 33, 50, 768), (0, 3, 5, 4),
    (2, 0, 5, 4), (2, 3, 5, 0),
]  # fmt: skip
GELU_SHAPES = [(), (0,), (1,), (3, 5, 7), (16,), (2, 17), (300, 401)]
CROSS_ENTROPY_SHAPES = [(1, 1, 1), (1, 8, 50), (37, 16, 101), (64, 32, 7)]  # N, C, V
VOCABULARIES = [1, 4, 9, 15, 16, 17, 65, 1023, 1024, 1025, 5001]
ATTENTION_SHAPES = [  # B, T, S, H, D
    (1, 1, 1, 1, 1), (2, 64, 64, 3, 64), (1, 65, 65, 2, 32), (1, 127, 127, 1, 128), (1, 130, 130, 1, 256),
    (2, 97, 97, 2, 7), (1, 67, 131, 2, 48), (2, 5, 70, 2, 33), (1, 1, 300, 2, 64), (2, 4, 513, 1, 40), (1, 3, 3, 1, 80),
    (1, 200, 264, 1, 16), (1, 1, 250, 20, 64), (2, 4, 600, 5, 256), (1, 2, 200, 7, 33),
]  # fmt: skip

# Rows of packed documents by their lengths: all rows of a case are as long. Kernels work on tiles of 16 to 128 tokens, so
# borders lie on them, beside them and inside. Documents of one token are also what padding before a prompt is.
DOCUMENTS = {
    "one": [[70]],
    "tokens alone": [[1] * 67],
    "odd": [[1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29], [2, 127, 1]],
    "borders of tiles": [[64, 64, 2], [63, 1, 66], [65, 63, 2], [32, 48, 16, 34]],
    "longer than a tile": [[10, 150, 41], [200, 1]],
    "padded prompts": [[1] * 90 + [10], [1] * 3 + [97], [100]],
}
# Of those, how many of the last tokens are queries where the others are in a cache.
DECODED = [
    ("padded prompts", 1),
    ("padded prompts", 5),
    ("odd", 2),
    ("longer than a tile", 4),
    ("longer than a tile", 70),
]
DOCUMENT_CASES = [(name, sum(DOCUMENTS[name][0])) for name in DOCUMENTS] + DECODED


def document_starts(rows: list[list[int]], queries: int | None = None) -> torch.Tensor:
    """int32 (B, queries): where in its row the document of each of the last tokens begins."""
    starts = []
    for lengths in rows:
        ends = torch.tensor(lengths).cumsum(0)
        starts.append(torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths)))
    whole = torch.stack(starts).int()
    return whole[:, whole.shape[1] - (whole.shape[1] if queries is None else queries) :]


def adamw_shapes(block: int) -> list[tuple[int, ...]]:
    """Tensors for a kernel that does `block` elements at a time."""
    return [(3, 5), (), (0,), (block - 1,), (block,), (2, block), (0, 4), (block + 1,), (1,)]


def cross_entropy_rows_case(
    rows_: Callable[..., torch.Tensor], V: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Every length of a tail; a maximum in any block, at the target or not; masked, equal and huge logits; ignored rows."""
    generator = torch.Generator().manual_seed(V)
    logits = (torch.randn(9, V, generator=generator) * 5).to(dtype)
    targets = torch.randint(V, (9,), generator=generator)
    logits[1] = 3.0
    logits[2] *= 1e30
    logits[3, : V // 2] = -torch.inf  # masked
    targets[3] = V - 1
    logits[4] = torch.arange(V).to(dtype) / 50  # every block brings a new maximum
    logits[5, targets[5]] = 200.0
    targets[[0, 7]] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    logits, targets = logits.to(device), targets.to(device)
    kept = logits.clone()
    losses = rows_(kept, targets, -100, None)
    assert torch.equal(kept, logits)
    assert_close(losses.cpu(), expected, torch.float32)
    assert torch.equal(losses, rows_(logits, targets, -100, torch.tensor(0.125, device=device)))
    assert_close(logits.cpu(), exact.grad / 8, dtype)
    assert not logits[[0, 7]].any()


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A random tensor that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    """A float64 leaf with the same values, for the reference."""
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


def kernels(call: Callable[[], Any]) -> set[str]:
    """The operators of ours that a call runs."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            names.add(function.name())
            return function(*arguments, **(keywords or {}))

    names: set[str] = set()
    with Recorder():
        call()
    return {name.removeprefix("pygpt::") for name in names if name.startswith("pygpt::")}
