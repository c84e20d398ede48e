"""Gives a compiled operator what the LibTorch stable ABI cannot: its fake function and its autograd formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    name: str, fake: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `torch.ops.pygpt.<name>` with torch and return a function that calls it.

    fake, setup(ctx, inputs, output) and backward(ctx, *grads) are as in `torch.library.register_fake` and
    `register_autograd`, which serve direct users of the operator and torch.compile. The returned function does the same
    with a `torch.autograd.Function`: the generic formula costs several microseconds more in each call, as much as the
    whole arithmetic of a small layer.
    """
    torch.library.register_fake(f"pygpt::{name}", fake)
    torch.library.register_autograd(f"pygpt::{name}", backward, setup_context=setup)
    op = getattr(torch.ops.pygpt, name).default
    below_autograd = torch._C._AutoDispatchBelowAutograd  # what register_autograd itself calls the operator under

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # type: ignore[no-untyped-def]
            with below_autograd():
                output = op(*inputs)
            setup(ctx, inputs, output)
            return output

    Formula.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*inputs)
        if torch.is_grad_enabled():
            for tensor in inputs:
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    return Formula.apply(*inputs)
        with below_autograd():
            return op(*inputs)

    return call
