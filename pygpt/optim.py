"""AdamW with float32 master weights, gradient clipping and the learning-rate schedule.

    optimizer = build_optimizer(model, weight_decay=0.1, learning_rate=6e-4)
    loss.backward()
    clip_grad_norm(model.parameters(), 1.0)
    optimizer.step()

A bfloat16 weight has 8 bits of precision: most updates of training are smaller than half of its last bit and would be
rounded away. So a model in bfloat16 keeps its weights and gradients in bfloat16 and the optimizer float32 masters of the
weights (mixed-precision training, Micikevicius et al., 2018), to which the updates are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pygpt.errors import InputError, InputTypeError
from pygpt.ops.adamw import adamw_, global_norm, join, split_


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) for parameters in float32 (or float64), or in bfloat16 with float32 masters.

    State per parameter: `step`, `exp_avg` and `exp_avg_sq`, float32, and for bfloat16 parameters `residual`, int16: the bits
    by which the float32 master goes beyond the parameter. Interface and numbers, to rounding, are those of
    `torch.optim.AdamW(fused=True)`.

    A parameter that was changed between two steps (weights loaded, averaged, reset) keeps its new values: its master is
    always within half of the parameter's last bit. Raises InputError for settings out of range, InputTypeError for
    parameters or gradients it cannot update.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise InputError(f"{name} must be a finite number of at least 0, got {group[name]}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise InputError(f"betas must be in [0, 1), got {group['betas']}")
        for parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
                raise InputTypeError(
                    f"AdamW updates parameters in float32, float64 or bfloat16, got {parameter.dtype}: for training in "
                    f"float16 keep them in float32 and use torch.autocast"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_factor: Tensor | None = None) -> Any:
        """Update every parameter that has a gradient. A closure is called first, with gradients enabled; its result returned.

        grad_factor: float32 scalar by which all gradients are multiplied first, such as `clip_factor` gives: this clips
        them without a pass of its own. float32 gradients may be left multiplied.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group, grad_factor)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any], grad_factor: Tensor | None) -> None:
        for parameter in parameters:
            if parameter.grad is None or parameter.grad.layout != torch.strided:
                raise InputTypeError("AdamW takes dense gradients: build the embedding with sparse=False")
            self._prepare_state(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw_(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [s["residual"] if p.dtype == torch.bfloat16 else None for p, s in zip(parameters, states, strict=True)],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
            grad_factor=grad_factor,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        )

    def _prepare_state(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        low = parameter.dtype == torch.bfloat16
        if "step" not in state:
            dtype = torch.float32 if low else parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        if low and "residual" not in state:
            state["residual"] = torch.zeros_like(parameter, dtype=torch.int16)
            if "master" in state:  # a checkpoint of before masters were kept as residuals
                split_(state.pop("master"), parameter, state["residual"])

    def master(self, parameter: Tensor) -> Tensor:
        """A parameter in the precision that the optimizer keeps it in: float32 for bfloat16, else the parameter itself."""
        residual = self.state[parameter].get("residual") if parameter in self.state else None
        if parameter.dtype != torch.bfloat16:
            return parameter.detach()
        return parameter.detach().float() if residual is None else join(parameter, residual)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, here or in torch's AdamW. Unlike the base class, keeps the state of bfloat16
        parameters in float32. Raises InputError for a state of settings that are not implemented."""
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in state_dict["param_groups"]):
                raise InputError(f"the saved optimizer was made with {name}=True, which AdamW of pygpt does not have")
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        ours = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                tensor = torch.as_tensor(value, device=parameter.device)  # older torch kept steps as numbers
                wide = name == "step" or parameter.dtype == torch.bfloat16
                keep = tensor.dtype if tensor.dtype == torch.int16 else torch.float32 if wide else parameter.dtype
                self.state[parameter][name] = tensor.to(keep)


def build_optimizer(
    model: nn.Module,
    *,
    weight_decay: float = 0.1,
    learning_rate: float = 6e-4,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW with two parameter groups: matrices and embeddings decay, biases and LayerNorms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas, eps=eps)


@torch.no_grad()
def clip_grad_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint Euclidean norm is at most `max_norm`; 0 leaves them as they are.

    Returns the norm before, a float32 scalar (float64 for float64). As `torch.nn.utils.clip_grad_norm_`, but the norm of
    bfloat16 gradients is computed in float32 (there it is rounded to bfloat16, tensor by tensor). Raises InputError for a
    negative max_norm.
    """
    grads = _gradients(parameters)
    norm = global_norm(grads)
    factor = _factor(norm, max_norm)
    if grads and factor is not None:
        torch._foreach_mul_(grads, factor)
    return norm


@torch.no_grad()
def clip_factor(parameters: Tensor | Iterable[Tensor], max_norm: float) -> tuple[Tensor, Tensor | None]:
    """(norm, grad_factor): what `clip_grad_norm` returns and would multiply by, for `AdamW.step` to do it on the way.

    grad_factor is None where max_norm is 0. The gradients are left as they are.
    """
    norm = global_norm(_gradients(parameters))
    return norm, _factor(norm, max_norm)


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    each = [parameters] if isinstance(parameters, Tensor) else parameters
    return [parameter.grad for parameter in each if parameter.grad is not None]


def _factor(norm: Tensor, max_norm: float) -> Tensor | None:
    if not max_norm >= 0:
        raise InputError(f"max_norm must be 0 (no clipping) or more, got {max_norm}")
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else None


def cosine_with_warmup(step: int, *, peak: float, minimum: float, warmup: int, total: int) -> float:
    """Learning rate of update `step` (from 0): linear up to `peak`, then half a cosine down to `minimum` at step `total`.

    nanoGPT's schedule, from GPT-3's (Brown et al., 2020, appendix B); `minimum` from `total` on.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if step >= total:
        return minimum
    progress = (step - warmup) / (total - warmup)
    return minimum + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - minimum)
