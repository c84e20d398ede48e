"""AdamW's update of many tensors at once (Loshchilov and Hutter, 2019), with float32 masters of bfloat16 weights.

A master is kept as two parts, so that nothing is stored twice: the weight is the bfloat16 next to it, ties away from zero, and
an int16 residual what the master's bits are beyond that. (Masters as the weights' further bits are an idea of several
bfloat16 optimizers since about 2020.) A step then moves 26 bytes a parameter, where float32 takes 28.

The reference is torch's own fused kernel. The compiled kernel, on CPUs, and the Triton kernel join and split the masters and
clip the gradients in the same pass over the memory, for all tensors at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pygpt.ops import backends

_SERVED = (torch.float32, torch.bfloat16)
backends.register("adamw", cpp=_SERVED)


def join(weight: Tensor, residual: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 residual, all of one shape."""
    upper = weight.detach().view(torch.int16).int() << 16
    bits = upper + residual
    # Only a zero that somebody wrote over a weight can change its sign here: it stays zero.
    return bits.where((upper ^ bits) >= 0, upper).view(torch.float32)


@torch.no_grad()
def split_(master: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Write a float32 master into a bfloat16 weight and its int16 residual."""
    bits = master.view(torch.int32).where(~master.isnan(), 0x7FC00000)  # rounded up, other NaNs may become numbers
    weight.view(torch.int16).copy_((bits + 0x8000) >> 16)
    residual.copy_(bits)  # its lower half


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_factor: Tensor | None = None,
) -> None:
    """Update weights, residuals, means and squares and count steps up, all in place, as `torch.optim.AdamW` does.

    residuals: int16 for bfloat16 weights, else None. steps: float32 scalars on the weights' device. grad_factor: float32
    scalar by which gradients are multiplied first; float32 ones may be left so.
    """
    lists = (weights, grads, residuals, means, squares, steps)
    groups: dict[Any, list[int]] = {}
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        groups.setdefault((weight.device, weight.dtype, grad.dtype), []).append(i)
    for (device, *_), indices in groups.items():
        chosen = backends.choose("adamw", weights[indices[0]])
        part = [[each for i in indices if (each := tensors[i]) is not None] for tensors in lists]
        factor = None if grad_factor is None else grad_factor.to(device, torch.float32)
        options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        if chosen == "triton":
            from pygpt.kernels.adamw import adamw_ as kernel  # imports Triton

            _in_order(part, functools.partial(kernel, betas=betas, grad_factor=factor, **options))
            continue
        options |= {"beta1": betas[0], "beta2": betas[1], "grad_factor": factor}
        if chosen == "cpp":
            _in_order(part, functools.partial(torch.ops.pygpt.adamw_.default, **options))
        else:
            _reference(part, **options)


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a float32 scalar: computed in float32, of float64 in float64."""
    if not grads:
        return torch.zeros(())
    if all(backends.choose("adamw", grad) == "cpp" and grad.dtype in _SERVED for grad in grads):
        return torch.ops.pygpt.grad_norm.default(list(grads))
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=dtype)))


def _in_order(lists: list[list[Tensor]], kernel: Callable[..., None]) -> None:
    """Calls a kernel that walks memory: tensors that are not contiguous take part as copies."""
    *sets, steps = lists
    each = enumerate(zip(*(tensors for tensors in sets if tensors), strict=True))
    scattered = [i for i, tensors in each if not all(map(Tensor.is_contiguous, tensors))]
    copies = [list(tensors) for tensors in sets]
    for tensors in copies:
        for i in scattered if tensors else ():
            tensors[i] = tensors[i].contiguous()
    kernel(*copies, steps)
    for at, (originals, tensors) in enumerate(zip(sets, copies, strict=True)):
        for i in scattered if tensors and at != 1 else ():  # all but the gradients
            if originals[i] is not tensors[i]:
                originals[i].copy_(tensors[i])
    torch.autograd.graph.increment_version(sets[0])  # torch does not see the kernel's writes


def _reference(lists: list[list[Tensor]], *, grad_factor: Tensor | None, **options: Any) -> None:
    weights, grads, residuals, means, squares, steps = lists
    masters = [join(*each) for each in zip(weights, residuals, strict=True)] if residuals else weights
    grads = [grad.to(master.dtype) for grad, master in zip(grads, masters, strict=True)]
    if grad_factor is not None:
        torch._foreach_mul_(grads, grad_factor)
    # torch's fused kernel walks memory: with strides that differ its result is silently wrong (seen in 2.13 on a CPU).
    strides_agree = all(
        len({x.stride() for x in each}) == 1 for each in zip(masters, grads, means, squares, strict=True)
    )
    adamw(masters, grads, means, squares, [], steps, fused=strides_agree, amsgrad=False, maximize=False, **options)
    for each in zip(masters, weights, residuals, strict=True) if residuals else ():
        split_(*each)


if backends.extension is not None:
    torch.library.register_fake("pygpt::adamw_", lambda *_, **__: None)
    torch.library.register_fake("pygpt::grad_norm", lambda grads: grads[0].new_empty((), dtype=torch.float32))
