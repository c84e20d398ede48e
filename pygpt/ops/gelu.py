"""GELU with the tanh approximation, as GPT-2 has it (Hendrycks & Gimpel, 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError
from pygpt.ops import backends
from pygpt.ops.autograd import differentiable
from pygpt.ops.checks import check_device, check_floating

# Elements of fewer than which a call of ours costs more than its kernel wins on the CPU: without and with gradients.
SMALL, SMALL_WITH_GRADIENT = 1 << 10, 1 << 13
backends.register("gelu", cpp=(torch.float32, torch.bfloat16), cuda=(torch.float32, torch.bfloat16, torch.float16))


def gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch, differentiable, any dtype and device."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), elementwise, where z is x, or x + bias.

    x: any shape, floating point. bias: (C,) for x (..., C), of x's dtype or float32; kernels on GPUs add it on the way, and
    sum its gradient there; without one, and with no backend forced, it is F.gelu there, as on the CPU for fewer than 1,024
    elements, or 8,192 with gradients. Returns x's shape and dtype. Raises InputTypeError (a TypeError) for other dtypes and
    InputError for another shape of bias.
    """
    check_floating("gelu", x, bias=bias)
    small = SMALL_WITH_GRADIENT if x.requires_grad and torch.is_grad_enabled() else SMALL
    if bias is None and backends.automatic_on_cpu(x, small) and x.is_contiguous():  # F.gelu keeps other strides
        return gelu_reference(x)
    if bias is None and x.is_cuda and backends.forced() is None:
        return gelu_reference(x)  # by itself F.gelu runs at the memory's pace on GPUs, and is called faster
    backend = backends.choose("gelu", x)
    if bias is not None:
        bias = _checked(x, bias)
        if backend in ("cuda", "triton"):
            return _bias_gelu(x, bias)
        x = x + bias
    return gelu_reference(x) if backend == "eager" else _gelu(x)


def _checked(x: Tensor, bias: Tensor) -> Tensor:
    check_device("gelu", x, bias=bias)
    if x.dim() == 0 or bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
        raise InputError(
            f"gelu: bias must be (C,) for x (..., C), but they are {tuple(bias.shape)} and {tuple(x.shape)}"
        )
    return bias.to(x.dtype)


# --- fake functions and autograd formula of the compiled operators ---------------------------------------------------


def _forward_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return torch.ops.pygpt.gelu_backward.default(grad, *ctx.saved_tensors)


def _bias_forward_fake(x: Tensor, bias: Tensor) -> Tensor:
    return _forward_fake(x)


def _bias_backward_fake(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _forward_fake(x), torch.empty_like(bias)


def _bias_backward(ctx, grad):  # type: ignore[no-untyped-def]
    return torch.ops.pygpt.bias_gelu_backward.default(grad, *ctx.saved_tensors)


if backends.extension is not None:
    torch.library.register_fake("pygpt::gelu_backward", _backward_fake)
    _gelu = differentiable("gelu_forward", _forward_fake, _setup, _backward)
    torch.library.register_fake("pygpt::bias_gelu_backward", _bias_backward_fake)
    _bias_gelu = differentiable("bias_gelu_forward", _bias_forward_fake, _setup, _bias_backward)
