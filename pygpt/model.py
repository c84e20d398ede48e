"""A GPT-2-class language model on pygpt's ops, in one sitting.

    model = GPT(GPTConfig.preset("gpt2"))
    logits, _ = model(idx)               # (B, T) token ids -> (B, T, vocabulary)
    _, loss = model(idx, targets)        # the logits are never materialised
    tokens = model.generate(idx, 100)

Architecture and initialisation follow GPT-2 (Radford et al., 2019); sizes of the larger presets GPT-3 (Brown et al., 2020).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from pygpt import ops
from pygpt.errors import InputError, InputTypeError
from pygpt.generate import Generation
from pygpt.nn import Block, Embedding, Int8Linear, KVCache, LayerNorm, Linear, decoding_parameters
from pygpt.ops.decode_blocks import decode_blocks

# name: n_layer, n_head, n_embd, block_size. GPT-3's table gives its 1.3B model 24 heads and its 13B model a width of 5140,
# which do not divide; 16 heads and 5120 are what everyone uses.
PRESETS = {
    "nano": (3, 3, 48, 64),
    "micro": (4, 4, 128, 64),
    "mini": (6, 6, 192, 256),
    "small": (6, 6, 384, 256),
    "gpt2": (12, 12, 768, 1024),
    "gpt2-medium": (24, 16, 1024, 1024),
    "gpt2-large": (36, 20, 1280, 1024),
    "gpt2-xl": (48, 25, 1600, 1024),
    "gpt3-125m": (12, 12, 768, 2048),
    "gpt3-350m": (24, 16, 1024, 2048),
    "gpt3-760m": (24, 16, 1536, 2048),
    "gpt3-1.3b": (24, 16, 2048, 2048),
    "gpt3-2.7b": (32, 32, 2560, 2048),
    "gpt3-6.7b": (32, 32, 4096, 2048),
    "gpt3-13b": (40, 40, 5120, 2048),
    "gpt3-175b": (96, 96, 12288, 2048),
}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a model."""

    block_size: int = 1024
    """Longest sequence in tokens: the number of learned positions."""
    vocab_size: int = 50257
    """Number of token ids."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 768
    """Hidden size C."""
    dropout: float = 0.0
    """Probability of dropping an embedding, an attention weight or a branch's output while training."""
    bias: bool = True
    """Whether linear layers and LayerNorms have a bias, as in GPT-2."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise InputError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if not isinstance(self.dropout, Real) or not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout must be a number in [0, 1), got {self.dropout!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """A published or a small size by name, e.g. "gpt2", "gpt2-xl", "gpt3-175b", with some fields changed."""
        if name not in PRESETS:
            raise InputError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}")
        n_layer, n_head, n_embd, block_size = PRESETS[name]
        return replace(cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size), **changes)


class Transformer(nn.Module):
    """Everything but the head: token ids in, last hidden states out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)

    def forward(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        document_start: Tensor | None = None,
        tied: list[Tensor] | None = None,
    ) -> Tensor:
        """idx (B, T) int64 -> (B, T, C). With a cache, idx continues what the cache holds. tied: see `Embedding.forward`.

        document_start: int32 (B, T), the index in its row, cached tokens included, at which the document of each token
        begins. Positions count from there, and tokens before it are not seen. It separates documents packed in a row,
        and a prompt from the padding before it.
        """
        past, block_size = 0 if cache is None else cache.length, self.wpe.num_embeddings
        if idx.dim() != 2:
            raise InputError(f"token ids must be (B, T), got {tuple(idx.shape)}")
        if idx.dtype not in (torch.int64, torch.int32):
            raise InputTypeError(f"token ids must be int64, got {idx.dtype}")
        if past + idx.shape[1] > block_size:
            raise InputError(
                f"a sequence of {past + idx.shape[1]} tokens is longer than block_size ({block_size}); "
                f"shorten it, or use a model with a larger block_size"
            )
        if document_start is None:
            x = self.wte(idx, self.wpe, past, tied)  # (B, T, C)
        else:
            x = self.wte(idx, tied=tied) + self.wpe(self._positions(idx, past, document_start))
        x, residual = self.drop(x), None
        if cache is not None and (parameters := decoding_parameters(self.h, self.ln_f, x, cache)):
            cache.check_room(idx.shape[1])
            x = decode_blocks(x, *parameters, cache.k, cache.v, past, self.ln_f.eps, document_start)
        else:
            for block in self.h:
                x, residual = block(x, residual, cache, document_start)
            x, _ = self.ln_f(x, residual)
        if cache is not None:
            cache.length += idx.shape[1]
        return x

    @staticmethod
    def _positions(idx: Tensor, past: int, document_start: Tensor) -> Tensor:
        """Position of each token in its document, (B, T)."""
        if document_start.shape != idx.shape:
            raise InputError(
                f"document_start {tuple(document_start.shape)} must have the shape of the token ids {tuple(idx.shape)}"
            )
        positions = torch.arange(past, past + idx.shape[1], device=idx.device) - document_start
        # The embedding would blame the tokens; not asked of a GPU, which would have to be waited for.
        asked = idx.is_cpu and positions.numel() and not torch.compiler.is_compiling()
        if asked and min(positions.min(), document_start.min()) < 0:
            raise InputError("document_start: a token's document must begin at position 0 or later, and not after it")
        return positions


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a final LayerNorm and a head tied to the token embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.apply(self._init_weights)
        # GPT-2: projections into the residual stream start smaller, so that its variance does not grow with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_logits: bool = False,
        document_start: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits, or the loss, of token ids.

        idx: (B, T) int64. targets: (B, T) int64, the token that follows each; negative ones are ignored. Returns
        (logits (B, T, vocab), None) without targets, (None, loss) with them, and both with return_logits=True. loss is
        the mean cross-entropy in nats. document_start: int32 (B, T), where in its row each token's document begins, for
        documents packed in one row (see `Transformer.forward`). Raises InputError for a sequence longer than block_size
        or an unknown token id.
        """
        if targets is None:
            return self.lm_head(self.transformer(idx, document_start=document_start)), None
        if targets.shape != idx.shape:
            raise InputError(f"targets {tuple(targets.shape)} must have the shape of the token ids {tuple(idx.shape)}")
        flat, head = targets.reshape(-1).clamp(min=-1), self.lm_head
        tied: list[Tensor] | None = [] if head.weight is self.transformer.wte.weight else None
        x = self.transformer(idx, document_start=document_start, tied=tied)
        weight = tied[0] if tied else head.dequantized(x.dtype) if isinstance(head, Int8Linear) else head.weight
        loss = ops.linear_cross_entropy(x.reshape(-1, x.shape[-1]), weight, flat, ignore_index=-1)
        return self.lm_head(x) if return_logits else None, loss

    @overload
    def generate(self, idx: Tensor, max_new_tokens: int, *settings: Any, **options: Any) -> Tensor: ...
    @overload
    def generate(
        self, idx: Sequence[Sequence[int]], max_new_tokens: int, *settings: Any, **options: Any
    ) -> list[list[int]]: ...

    def generate(
        self,
        idx: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        num_samples: int = 1,
    ) -> Tensor | list[list[int]]:
        """Continue each row of idx, (B, T) int64, by up to max_new_tokens sampled tokens -> (B * num_samples, T + new).

        idx may also be B lists of token ids of any lengths, and then B * num_samples lists come back. A row ends with
        eos_id; in a tensor, eos_id fills the rest of it. See `pygpt.generate` for every setting.
        """
        generation = Generation(
            self, idx, max_new_tokens, temperature, top_k, top_p, eos_id, seed, repetition_penalty, num_samples
        )
        for _ in generation:
            pass
        rows = generation.tokens
        if not isinstance(idx, Tensor):
            return rows
        longest = max(map(len, rows), default=idx.shape[1])
        filled = [ids + [eos_id or 0] * (longest - len(ids)) for ids in rows]
        return torch.tensor(filled, dtype=torch.int64, device=idx.device).view(len(rows), longest)

    def stream(
        self, idx: Tensor | Sequence[Sequence[int]], max_new_tokens: int, *settings: Any, **options: Any
    ) -> Iterator[Tensor]:
        """Like `generate`, yielding the tokens of each step, (B * num_samples,) int64, as soon as they are known."""
        generation = Generation(self, idx, max_new_tokens, *settings, **options)
        device = idx.device if isinstance(idx, Tensor) else self.lm_head.weight.device
        # The last token of a row that has ended is eos_id.
        return (torch.tensor([ids[-1] for ids in generation.tokens], device=device) for _ in generation)

    @torch.no_grad()
    def to_int8(self) -> GPT:
        """A copy for generation on CPUs whose linear layers, the head's too, hold weights of 8 bits (`ops.linear_int8`).

        Up to 4 rows at a time, whose time is that of reading the weights, it generates 1.5 to 1.9 times as fast as in bfloat16;
        at 8 rows it gains nothing. The copy cannot be trained, saved or brought to another dtype: keep the model it was made
        from. Raises InputError for a model with LoRA adapters and for weights that are not finite."""
        if any(".lora_" in name for name, _ in self.named_parameters()):
            raise InputError("the model has LoRA adapters: merge them first (pygpt.train.lora.merge_lora)")
        model = copy.deepcopy(self).requires_grad_(False)
        for module in list(model.modules()):
            for name, layer in module.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(module, name, Int8Linear(layer))
        return model

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, the tied table counted once; without the position table by default, as in nanoGPT."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the model's longest sequence in place, by dropping the last positions."""
        if not 1 <= block_size <= self.config.block_size:
            raise InputError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config = replace(self.config, block_size=block_size)
        old = self.transformer.wpe.weight
        self.transformer.wpe.weight = nn.Parameter(old.detach()[:block_size].clone(), old.requires_grad)
        self.transformer.wpe.num_embeddings = block_size

    def flops_per_token(self) -> int:
        """Floating-point operations of forward + backward per token (Chowdhery et al., 2022, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float, peak_flops: float | None = None) -> float:
        """Model FLOPs utilisation: the share of the device's peak used by `fwdbwd_per_iter` sequences in `dt` seconds.

        peak_flops: the device's peak per second; by default looked up for the device and dtype of the weights
        (`pygpt.peaks`). NaN where that is unknown.
        """
        if peak_flops is None:
            from pygpt.peaks import peak_flops as look_up

            weight = self.lm_head.weight
            peak_flops = look_up(weight.device, weight.dtype)
        if peak_flops is None:
            return math.nan
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak_flops

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str | None = None
    ) -> torch.optim.Optimizer:
        """AdamW with weight decay on matrices and embeddings only. device_type is accepted for nanoGPT's scripts."""
        from pygpt.optim import build_optimizer

        return build_optimizer(self, weight_decay=weight_decay, learning_rate=learning_rate, betas=betas)

    @classmethod
    def from_pretrained(cls, path: str | Path, dropout: float | None = None) -> GPT:
        """Load a model from a run of pygpt (its best checkpoint), or from a folder in Hugging Face's GPT-2 layout: config.json
        and model.safetensors. dropout: another probability than the one in config.json."""
        from pygpt.pretrained import load

        return load(path, dropout)

    def save_pretrained(self, path: str | Path) -> None:
        """Save to a folder in Hugging Face's GPT-2 layout; `transformers` can load it."""
        from pygpt.pretrained import save

        save(self, path)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.config).items())
