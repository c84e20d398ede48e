"""Linear layers: few rows by a kernel of ours, others through what is fastest of torch's own libraries.

Generation multiplies a row or a few with every weight, in the time that reading the weights takes; the kernel reads them at
the memory's pace, the libraries at half of it or two thirds. On x86 CPUs torch computes float32 products with MKL, which on
processors that are not Intel's reaches less than half of what oneDNN, in every torch as well, does on the same machine. So
there these products go through oneDNN. In bfloat16 F.linear goes through oneDNN itself, but copies the bias to all rows of
the result first; so do the larger of these products here, with the bias added on the way. On processors with AMX the larger
products of bfloat16 are a kernel of ours, as fast as the library where that is at its best and half as fast again where it
has to turn its operands round: gradients of weights. With AVX2 alone, where oneDNN and MKL each lose a third or more in some of
the layouts, all larger products are another kernel of ours, and up to 47 rows count as few. With AVX-512 but without
instructions for bfloat16 all of its products are computed in float32, which with the conversions takes a half to a tenth of
the time. Everywhere else this is `F.linear`; only logits of few rows in float32, those of `matmul_nt`, go through oneDNN
everywhere (bench/LOG.md has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.ops import backends
from pygpt.ops.autograd import first_order

SLICE_BYTES = 3 << 20  # of a float32 product that is added to another tensor, or of an operand converted to float32
TILE, WIDE = 64, 4096  # of a dimension of more than 4,096, what fills no tile of 64 is computed apart
# Of a float32 product with a vocabulary that oneDNN is faster at than MKL: logits, also for each row, and the least width.
MANY_LOGITS, LOGITS_PER_ROW, MIN_WIDTH = 4096, 32, 384
# Multiplications of a product below which a function of our own does not win back what it costs: where it is twice as fast
# as F.linear or more, and where it is a little faster.
SMALL_PRODUCT, SMALL_PRODUCT_OF_A_PEER = 3 << 19, 1 << 28
# Elements of a weight of float32 up to which the kernel for few rows does not win back what its call costs beyond F.linear's,
# and multiplications below which it does not either: one row's, in effect.
SMALL_WEIGHT, SMALL_FEW_ROWS = 1 << 16, {torch.float32: 1 << 17, torch.bfloat16: 1 << 15}
LARGE_WEIGHT = 1 << 19  # elements with which F.linear, in float32 with AVX2, is not fast whatever the rows
MAX_ROWS_OF_TILES, TILE_STEP = 32, 32  # of the kernel for few rows by AMX tiles, which sums in steps
MIN_ROWS = 16  # of a product for a library; what has fewer is a matter of memory bandwidth
MIN_ROWS_OF_VECTORS = 48  # of one for our kernel for AVX2, where the one for few rows can take them

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_BESIDE_MKL = ONEDNN and torch.backends.mkl.is_available()
ONEDNN_IS_FASTER = ONEDNN and backends.extension is not None and backends.extension.prefers_onednn()
ONEDNN_ADDS_BIAS = ONEDNN and backends.extension is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
MIN_ROWS_IN_FLOAT32 = 64  # of a product whose operands are to be converted for the library
backends.register("linear", cpp=(torch.float32, torch.bfloat16))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `F.linear`: x (..., K), weight (N, K), bias (N,) or None -> (..., N). Its errors too.

    On the CPU, unless a backend is forced, F.linear itself answers small products: of fewer than 1.5 million multiplications,
    and where it is fast of fewer than 268 million, in bfloat16 with instructions for it, and in float32 with AVX2 alone and a
    weight of fewer than 524,288 elements. Few rows without gradients are small where in float32 the weight has no more than
    65,536 elements, and below 131,072 multiplications (32,768 in bfloat16 with AVX2 alone)."""
    if _is_small(x, weight, bias):
        return F.linear(x, weight, bias)
    if (
        backends.choose("linear", x) == "eager"
        or x.dim() < 2
        or weight.dim() != 2
        or x.shape[-1] != weight.shape[1]
        or 0 in weight.shape
        or not x.dtype == weight.dtype == (weight if bias is None else bias).dtype
        or backends.is_autocast(x)
        or torch.compiler.is_compiling()  # the compiler chooses its own products
    ):
        return F.linear(x, weight, bias)
    few_rows = _takes_few_rows(x, weight, bias) and weight.is_cpu
    if few_rows and (bias is None or (bias.is_cpu and bias.shape == weight.shape[:1])):
        return torch.ops.pygpt.linear_few_rows.default(x, weight, bias)
    if x.numel() < MIN_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    ours = has_own_product(x) or (x.dtype == torch.bfloat16 and ONEDNN_ADDS_BIAS and bias is not None)
    # oneDNN takes the memory of a bias as it lies, whatever its strides are.
    plain = bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous())
    if not ours or not plain:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if _wants_grad(x, weight, bias) else _product(x, weight, bias)


