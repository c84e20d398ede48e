"""The whole model, GPT-2's architecture on random weights: one training step, or greedy generation, by pygpt and by its peers.

A training step is forward, backward, clipping and AdamW on random tokens. In bfloat16 the peers train as nanoGPT does:
float32 weights under autocast. Generation continues a prompt; "pygpt int8" is `GPT.to_int8`, the eager peer, like nanoGPT,
has no KV cache, transformers and CTranslate2 have one.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pygpt import GPT, GPTConfig
from pygpt.bench import baseline
from pygpt.errors import InputError
from pygpt.optim import build_optimizer, clip_factor

PROMPT = 32  # tokens

# Peers by job, in the order of the tables, and the dtypes in which they are asked.
PEERS = {
    "training": ("eager", "torch.compile"),
    "decode": ("pygpt int8", "eager", "transformers", "CTranslate2 int8"),
}


class NotInstalledError(Exception):
    """A peer that is not here."""


def build(
    job: str, side: str, preset: str, batch: int, tokens: int, dtype: torch.dtype, device: str
) -> Callable[[], Any]:
    """A call of `job`: one training step of batch x tokens, or `tokens` new tokens in each of `batch` rows."""
    config = GPTConfig.preset(preset)
    longest = tokens + (PROMPT if job == "decode" else 0)
    if longest > config.block_size:
        raise InputError(f"preset '{preset}' takes {config.block_size} tokens, and {longest} were asked for")
    if side != "pygpt" and side not in PEERS[job]:
        raise InputError(f"nobody called '{side}' takes part in {job}")
    torch.manual_seed(0)
    if job == "training":
        return _training(side, config, batch, tokens, dtype, device)
    idx = torch.randint(config.vocab_size, (batch, PROMPT))
    if side == "CTranslate2 int8":
        return _ctranslate2(config, idx, tokens)
    idx = idx.to(device)
    if side == "transformers":
        return _transformers(config, idx, tokens, dtype)
    if side == "eager":
        peer = _baseline(config).to(device, dtype).eval()
        return lambda: _without_cache(peer, idx, tokens)
    ours = GPT(config).to(device, dtype).eval()
    ours = ours.to_int8() if side == "pygpt int8" else ours
    return lambda: ours.generate(idx, tokens, temperature=0)


def _baseline(config: GPTConfig) -> baseline.GPT:
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    return baseline.GPT(baseline.GPTConfig(**{name: getattr(config, name) for name in names}))


def _training(
    side: str, config: GPTConfig, batch: int, tokens: int, dtype: torch.dtype, device: str
) -> Callable[[], float]:
    idx, targets = torch.randint(config.vocab_size, (2, batch, tokens)).to(device)
    if side == "pygpt":
        ours = GPT(config).to(device, dtype)
        updates = build_optimizer(ours, weight_decay=0.1, learning_rate=6e-4, betas=(0.9, 0.95))

        def step() -> float:
            loss = ours(idx, targets)[1]
            loss.backward()
            updates.step(grad_factor=clip_factor(ours.parameters(), 1.0)[1])
            updates.zero_grad(set_to_none=True)
            return loss.item()

        return step
    model = _baseline(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if side == "torch.compile" else model

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(device).type, dtype)

    def peer_step() -> float:
        with autocast():
            loss = forward(idx, targets)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return peer_step


@torch.no_grad()
def _without_cache(model: nn.Module, idx: Tensor, tokens: int) -> Tensor:
    """nanoGPT's way: every step computes the whole sequence (and, as there, the logits of its last token only)."""
    for _ in range(tokens):
        idx = torch.cat([idx, model(idx, last_only=True)[0][:, -1].argmax(-1, keepdim=True)], 1)
    return idx


def _transformers_model(config: GPTConfig) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise NotInstalledError
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    sizes = {"n_positions": config.block_size, "vocab_size": config.vocab_size, "n_layer": config.n_layer}
    sizes |= {"n_head": config.n_head, "n_embd": config.n_embd}
    no_end = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_end)).eval()


def _transformers(config: GPTConfig, idx: Tensor, tokens: int, dtype: torch.dtype) -> Callable[[], Any]:
    model = _transformers_model(config).to(idx.device, dtype)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(idx, attention_mask=torch.ones_like(idx), **settings)


def _ctranslate2(config: GPTConfig, idx: Tensor, tokens: int) -> Callable[[], Any]:
    """Weight-only int8, on a CPU, as CTranslate2 converts a folder of transformers'."""
    if importlib.util.find_spec("ctranslate2") is None:
        raise NotInstalledError
    ctranslate2: Any = importlib.import_module("ctranslate2")
    with tempfile.TemporaryDirectory() as folder:
        source, converted = Path(folder) / "source", Path(folder) / "converted"
        _transformers_model(config).save_pretrained(source)
        _plain_tokenizer(config.vocab_size).save_pretrained(source)
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(converted), quantization="int8")
        generator = ctranslate2.Generator(
            str(converted), device="cpu", compute_type="int8", intra_threads=torch.get_num_threads()
        )
    prompts = [[f"t{i}" for i in row] for row in idx.tolist()]
    settings = {"max_length": tokens, "min_length": tokens, "sampling_topk": 1, "include_prompt_in_result": False}
    return lambda: generator.generate_batch(prompts, **settings)


def _plain_tokenizer(vocab_size: int) -> Any:
    """One word per id: the bench needs no texts, but a converter needs a vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="t0", bos_token="t0", eos_token="t0")
