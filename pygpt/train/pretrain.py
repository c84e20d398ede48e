"""Pretraining: next-token prediction on raw text.

pygpt pretrain --data data/stdlib --out runs/mine
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pygpt.data import PrepareConfig, RandomOffsets, SlidingWindows, TokenFile, load_tokens, prepare
from pygpt.errors import InputError
from pygpt.model import GPT, PRESETS, GPTConfig
from pygpt.pretrained import refuse_classifier
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, encode_prompt, load_tokenizer
from pygpt.train.checkpoint import check_vocabulary, checkpoints, resolve_checkpoint
from pygpt.train.metrics import DATASET_FILE, check_same_data, write_json
from pygpt.train.trainer import TrainConfig, Trainer, check_run, new_model, remove_run
from pygpt.word2vec import init_embeddings

BLOCK, BLOCKS = 1 << 20, 64
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 192, "block_size": 128}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Train a model on token files, from random weights or from a checkpoint."""

    data: Path | None = None
    """Folder that `pygpt prepare` wrote. Without one, Python's standard library is prepared into OUT/data."""
    out: Path = Path("runs/pretrain")
    """The run's folder: checkpoints, metrics.jsonl, loss.png."""
    resume: bool = False
    """Go on from the run's latest checkpoint."""
    overwrite: bool = False
    """Delete what an earlier run left in OUT."""
    init_from: Path | None = None
    """Start from the weights of this run (its best checkpoint) or model folder, which then decides the model's sizes."""
    init_embeddings: Path | None = None
    """Start the token embedding from the vectors in this file (word2vec's text format, dimension n_embd): those of
    tokens that are in it, scaled to the size of the random ones they replace."""
    preset: str | None = None
    """A named size, e.g. gpt2 or gpt3-350m. The settings from n_layer to bias change single values of it."""
    n_layer: int | None = None
    """Transformer blocks; 6 without a preset."""
    n_head: int | None = None
    """Attention heads; 6 without a preset."""
    n_embd: int | None = None
    """Hidden size; 192 without a preset."""
    block_size: int | None = None
    """Tokens in a training sequence; 128 without a preset. With init_from, at most what that model has."""
    dropout: float | None = None
    """Dropout probability while training; 0 unless init_from brings another."""
    bias: bool | None = None
    """Whether linear layers and LayerNorms have biases; by default they do, as in GPT-2."""
    batch_size: int = 16
    """Sequences in a batch."""
    sampler: str = "random"
    """random: windows that start anywhere (nanoGPT); sliding: windows every `stride` tokens, shuffled per epoch."""
    stride: int | None = None
    """Tokens between the starts of sliding windows; by default block_size."""
    eval_batches: int = 20
    """Batches in an evaluation while training; `pygpt eval` goes over all of the text."""
    prompt: str = ""
    """What samples continue; nothing: the start of a document."""
    sample_tokens: int = 300
    """Tokens in a sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in ("random", "sliding"):
            raise InputError(f"sampler must be random or sliding, got '{self.sampler}'")
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"unknown preset '{self.preset}': choose one of {', '.join(PRESETS)}")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other")
        for name in ("batch_size", "eval_batches", "sample_tokens", "block_size", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.stride is not None and self.sampler != "sliding":
            raise InputError("stride is for sampler sliding; random windows have none")
        sizes = [name for name in ("preset", "n_layer", "n_head", "n_embd", "bias") if getattr(self, name) is not None]
        if self.init_from is not None and sizes:
            raise InputError(f"init_from brings the model's sizes with it: leave out {', '.join(sizes)}")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model these settings describe."""
        names = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.preset is not None:
            return GPTConfig.preset(self.preset, vocab_size=vocab_size, **given)
        return GPTConfig(**{**SMALL, "vocab_size": vocab_size, **given})


# What may differ between a run and its continuation: how long, how often, where - not what is computed per step.
CHANGEABLE = (
    "steps", "resume", "overwrite", "out", "data", "eval_every", "patience", "sample_every", "checkpoint_every", "keep",
    "log_every", "peak_tflops", "eval_batches", "prompt", "sample_tokens", "device", "compile",
)  # fmt: skip


