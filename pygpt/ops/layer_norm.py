"""LayerNorm over the last dimension, alone and fused with the residual addition before it (Ba et al., 2016).

`add_layer_norm` exists because a transformer block adds and normalises at the same place: fused, the sum is written once
and read once. Statistics are float32 whatever the dtype of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError
from pygpt.ops import backends
from pygpt.ops.autograd import differentiable
from pygpt.ops.checks import check_device, check_floating

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (*KERNEL_DTYPES, torch.float16)
# Elements of fewer than which torch's own op answers on the CPU.
SMALL = {torch.float32: backends.SMALL_IN_FLOAT32, torch.bfloat16: backends.SMALL}
backends.register("layer_norm", cpp=KERNEL_DTYPES, cuda=GPU_DTYPES)
backends.register("add_layer_norm", cpp=KERNEL_DTYPES, cuda=GPU_DTYPES)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Plain PyTorch, differentiable, any dtype and device."""
    if weight.dtype == x.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)  # autocast makes it float32
    # Weights of higher precision than x: compute in theirs, as the kernels do, and round once.
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, differentiable, any dtype and device."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension of x, then scale by `weight` and shift by `bias`.

    x: (..., C), floating point. weight: (C,), and bias: (C,) or None, in x's dtype or float32. Returns (..., C) in x's
    dtype. Raises InputError (a ValueError) for shapes and devices, InputTypeError (a TypeError) for dtypes. Fewer than
    65,536 elements of bfloat16 or 262,144 of float32 on the CPU, or 4 million on a GPU, go to torch's own layer_norm unless
    a backend is forced.
    """
    if backends.automatic_on_cpu(x, SMALL.get(x.dtype, 0)) and weight.dim() == 1:
        try:
            return torch.layer_norm(x, weight.shape, weight, bias, eps)
        except (
            RuntimeError,
            TypeError,
        ):  # the checks below name what was wrong; what they let pass is for the reference
            pass
    _check("layer_norm", x, weight, bias)
    if backends.is_small_on_gpu(x) or backends.choose("layer_norm", x) == "eager":
        return layer_norm_reference(x, weight, bias, eps)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual) and the sum itself, in one pass.

    x, residual: (..., C), the same shape; different dtypes are promoted as by addition. weight, bias: as in `layer_norm`.
    Returns (normed, x + residual), both (..., C). Small inputs go to torch, as in `layer_norm`, but without gradients
    fewer than 65,536 elements alone.
    """
    small = SMALL.get(x.dtype, 0) if torch.is_grad_enabled() else backends.SMALL
    if backends.automatic_on_cpu(x, small) and x.shape == residual.shape and weight.dim() == 1:
        try:
            return torch.layer_norm(total := x + residual, weight.shape, weight, bias, eps), total
        except (RuntimeError, TypeError):
            pass
    if x.shape != residual.shape:
        raise InputError(
            f"add_layer_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} must have the same shape"
        )
    check_device("add_layer_norm", x, residual=residual)
    if x.dtype != residual.dtype:  # under autocast a branch is bfloat16 and the residual stream float32
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    _check("add_layer_norm", x, weight, bias)
    if backends.is_small_on_gpu(x) or backends.choose("add_layer_norm", x) == "eager":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    out = _add_layer_norm(x, residual, weight, bias, eps)
    return out[0], out[1]


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise InputError(
            f"{op}: weight must be (C,) for x (..., C), got weight {tuple(weight.shape)} and x {tuple(x.shape)}"
        )
    if x.shape[-1] == 0:
        raise InputError(f"{op}: x {tuple(x.shape)} has an empty last dimension; there is nothing to normalise")
    if bias is not None and bias.shape != weight.shape:
        raise InputError(f"{op}: bias {tuple(bias.shape)} must have weight's shape {tuple(weight.shape)}")
    check_floating(op, x, weight=weight, bias=bias)
    check_device(op, x, weight=weight, bias=bias)


# --- fake functions and autograd formulas of the compiled operators ------------------------------------------------


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(_rows(x), dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats, torch.empty_like(stats)


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, torch.empty_like(weight), weight.new_empty(weight.shape[0] if has_bias else 0)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_mean, grad_rstd):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    grads = torch.ops.pygpt.layer_norm_backward.default(grad, x, weight, mean, rstd, ctx.has_bias)
    return grads[0], grads[1], grads[2] if ctx.has_bias else None, None


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, weight, bias, eps)
    return y, torch.empty_like(y), mean, rstd


def _add_backward_fake(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward_fake(grad, total, weight, mean, rstd, has_bias)


def _add_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, weight, bias, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, grad, grad_sum, grad_mean, grad_rstd):  # type: ignore[no-untyped-def]
    total, weight, mean, rstd = ctx.saved_tensors
    grad, grad_sum = (torch.zeros_like(total) if g is None else g for g in (grad, grad_sum))
    grads = torch.ops.pygpt.add_layer_norm_backward.default(grad, grad_sum, total, weight, mean, rstd, ctx.has_bias)
    return grads[0], grads[0], grads[1], grads[2] if ctx.has_bias else None, None


if backends.extension is not None:
    torch.library.register_fake("pygpt::layer_norm_backward", _backward_fake)
    torch.library.register_fake("pygpt::add_layer_norm_backward", _add_backward_fake)
    _layer_norm = differentiable("layer_norm_forward", _forward_fake, _setup, _backward)
    _add_layer_norm = differentiable("add_layer_norm_forward", _add_forward_fake, _add_setup, _add_backward)