def _is_small(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether F.linear multiplies this in less time than a function of our own needs around it: the first question of every
    call, so asked in the order of what the answers cost."""
    if not backends.automatic_on_cpu(x) or x.dim() < 2 or weight.dim() != 2:
        return False
    product = x.numel() * weight.shape[0]
    if product >= SMALL_PRODUCT and (product >= SMALL_PRODUCT_OF_A_PEER or not _has_fast_peer(x, weight)):
        return False
    # Rows beyond what the kernel for few takes at any level: so it need not be asked.
    if x.numel() >= MIN_ROWS_IN_FLOAT32 * x.shape[-1] or (x.dtype == torch.float32 and weight.numel() <= SMALL_WEIGHT):
        return True
    # In bfloat16 only measured with AVX2.
    if product < SMALL_FEW_ROWS.get(x.dtype, 0) and (x.dtype == torch.float32 or has_vectors(x)):
        return True
    return not _takes_few_rows(x, weight, bias)


def _wants_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _takes_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is for the kernel for few rows, as far as these tensors fit together."""
    return has_few_rows(x) and weight.is_contiguous() and not _wants_grad(x, weight, bias)


def _has_fast_peer(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear is nearly as fast as what else multiplies x."""
    if x.dtype == torch.float32:
        return weight.numel() < LARGE_WEIGHT and _has_vectors()
    return not (has_vectors(x) or in_float32(x))


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for matrices a (M, K) and b (N, K) of any strides, outside autograd. Its workspace is small even for large b.

    On a GPU the result's rows may have room between them."""
    if not _has_own_way(a, b):
        if _is_wide(a, b):
            return torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
        odd = a.is_cuda and (_whole_tiles(b.shape[0]), _whole_tiles(b.shape[1])) != tuple(b.shape)
        return _by_whole_tiles(a, b) if odd and not torch.compiler.is_compiling() else a @ b.t()
    if not in_float32(a):
        return _product(a, b)
    # Converting all of a vocabulary's weights would take more memory than the logits: by parts of the longer dimension.
    N, K = b.shape
    rows, columns = max(1, SLICE_BYTES // (4 * K)), max(1, SLICE_BYTES // (4 * N))
    if N >= K:
        wide, out = a.float(), a.new_empty(a.shape[0], N)
        for part, of_b in zip(out.split(rows, 1), b.split(rows), strict=True):
            part.copy_(_product(wide, of_b.float()))
        return out
    sums = a.new_zeros(a.shape[0], N, dtype=torch.float32)
    for of_a, of_b in zip(a.split(columns, 1), b.split(columns, 1), strict=True):
        sums += _product(of_a.float(), of_b.float())
    return sums.to(a.dtype)


def _is_wide(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b.T are the logits of so few rows in float32 on the CPU that oneDNN is faster than MKL: measured on an Intel
    processor for 16 to 256 rows of width 384 to 4,096 and 12,288 to 50,257 logits, 1.0 to 1.25 times."""
    M, K = a.shape
    return (
        ONEDNN_BESIDE_MKL
        and a.is_cpu
        and a.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and backends.choose("linear", a) != "eager"
        and b.shape[0] > max(MANY_LOGITS, LOGITS_PER_ROW * M)
        and M >= MIN_ROWS
        and K >= MIN_WIDTH
        and b.is_contiguous()
    )


def _whole_tiles(size: int) -> int:
    return size // TILE * TILE if size > WIDE else size


def _by_whole_tiles(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T where a vocabulary's odd size would take it off cuBLAS's fast path, which wants rows at multiples of 16 bytes
    and whole tiles: products with GPT-2's 50,257 took half of a training step on an H100 (bench/LOG.md)."""
    (N, K), M = b.shape, a.shape[0]
    k = _whole_tiles(K)
    out = a.new_empty(M, -(-N // TILE) * TILE)[:, :N]
    for part, of_b in zip(out.tensor_split([_whole_tiles(N)], 1), b.tensor_split([_whole_tiles(N)]), strict=True):
        if part.shape[1]:
            if k == K:
                torch.mm(a, of_b.t(), out=part)
            else:  # the small part first: its rounding is small too
                torch.mm(a[:, k:], of_b[:, k:].t(), out=part).addmm_(a[:, :k], of_b[:, :k].t())
    return out


def matmul_tn_(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (N, K) = a.T @ b, or with `add` += it, for matrices a (M, N) and b (M, K) of any strides, outside autograd."""
    if _has_own_way(a, b):
        if has_kernel(a):
            torch.ops.pygpt.matmul_.default(out, a.t(), b, add)
            return
        rows = max(MIN_ROWS, SLICE_BYTES // (4 * out.shape[1]))
        columns = b.t().float().contiguous()  # or oneDNN would copy it for every slice
        for part, a_t in zip(out.split(rows), a.t().split(rows), strict=True):
            product = _product(a_t.float(), columns)  # it has no sum: the slice is added from the cache
            part.add_(product) if add else part.copy_(product)
        return
    # The odd rows of a vocabulary apart: they would take all of the product off oneDNN's fast path, and cuBLAS's.
    whole = out.shape[0] if torch.compiler.is_compiling() else _whole_tiles(out.shape[0])
    out[:whole].addmm_(a.t()[:whole], b, beta=int(add))
    if whole < out.shape[0]:
        out[whole:].addmm_(a.t()[whole:], b, beta=int(add))


def has_few_rows(x: Tensor) -> bool:
    """Whether x has so few rows, but any, that the kernel's product with it is faster than a library's."""
    K = x.shape[-1]
    if has_tiles(x) and K % TILE_STEP == 0:
        return 0 < x.numel() <= MAX_ROWS_OF_TILES * K
    rows = MIN_ROWS_OF_VECTORS if has_vectors(x) else MIN_ROWS_IN_FLOAT32 if in_float32(x) else MIN_ROWS
    return 0 < x.numel() < rows * K


def in_float32(x: Tensor) -> bool:
    """Whether products of x, though it is bfloat16, are the library's of float32."""
    return (
        x.dtype == torch.bfloat16
        and backends.extension is not None
        and not backends.extension.multiplies_bf16()
        and not backends.extension.multiplies_by_vectors()
    )


def has_tiles(x: Tensor) -> bool:
    """Whether products of x go through our kernel for AMX."""
    return x.dtype == torch.bfloat16 and _has_tiles()


def _has_tiles() -> bool:
    return backends.extension is not None and bool(backends.extension.has_tiles())


def has_vectors(x: Tensor) -> bool:
    """Whether products of x go through our kernel for AVX2."""
    return x.dtype in (torch.float32, torch.bfloat16) and _has_vectors()


def _has_vectors() -> bool:
    return backends.extension is not None and bool(backends.extension.multiplies_by_vectors())


def has_kernel(x: Tensor) -> bool:
    """Whether products of x, of MIN_ROWS rows or more, go through a kernel of ours."""
    return has_tiles(x) or has_vectors(x)


_has_vectors._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as below
_has_tiles._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a compiler cannot trace into the extension


def has_own_product(x: Tensor) -> bool:
    """Whether products of x on the CPU, to which no bias is added, are not the library's as torch calls it."""
    return has_kernel(x) or (ONEDNN_IS_FASTER if x.dtype == torch.float32 else in_float32(x))


def _has_own_way(a: Tensor, b: Tensor) -> bool:
    """Whether a product is not the library's as torch calls it."""
    return (
        not torch.compiler.is_compiling()  # before the shapes: a graph would be tied to what they are compared with
        and backends.choose("linear", a) != "eager"
        and has_own_product(a)
        and a.shape[0] >= MIN_ROWS
        and 0 not in b.shape
        and 0 not in a.shape
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear outside autograd through what is fastest; x and weight of MIN_ROWS rows or more, bias contiguous."""
    if in_float32(x):
        return _product(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if has_kernel(x):
        rows = torch.ops.pygpt.matmul.default(x.reshape(-1, x.shape[-1]), weight.t(), bias)
        return rows.view(*x.shape[:-1], weight.shape[0])
    if ONEDNN_IS_FASTER if x.dtype == torch.float32 else ONEDNN_ADDS_BIAS and bias is not None:
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @first_order("linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (M, N), (M, K)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = torch.ops.pygpt.column_sum.default(rows)
        if in_float32(x):
            rows, x_rows, weight = rows.float(), x_rows.float(), weight.float()
        if ctx.needs_input_grad[0]:
            grad_x = _product(rows, weight.t()).to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            # (N, M) by (M, K). oneDNN copies its first operand where it is transposed: let that be the smaller one.
            if has_kernel(rows):
                grad_weight = torch.ops.pygpt.matmul.default(rows.t(), x_rows, None)
            elif rows.dtype != torch.float32 or not ONEDNN_IS_FASTER:
                grad_weight = rows.t() @ x_rows
            elif rows.shape[1] <= x_rows.shape[1]:
                grad_weight = _product(rows.t(), x_rows.t())
            else:
                grad_weight = _product(x_rows.t(), rows.t()).t().contiguous()
            grad_weight = grad_weight.to(x.dtype)
        return grad_x, grad_weight, grad_bias


if backends.extension is not None:
    torch.library.register_fake(
        "pygpt::linear_few_rows", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0])
    )
    torch.library.register_fake("pygpt::matmul", lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))
    torch.library.register_fake("pygpt::matmul_", lambda out, a, b, add: None)
    torch.library.register_fake("pygpt::column_sum", lambda x: x.new_empty(x.shape[1]))
