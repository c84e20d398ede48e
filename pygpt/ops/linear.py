"""Linear layers: few rows by a kernel of ours, others through what is fastest of torch's own libraries.

Generation multiplies a row or a few with every weight, in the time that reading the weights takes; the kernel reads them at
the memory's pace, the libraries at half of it or two thirds. On x86 CPUs torch computes float32 products with MKL, which on
processors that are not Intel's reaches less than half of what oneDNN, in every torch as well, does on the same machine. So
there these products go through oneDNN. In bfloat16 F.linear goes through oneDNN itself, but copies the bias to all rows of
the result first; so do the larger of these products here, with the bias added on the way. Everywhere else this is
`F.linear` (bench/LOG.md has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.ops import backends
from pygpt.ops.autograd import first_order

SLICE_BYTES = 3 << 20  # of a float32 product that is added to another tensor
TILE, WIDE = 64, 4096  # of a product of more than 4,096 rows, those that fill no tile of 64 are computed apart
# Multiplications of a product below which a function of our own does not win back what it costs.
SMALL_PRODUCT = {torch.float32: 3 << 19, torch.bfloat16: 1 << 28}
MIN_ROWS = 16  # of a product for a library; what has fewer is a matter of memory bandwidth

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_IS_FASTER = ONEDNN and backends.extension is not None and backends.extension.prefers_onednn()
ONEDNN_ADDS_BIAS = ONEDNN and backends.extension is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
backends.register("linear", cpp=(torch.float32, torch.bfloat16))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `F.linear`: x (..., K), weight (N, K), bias (N,) or None -> (..., N). Its errors too.

    On the CPU a product of fewer than 1.5 million multiplications, in bfloat16 268 million, is F.linear itself, unless a
    backend is forced."""
    if (
        backends.choose("linear", x) == "eager"
        or x.dim() < 2
        or weight.dim() != 2
        or x.shape[-1] != weight.shape[1]
        or 0 in weight.shape
        or not x.dtype == weight.dtype == (weight if bias is None else bias).dtype
        or torch.is_autocast_enabled(x.device.type)
        or torch.compiler.is_compiling()  # the compiler chooses its own products
    ):
        return F.linear(x, weight, bias)
    with_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if 0 < x.numel() < MIN_ROWS * x.shape[-1]:
        few_rows = not with_grad and weight.is_contiguous() and weight.is_cpu
        if few_rows and (bias is None or (bias.is_cpu and bias.shape == weight.shape[:1])):
            return torch.ops.pygpt.linear_few_rows.default(x, weight, bias)
        return F.linear(x, weight, bias)
    faster = ONEDNN_IS_FASTER if x.dtype == torch.float32 else ONEDNN_ADDS_BIAS and bias is not None
    small = x.numel() * weight.shape[0] < SMALL_PRODUCT[x.dtype] and backends.automatic_on_cpu(x)
    # oneDNN takes the memory of a bias as it lies, whatever its strides are.
    plain = bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    if not faster or not plain or small or x.numel() == 0:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if with_grad else _onednn(x, weight, bias)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for matrices a (M, K) and b (N, K) of any strides, outside autograd."""
    return _onednn(a, b, None) if _by_onednn(a, b) else a @ b.t()


def add_matmul_tn_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (N, K) += a.T @ b for matrices a (M, N) and b (M, K) of any strides, outside autograd."""
    if _by_onednn(a, b):
        rows = max(MIN_ROWS, SLICE_BYTES // (out.shape[1] * out.itemsize))
        columns = b.t().contiguous()  # or oneDNN would copy it for every slice
        for part, a_t in zip(out.split(rows), a.t().split(rows), strict=True):
            part += _onednn(a_t, columns, None)  # it has no sum: the slice is added from the cache
        return
    # The odd rows of a vocabulary apart: they would take all of the product off oneDNN's fast path.
    apart = out.shape[0] > WIDE and out.is_cpu and not torch.compiler.is_compiling()
    whole = out.shape[0] // TILE * TILE if apart else out.shape[0]
    out[:whole].addmm_(a.t()[:whole], b)
    if whole < out.shape[0]:
        out[whole:].addmm_(a.t()[whole:], b)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        ONEDNN_IS_FASTER
        and not torch.compiler.is_compiling()  # before the shapes: a graph would be tied to what they are compared with
        and a.dtype == torch.float32
        and backends.choose("linear", a) != "eager"
        and a.shape[0] >= MIN_ROWS
        and 0 not in b.shape
        and 0 not in a.shape
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @first_order("the oneDNN linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (M, N), (M, K)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight if x.dtype != torch.float32 else _onednn(rows, weight.t(), None)).view_as(x)
        if ctx.needs_input_grad[1] and x.dtype != torch.float32:
            grad_weight = rows.t() @ x_rows
        elif ctx.needs_input_grad[1]:
            # (N, M) by (M, K). oneDNN copies its first operand where it is transposed: let that be the smaller one.
            if rows.shape[1] <= x_rows.shape[1]:
                grad_weight = _onednn(rows.t(), x_rows.t(), None)
            else:
                grad_weight = _onednn(x_rows.t(), rows.t(), None).t().contiguous()
        if ctx.needs_input_grad[2]:
            grad_bias = torch.ops.pygpt.column_sum.default(rows)
        return grad_x, grad_weight, grad_bias


if backends.extension is not None:
    torch.library.register_fake(
        "pygpt::linear_few_rows", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0])
    )
    torch.library.register_fake("pygpt::column_sum", lambda x: x.new_empty(x.shape[1]))
