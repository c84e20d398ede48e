"""A model's blocks for the few tokens of a step of generation, as one operator of the CPU.

It is their operators one after the other, without Python between them, in which the memory that the weights come from lies
idle (bench/LOG.md has the figures). For generation inside the model; users call the ops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pygpt.ops import backends
from pygpt.ops.attention import MAX_HEAD_DIM, check_documents
from pygpt.ops.linear import has_few_rows


def decodes_blocks(x: Tensor, head_dim: int) -> bool:
    """Whether `decode_blocks` takes x (B, T, C)."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and backends.choose("linear", x) == "cpp"
        and not backends.is_autocast(x)
        and has_few_rows(x)
        and head_dim <= MAX_HEAD_DIM
    )


def decode_blocks(
    x: Tensor,
    norms: list[Tensor],
    linears: list[Tensor],
    scales: list[Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    past: int,
    eps: float,
    document_start: Tensor | None = None,
) -> Tensor:
    """x (B, T, C) -> the same through all blocks and the last LayerNorm. Where `decodes_blocks` says so.

    norms: the weights (C,) of each block's LayerNorms and of the last one, then their biases, if any. linears: each block's
    contiguous weights of the projections to q, k and v (3C, C), from the heads (C, C), and of the MLP's (4C, C) and (C, 4C),
    then their biases, if any. scales: those of int8 weights, or []. k_cache, v_cache: (layers, rows, columns, H, D),
    which hold `past` tokens; columns past .. past + T become those of x. document_start: int32 (B, T), as in
    `causal_attention`.
    """
    if document_start is not None:
        check_documents("decode_blocks", document_start, x)
    return torch.ops.pygpt.decode_blocks.default(x, norms, linears, scales, k_cache, v_cache, past, eps, document_start)


if backends.extension is not None:
    torch.library.register_fake("pygpt::decode_blocks", lambda x, *others: x.new_empty(x.shape))