def pretrain(config: PretrainConfig, console: Console | None = None) -> Path:
    """Train as configured; returns the run's folder. Raises PygptError for settings, data or files that do not fit."""
    console = console or Console()
    latest = check_run(config, config.out, config.resume, config.overwrite, CHANGEABLE)
    data = config.data or _embedded_corpus(config.out / "data", console)
    train, val, tokenizer, vocab_size = load_data(data, console)
    torch.manual_seed(config.seed)
    model = _model(config, latest, tokenizer, vocab_size)
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if config.init_embeddings is not None and latest is None:
        if tokenizer is None:
            raise InputError(f"init_embeddings needs to know the text of each token: '{data}' has no {TOKENIZER_FILE}")
        matched = init_embeddings(model, tokenizer, config.init_embeddings)
        tell(f"{matched:,} of {tokenizer.vocab_size:,} tokens start from their vectors in {config.init_embeddings}")
    digest = fingerprint(train, val)
    if latest is not None:
        check_same_data(config.out, digest)
    block_size = model.config.block_size
    _check_length(train, block_size)
    _check_length(val, block_size)
    sampler: RandomOffsets | SlidingWindows
    if config.sampler == "random":
        sampler = RandomOffsets(train, block_size, config.batch_size, config.seed)
    else:
        sampler = SlidingWindows(train, block_size, config.stride or block_size, config.batch_size, config.seed)
    held_out = RandomOffsets(val, block_size, config.batch_size, config.seed + 1)
    trainer = Trainer(
        model, sampler.batch, config, config.out, tokenizer=tokenizer, console=console,
        evaluate=partial(_mean_loss, batch=held_out.batch, batches=config.eval_batches),
        sample=_sampler(config, tokenizer, block_size) if tokenizer else None,
    )  # fmt: skip
    if latest is not None:
        trainer.resume(latest)
    if config.overwrite:
        remove_run(config.out)
    size = f"{model.get_num_params(non_embedding=False) / 1e6:.1f}M parameters"
    tell(f"{size} on {trainer.device} in {config.dtype}; {len(train):,} training tokens; run folder {config.out}")
    report = {"train_tokens": len(train), "val_tokens": len(val), "sha256": digest}
    write_json(config.out / DATASET_FILE, report)
    trainer.train()
    if checkpoints(config.out):
        tell(
            f"checkpoints in {config.out / 'checkpoints'}; to see what the best one writes: pygpt generate {config.out}"
        )
    return config.out


def fingerprint(*files: TokenFile) -> str:
    """A SHA-256 by which token files are known again, wherever they are: of all of a file up to 64 MiB, of a longer one's
    size and 64 blocks of 1 MiB, the first and the last among them."""
    digest = hashlib.sha256()
    for file in files:
        data = file.tokens.view(np.uint8)
        digest.update(f"{file.tokens.dtype} {data.size} ".encode())
        starts = np.linspace(0, data.size - BLOCK, BLOCKS).astype(np.int64) if data.size > BLOCK * BLOCKS else [0]
        for start in starts:
            digest.update(data[start : start + BLOCK if len(starts) > 1 else None].data)
    return digest.hexdigest()


def _mean_loss(model: GPT, batch: Callable[[int], tuple[Tensor, Tensor]], batches: int) -> float:
    """Mean loss over the same batches each time."""
    device = model.lm_head.weight.device
    losses = [model(*(t.to(device) for t in batch(index)))[1] for index in range(batches)]
    return torch.stack(losses).mean().item()


def _sampler(config: PretrainConfig, tokenizer: Tokenizer, block_size: int) -> Callable[[GPT], str]:
    """What shows a sample of the model. A prompt that cannot be used is an error now, not after hours of training."""
    prompt = encode_prompt(tokenizer, config.prompt)
    if len(prompt) > block_size:
        raise InputError(f"prompt has {len(prompt)} tokens, more than block_size ({block_size}): shorten it")

    def sample(model: GPT) -> str:
        idx = torch.tensor([prompt], device=model.lm_head.weight.device)
        options: dict[str, Any] = {"temperature": 0.8, "top_k": 200, "seed": config.seed, "eos_id": tokenizer.eot_id}
        new = model.generate(idx, config.sample_tokens, **options)[0, len(prompt) :].tolist()
        return config.prompt + tokenizer.decode([token for token in new if token != tokenizer.eot_id])

    return sample


def _check_length(tokens: TokenFile, block_size: int) -> None:
    if len(tokens) <= block_size:
        raise InputError(
            f"'{tokens.path}' has {len(tokens)} tokens, and block_size {block_size} needs at least {block_size + 1}: "
            f"choose a smaller --block-size or prepare more text"
        )


def load_data(folder: Path, console: Console) -> tuple[TokenFile, TokenFile, Tokenizer | None, int]:
    """Token files of a prepared folder -> train, val, tokenizer (None for nanoGPT's bare files), vocabulary size."""
    train, val = load_tokens(folder, "train"), load_tokens(folder, "val")
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
    vocab_size = train.vocab_size or 50257
    if train.vocab_size is None:
        console.print(
            "the data has no meta.json; as nanoGPT's files, it is taken for tokens of gpt2 (vocabulary 50257)"
        )
    return train, val, tokenizer, vocab_size


def _model(config: PretrainConfig, latest: Path | None, tokenizer: Tokenizer | None, vocab_size: int) -> GPT:
    source = latest or (resolve_checkpoint(config.init_from) if config.init_from else None)
    if source is None:
        return new_model(config.model_config(vocab_size), config.device)
    refuse_classifier(source, "start from a model that was not finetuned to classify")
    model = GPT.from_pretrained(source, config.dropout if latest is None else None)
    check_vocabulary(source, model.config.vocab_size, tokenizer, vocab_size)
    if latest is None and config.block_size is not None:
        model.crop_block_size(config.block_size)
    return model


def _embedded_corpus(folder: Path, console: Console) -> Path:
    if not (folder / "meta.json").is_file():
        console.print(f"no --data given: preparing the source of Python's standard library into {folder}")
        prepare(PrepareConfig(out=folder))
    return folder
