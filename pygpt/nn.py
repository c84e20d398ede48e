"""The modules of a GPT, built on pygpt.ops. Parameter names are GPT-2's.

Shapes: B sequences, T tokens, C hidden size, H heads, D = C // H, S tokens seen so far (S = T without a cache).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pygpt import ops
from pygpt.errors import InputError
from pygpt.ops.decode_blocks import decodes_blocks
from pygpt.ops.embedding import tied_embedding

if TYPE_CHECKING:
    from pygpt.model import GPTConfig


class Embedding(nn.Embedding):
    """A token table (V, C). With a position table, gathers and adds both in one pass."""

    def forward(
        self,
        idx: Tensor,
        positions: nn.Embedding | None = None,
        position_offset: int = 0,
        tied: list[Tensor] | None = None,
    ) -> Tensor:
        """idx (B, T) int64 -> (B, T, C). tied: see `tied_embedding`, whose table is appended."""
        position_table = None if positions is None else positions.weight
        if tied is None:
            return ops.embedding(idx, self.weight, position_table, position_offset)
        x, table = tied_embedding(idx, self.weight, position_table, position_offset)
        tied.append(table)
        return x


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, with the residual addition before it fused in."""

    def __init__(self, size: int, bias: bool = True, eps: float = 1e-5) -> None:
        super().__init__(size, eps=eps, bias=bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x (..., C) -> layer_norm(x + residual) and the sum x + residual, which is the new residual stream."""
        if residual is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps), x
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """A linear layer (weight (N, K), x (..., K) -> (..., N))."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer for generation, made from another one's weight: int8 (N, K), and float32 (N,) the scale of each row."""

    weight: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = ops.quantize_int8(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return ops.linear_int8(x, self.weight, self.scale, self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as this layer multiplies with it, (N, K)."""
        return (self.weight * self.scale[:, None]).to(dtype)


class KVCache:
    """Keys and values of the tokens seen so far, for generation: allocated once, filled as tokens arrive.

    It holds `capacity` tokens (by default block_size) of each of batch_size rows, which all end at the same column.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        columns = config.block_size if capacity is None else capacity
        shape = (config.n_layer, batch_size, columns, config.n_head, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens seen; the model adds to it after its last block

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def check_room(self, tokens: int) -> int:
        """The number of tokens once there are so many more. Raises InputError where they do not fit."""
        end = self.length + tokens
        if end > self.capacity:
            raise InputError(f"the KV cache holds {self.capacity} tokens; {end} do not fit")
        return end

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, H, D) of the new tokens of the first B rows; return those of all their tokens, (B, S, H, D)."""
        rows, end = k.shape[0], self.check_room(k.shape[1])
        self.k[layer, :rows, self.length : end] = k
        self.v[layer, :rows, self.length : end] = v
        return self.k[layer, :rows, :end], self.v[layer, :rows, :end]

    def copy_row(self, source: int, target: int, left: int = 0) -> None:
        """Copy a row's tokens over those of another row (or of its own), `left` columns further to the left."""
        for table in (self.k, self.v):
            table[:, target, : self.length - left] = table[:, source, left : self.length].clone()  # they may overlap

    def part(self, row: int, start: int, end: int) -> KVCache:
        """An empty cache of one row whose memory is columns start .. end of that row of this one."""
        view = copy.copy(self)
        view.k, view.v = self.k[:, row : row + 1, start:end], self.v[:, row : row + 1, start:end]
        view.length = 0
        return view


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention (Vaswani et al., 2017). q, k and v are views of one projection, never copied."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, document_start: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x)
        dropout_p = self.dropout if self.training else 0.0
        if cache is None:
            y = ops.causal_attention_qkvpacked(qkv, self.n_head, None, dropout_p, document_start)  # (B, T, C)
        else:
            q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # (B, T, H, D) each
            k, v = cache.append(self.layer, k, v)  # (B, S, H, D)
            y = ops.causal_attention(q, k, v, None, dropout_p, document_start).view(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GPT-2's GELU (the tanh approximation) between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(ops.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """One transformer block, pre-norm. Each residual addition is done by the LayerNorm that follows it, fused."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        cache: KVCache | None = None,
        document_start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: output of the layer before, not yet added to `residual` (None at the start) -> the same pair, one block on."""
        x, residual = self.ln_1(x, residual)
        x = self.attn(x, cache, document_start)
        x, residual = self.ln_2(x, residual)
        return self.mlp(x), residual


def decoding_parameters(
    blocks: nn.ModuleList, ln_f: LayerNorm, x: Tensor, cache: KVCache
) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
    """What `decode_blocks` takes of all blocks and the last LayerNorm, or None where that cannot take these modules' place:
    nobody's hooks, modules or forwards of their own are passed over."""
    if not decodes_blocks(x, cache.k.shape[4]) or type(cache) is not KVCache or len(blocks) != cache.k.shape[0]:
        return None
    if _has_any_global_hook() or any(module.forward is not forward for module, forward in _FORWARDS):
        return None
    # Through these dictionaries it takes half of the time that attributes take, in which the memory of weights lies idle.
    norms: list[Any] = []
    linears: list[Any] = []
    block: Any
    for layer, block in enumerate(blocks._modules.values()):
        if type(block) is not Block or not _is_plain(block):
            return None
        of_block: dict[str, Any] = block._modules
        attn, mlp = of_block["attn"], of_block["mlp"]
        if type(attn) is not CausalSelfAttention or type(mlp) is not MLP or not (_is_plain(attn) and _is_plain(mlp)):
            return None
        if attn.n_head != cache.k.shape[3] or attn.layer != layer or attn.training or mlp.training:
            return None
        of_attn: dict[str, Any] = attn._modules
        of_mlp: dict[str, Any] = mlp._modules
        norms += (of_block["ln_1"], of_block["ln_2"])
        linears += (of_attn["c_attn"], of_attn["c_proj"], of_mlp["c_fc"], of_mlp["c_proj"])
    norms.append(ln_f)
    kind = type(linears[0])
    if kind not in (Linear, Int8Linear) or any(type(linear) is not kind for linear in linears):  # LoRA's, for example
        return None
    if any(type(norm) is not LayerNorm or norm.eps != ln_f.eps for norm in norms):
        return None
    modules, n, int8 = norms + linears, len(norms), kind is Int8Linear
    if not all(map(_is_plain, modules)):
        return None
    weights = [norm._parameters["weight"] for norm in norms]
    weights += [(linear._buffers if int8 else linear._parameters)["weight"] for linear in linears]
    biases = [bias for module in modules if (bias := module._parameters["bias"]) is not None]
    floating = weights[:n] + biases if int8 else weights + biases
    if len(biases) not in (0, len(modules)) or any(p.dtype != x.dtype or not p.is_contiguous() for p in floating):
        return None
    return (
        weights[:n] + biases[:n],
        weights[n:] + biases[n:],
        [linear._buffers["scale"] for linear in linears] if int8 else [],
    )


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it is its class's forward and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


_FORWARDS = [(module, module.forward) for module in (Block, CausalSelfAttention, MLP, LayerNorm, Linear, Int8Linear)]
