"""AdamW's update of many tensors at once (Loshchilov and Hutter, 2019), with float32 masters of 16-bit weights.

By default it is torch's own fused kernel, on every device; the Triton kernel does the conversions to and from 16 bits and
the clipping in the same pass over the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pygpt.ops import backends

backends.register("adamw")  # torch's fused kernel is the reference


@torch.no_grad()
def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
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
    """Update weights, masters, means and squares and count steps up, all in place, as `torch.optim.AdamW` does.

    masters: the weights in float32 for weights of 16 bits, else the weights themselves. steps: float32 scalars on the
    weights' device. grad_factor: float32 scalar by which gradients are multiplied first; float32 ones may be left so.
    """
    lists = (weights, grads, masters, means, squares, steps)
    groups: dict[Any, list[int]] = {}
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        chosen = backends.choose("adamw", weight)
        kind = (weight.device, weight.dtype, grad.dtype) if chosen == "triton" else (weight.device,)
        groups.setdefault((chosen, *kind), []).append(i)
    for (chosen, *_), indices in groups.items():
        part = [[tensors[i] for i in indices] for tensors in lists]
        factor = None if grad_factor is None else grad_factor.to(part[0][0].device, torch.float32)
        options: dict[str, Any] = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        if chosen == "triton":
            from pygpt.kernels.adamw import adamw_ as kernel  # imports Triton

            kernel(*part, betas=betas, grad_factor=factor, **options)
            torch.autograd.graph.increment_version(part[0])  # torch does not see the kernel's writes
        else:
            _reference(part, factor, beta1=betas[0], beta2=betas[1], **options)


def _reference(lists: list[list[Tensor]], grad_factor: Tensor | None, **options: Any) -> None:
    weights, grads, masters, means, squares, steps = lists
    grads = [grad.to(master.dtype) for grad, master in zip(grads, masters, strict=True)]
    if grad_factor is not None:
        torch._foreach_mul_(grads, grad_factor)
    # torch's fused kernel walks memory: with strides that differ its result is silently wrong (seen in 2.13 on a CPU).
    strides_agree = all(
        len({x.stride() for x in each}) == 1 for each in zip(masters, grads, means, squares, strict=True)
    )
    adamw(masters, grads, means, squares, [], steps, fused=strides_agree, amsgrad=False, maximize=False, **options)
    for weight, master in zip(weights, masters, strict=True):
        if weight is not master:
            weight.copy_(master)
