"""What every op's test shares: the tolerance table and the comparison with a float64 reference."""

from __future__ import annotations

import torch

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


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """A random tensor that requires grad."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def double(x: torch.Tensor | None) -> torch.Tensor | None:
    """A float64 leaf with the same values, for the reference."""
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)
