"""Gives a compiled operator what the LibTorch stable ABI cannot: its fake function and its autograd formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pygpt.errors import PygptError

EAGER = (
    'run the forward pass under pygpt.use_backend("eager"); attention needs torch.nn.attention.sdpa_kernel'
    "(torch.nn.attention.SDPBackend.MATH) there as well"
)


class _Refuse(torch.autograd.Function):
    """A gradient that depends on `inputs` and cannot be differentiated by them."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise PygptError(ctx.message)


def first_order(name: str, instead: str = EAGER) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an op's backward formula, of operators without a formula of their own: differentiating its results is an
    error that says what to do `instead`. The tensors that the results depend on must be saved for backward.

    torch's `once_differentiable` leaves a second derivative silently without these terms where the incoming gradient is a
    constant, as the one of a sum is."""
    message = f"{name} has no second derivative; for one, {instead}"

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def run(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():  # enabled: somebody asked for create_graph=True
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            inputs = [t for t in (*ctx.saved_tensors, *grads) if isinstance(t, Tensor) and t.requires_grad]
            if not inputs:
                return results
            if isinstance(results, Tensor):
                return _Refuse.apply(message, results, *inputs)
            return tuple(_Refuse.apply(message, r, *inputs) if isinstance(r, Tensor) else r for r in results)

        return run

    return decorate


def differentiable(
    name: str, fake: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Register `torch.ops.pygpt.<name>` with torch and return a function that calls it.

    fake, setup(ctx, inputs, output) and backward(ctx, *grads) are as in `torch.library.register_fake` and
    `register_autograd`, which serve direct users of the operator and torch.compile. The returned function does the same
    with a `torch.autograd.Function`: the generic formula costs several microseconds more in each call, as much as the
    whole arithmetic of a small layer.
    """
    backward = first_order(f"the compiled {name.removesuffix('_forward')}")(backward)
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
