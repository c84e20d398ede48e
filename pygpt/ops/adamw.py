"""AdamW's update of many tensors at once (Loshchilov and Hutter, 2019), with float32 masters of 16-bit weights.

The reference is torch's own fused kernel. The compiled kernel, on CPUs, and the Triton kernel do the conversions to and
from 16 bits and the clipping in the same pass over the memory, for all tensors at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pygpt.ops import backends

_SERVED = (torch.float32, torch.bfloat16)
backends.register("adamw", cpp=_SERVED)


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
        elif chosen == "cpp":
            _compiled(part, factor, beta1=betas[0], beta2=betas[1], **options)
        else:
            _reference(part, factor, beta1=betas[0], beta2=betas[1], **options)
        if chosen != "eager":
            torch.autograd.graph.increment_version(part[0])  # torch does not see the kernels' writes


def global_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a float32 scalar: computed in float32 whatever their dtypes."""
    if not grads:
        return torch.zeros(())
    if all(backends.choose("adamw", grad) == "cpp" and grad.dtype in _SERVED for grad in grads):
        return torch.ops.pygpt.grad_norm.default(list(grads))
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32)))


def _compiled(lists: list[list[Tensor]], grad_factor: Tensor | None, **options: float) -> None:
    """The kernel walks memory: tensors that are not contiguous take part as copies."""
    *sets, steps = (list(tensors) for tensors in lists)
    scattered = [i for i, each in enumerate(zip(*sets, strict=True)) if not all(x.is_contiguous() for x in each)]
    for tensors in sets:
        for i in scattered:
            tensors[i] = tensors[i].contiguous()
    for i in scattered:
        if lists[0][i] is lists[2][i]:
            sets[2][i] = sets[0][i]  # the copy of a float32 weight is its master
    torch.ops.pygpt.adamw_.default(*sets, steps, grad_factor, **options)
    for i in scattered:
        for j in (0, 2, 3, 4):  # all but the gradients
            lists[j][i].copy_(sets[j][i])


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


if backends.extension is not None:
    torch.library.register_fake("pygpt::adamw_", lambda *_, **__: None)
    torch.library.register_fake("pygpt::grad_norm", lambda grads: grads[0].new_empty((), dtype=torch.float32))
