"""Linear layers with weights of 8 bits, for generation: the time of a token is that of reading the weights.

A row of the weight is round(row / scale), scale being the row's largest magnitude over 127; activations keep their dtype,
and sums are float32. Such weight-only quantisation, a scale for each output, is LLM.int8()'s (Dettmers et al., 2022)
without its outliers in another precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pygpt.errors import InputError, InputTypeError
from pygpt.ops import backends
from pygpt.ops.checks import check_device
from pygpt.ops.linear import has_few_rows, has_vectors, linear

backends.register("linear_int8", cpp=(torch.float32, torch.bfloat16))


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K), floating point -> int8 (N, K) and the scale of each row, float32 (N,), whose product is nearest to it.

    Raises InputError for another shape and for weights that are not finite, InputTypeError for another dtype."""
    if weight.dim() != 2:
        raise InputError(f"quantize_int8: weight must be (N, K), got {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise InputTypeError(f"quantize_int8: weight must be floating-point, got {weight.dtype}")
    exact = weight.detach().float()
    largest = exact.abs().amax(1) if weight.shape[1] else exact.new_zeros(weight.shape[0])
    if not largest.isfinite().all():
        raise InputError("quantize_int8: weight holds values that are not finite")
    scale = (largest / 127).where(largest > 0, 1.0)
    return (exact / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def linear_int8_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch, any device; the product is rounded to x's dtype before it is scaled."""
    y = linear(x, weight.to(x.dtype)) * scale.to(x.dtype)
    return y if bias is None else y + bias


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ (weight * scale).T + bias for the results of `quantize_int8`, without gradients for weight and scale.

    x: (..., K), float32 or bfloat16 for the kernel, any floating point elsewhere. weight: int8 (N, K), scale: float32 (N,),
    bias: (N,) of x's dtype, or None. Returns (..., N). The kernel takes fewer than 16 rows (64 where `linear` computes bfloat16
    in float32), and with AVX2 alone any number; for more, and where gradients are wanted, the weights are converted to x's
    dtype and multiplied by `linear`. Under autocast x and bias are cast first. Raises InputError for shapes and devices,
    InputTypeError for dtypes.
    """
    if backends.is_autocast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            return linear_int8(x.to(dtype), weight, scale, None if bias is None else bias.to(dtype))
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or scale.shape != weight.shape[:1]:
        raise InputError(
            f"linear_int8: x {tuple(x.shape)}, weight {tuple(weight.shape)} and scale {tuple(scale.shape)} must be (..., K), "
            f"(N, K) and (N,)"
        )
    if weight.dtype != torch.int8 or scale.dtype != torch.float32 or not x.is_floating_point():
        raise InputTypeError(
            f"linear_int8: x ({x.dtype}), weight ({weight.dtype}) and scale ({scale.dtype}) must be floating-point, int8 and "
            f"float32"
        )
    if bias is not None and (bias.shape != scale.shape or bias.dtype != x.dtype):
        raise InputError(
            f"linear_int8: bias {tuple(bias.shape)}, {bias.dtype}, must be {tuple(scale.shape)}, {x.dtype}"
        )
    check_device("linear_int8", x, weight=weight, scale=scale, bias=bias)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    takes_rows = x.numel() > 0 if has_vectors(x) else has_few_rows(x)
    if backends.choose("linear_int8", x) == "eager" or with_grad or not takes_rows:
        return linear_int8_reference(x, weight, scale, bias)
    return torch.ops.pygpt.linear_int8.default(x, weight, scale, bias)


if backends.extension is not None:
    torch.library.register_fake(
        "pygpt::linear_int8", lambda x, weight, scale, bias: x.new_empty(*x.shape[:-1], weight.shape[0])
    )
