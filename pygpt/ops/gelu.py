"""GELU with the tanh approximation, as GPT-2 has it (Hendrycks & Gimpel, 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.ops import backends
from pygpt.ops.autograd import differentiable
from pygpt.ops.checks import check_floating

backends.register("gelu", cpp=(torch.float32, torch.bfloat16))


def gelu_reference(x: Tensor) -> Tensor:
    """Plain PyTorch, differentiable, any dtype and device."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), elementwise.

    x: any shape, floating point. Returns the same shape and dtype. Raises InputTypeError (a TypeError) for other dtypes.
    """
    check_floating("gelu", x)
    if backends.choose("gelu", x) == "eager":
        return gelu_reference(x)
    return _gelu(x)


# --- fake functions and autograd formula of the compiled operators ---------------------------------------------------


def _forward_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return torch.ops.pygpt.gelu_backward.default(grad, *ctx.saved_tensors)


if backends.extension is not None:
    torch.library.register_fake("pygpt::gelu_backward", _backward_fake)
    _gelu = differentiable("gelu_forward", _forward_fake, _setup, _backward)
