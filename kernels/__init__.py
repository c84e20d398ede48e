"""Triton kernels, one op per file; the host functions have the names, arguments and results of csrc/schema.cpp.

They are usable by themselves (`pygpt.kernels.layer_norm.layer_norm_forward(x, ...)`) and answer the project's operators
on CUDA tensors once `serve` has run; pygpt/ops/backends.py calls it. Importing this package imports no Triton.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

# Op -> the module that has its kernels, and the operators of the namespace `pygpt` that these answer.
OPERATORS = {
    "embedding": ("embedding", ("embedding_forward", "embedding_backward", "embedding_backward_")),
    "layer_norm": ("layer_norm", ("layer_norm_forward", "layer_norm_backward")),
    "add_layer_norm": ("layer_norm", ("add_layer_norm_forward", "add_layer_norm_backward")),
    "gelu": ("gelu", ("gelu_forward", "gelu_backward", "bias_gelu_forward", "bias_gelu_backward")),
    "linear_cross_entropy": ("cross_entropy", ("cross_entropy_rows_",)),
    "causal_attention": (
        "attention",
        (
            "causal_attention_forward",
            "causal_attention_backward",
            "causal_attention_qkvpacked_forward",
            "causal_attention_qkvpacked_backward",
        ),
    ),
}

_library: torch.library.Library | None = None  # holds the registrations: they end with it


def _on_device_of_first_argument(kernel: Callable[..., Any]) -> Callable[..., Any]:
    # Triton launches on the current device, the dispatcher only promises that the tensors share one.
    @functools.wraps(kernel)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.get_device()):
            return kernel(first, *rest)

    return call


def serve(take: Mapping[str, bool] = MappingProxyType({})) -> None:
    """Let the kernels answer the operators on CUDA tensors that nothing else answers, and those of the ops that `take` says.

    Calling it again replaces the former choice. Raises ImportError where Triton is missing or broken.
    """
    global _library
    _library = None
    library = torch.library.Library("pygpt", "IMPL", "CUDA")
    for op, (module, names) in OPERATORS.items():
        kernels = importlib.import_module(f"pygpt.kernels.{module}")
        for name in names:
            if take.get(op) or not torch._C._dispatch_has_kernel_for_dispatch_key(f"pygpt::{name}", "CUDA"):
                library.impl(name, _on_device_of_first_argument(getattr(kernels, name)))
    _library = library
