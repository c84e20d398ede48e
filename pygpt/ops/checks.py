"""Checks that every op shares. Each raises an error that names the op and the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from pygpt.errors import InputError, InputTypeError


def check_floating(op: str, x: Tensor, **others: Tensor | None) -> None:
    """x is floating point, and each other tensor has x's dtype or float32."""
    dtype = x.dtype  # read once: a small call notices what it asks of tensors
    if not dtype.is_floating_point:
        raise InputTypeError(f"{op}: expected a floating-point tensor, got {dtype}")
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype not in (dtype, torch.float32):
            raise InputTypeError(f"{op}: {name} is {tensor.dtype}; it must be {dtype} like the input, or float32")


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every other tensor is on x's device."""
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise InputError(f"{op}: {name} is on {tensor.device} but the input is on {device}; move one of them")
