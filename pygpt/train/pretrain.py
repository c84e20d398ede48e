"""Pretraining: next-token prediction on raw text.

pygpt pretrain --data data/stdlib --out runs/mine
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from pygpt.data import PrepareConfig, RandomOffsets, SlidingWindows, TokenFile, load_tokens, prepare
from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT, PRESETS, GPTConfig
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from pygpt.train.checkpoint import checkpoints, resolve_checkpoint
from pygpt.train.trainer import TrainConfig, Trainer, check_resumable


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
    """Start from the weights of this run or model folder; its sizes then count, and the size settings are not used."""
    preset: str | None = None
    """A named size, e.g. gpt2 or gpt3-350m, instead of n_layer, n_head and n_embd."""
    n_layer: int = 6
    """Transformer blocks."""
    n_head: int = 6
    """Attention heads."""
    n_embd: int = 192
    """Hidden size."""
    block_size: int | None = None
    """Tokens in a training sequence; by default the preset's, or 128."""
    dropout: float = 0.0
    """Dropout probability while training."""
    bias: bool = True
    """Biases in linear layers and LayerNorms, as in GPT-2."""
    batch_size: int = 16
    """Sequences in a batch."""
    sampler: str = "random"
    """random: windows that start anywhere (nanoGPT); sliding: windows every `stride` tokens, shuffled per epoch."""
    stride: int | None = None
    """Tokens between the starts of sliding windows; by default block_size."""
    eval_batches: int = 20
    """Batches in an evaluation while training; `pygpt eval` goes over all of the text."""
    prompt: str = "\n"
    """What samples continue."""
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
        for name in ("batch_size", "eval_batches", "sample_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model these settings describe."""
        config = GPTConfig(
            n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd, block_size=self.block_size or 128
        )  # fmt: skip
        if self.preset is not None:
            config = GPTConfig.preset(self.preset)
            config = replace(config, block_size=self.block_size or config.block_size)
        return replace(config, vocab_size=vocab_size, dropout=self.dropout, bias=self.bias)


# What may differ between a run and its continuation: how long, how often, where - not what is computed per step.
CHANGEABLE = (
    "steps", "resume", "overwrite", "out", "data", "eval_every", "sample_every", "checkpoint_every", "keep", "log_every",
    "peak_tflops", "eval_batches", "prompt", "sample_tokens", "device", "compile",
)  # fmt: skip


def pretrain(config: PretrainConfig, console: Console | None = None) -> Path:
    """Train as configured; returns the run's folder. Raises PygptError for settings, data or files that do not fit."""
    console = console or Console()
    latest = _check_run(config)
    data = config.data or _embedded_corpus(config.out / "data", console)
    train, val, tokenizer, vocab_size = load_data(data)
    torch.manual_seed(config.seed)
    model = _model(config, latest, vocab_size)
    block_size = model.config.block_size
    seed = config.seed
    sampler: RandomOffsets | SlidingWindows
    if config.sampler == "random":
        sampler = RandomOffsets(train, block_size, config.batch_size, seed)
    else:
        sampler = SlidingWindows(train, block_size, config.stride or block_size, config.batch_size, seed)
    held_out = RandomOffsets(val, block_size, config.batch_size, seed + 1)

    def evaluate(model: GPT) -> float:
        losses = []
        for index in range(config.eval_batches):
            x, y = (t.to(trainer.device) for t in held_out.batch(index))
            losses.append(model(x, y)[1].item())
        return sum(losses) / len(losses)

    def sample(model: GPT) -> str:
        assert tokenizer is not None
        prompt = tokenizer.encode_ordinary(config.prompt)[-block_size:]
        idx = torch.tensor([prompt], device=trainer.device)
        return tokenizer.decode(model.generate(idx, config.sample_tokens, temperature=0.8, top_k=200, seed=seed)[0])

    trainer = Trainer(
        model, sampler.batch, config, config.out,
        evaluate=evaluate, sample=sample if tokenizer else None, tokenizer=tokenizer, console=console,
    )  # fmt: skip
    if latest is not None:
        trainer.resume(latest)
    size = f"{model.get_num_params(non_embedding=False) / 1e6:.1f}M parameters"
    console.print(
        f"{size} on {trainer.device} in {config.dtype}; {len(train):,} training tokens; run folder {config.out}"
    )
    trainer.train()
    console.print(f"checkpoint {checkpoints(config.out)[-1]}, loss plot {config.out / 'loss.png'}")
    return config.out


def load_data(folder: Path) -> tuple[TokenFile, TokenFile, Tokenizer | None, int]:
    """Token files of a prepared folder -> train, val, tokenizer (None for nanoGPT's bare files), vocabulary size."""
    train, val = load_tokens(folder, "train"), load_tokens(folder, "val")
    tokenizer = load_tokenizer(folder) if (folder / TOKENIZER_FILE).is_file() else None
    vocab_size = train.vocab_size or 50257  # nanoGPT's files, which have no meta.json, are gpt2's
    return train, val, tokenizer, vocab_size


def _check_run(config: PretrainConfig) -> Path | None:
    """The checkpoint to resume from, if any. What is in OUT is never overwritten unasked."""
    found = checkpoints(config.out)
    if config.resume:
        if not found:
            raise MissingFileError(f"nothing to resume: '{config.out}' has no checkpoint (checkpoints/step_*)")
        check_resumable(found[-1], config, CHANGEABLE)
        return found[-1]
    if (config.out / "checkpoints").exists() or (config.out / "metrics.jsonl").exists():
        if not config.overwrite:
            raise InputError(
                f"'{config.out}' holds an earlier run; go on with it (--resume), delete it (--overwrite) or choose another --out"
            )
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(config.out / name, ignore_errors=True)
        (config.out / "metrics.jsonl").unlink(missing_ok=True)
    return None


def _model(config: PretrainConfig, latest: Path | None, vocab_size: int) -> GPT:
    source = latest or (resolve_checkpoint(config.init_from) if config.init_from else None)
    if source is None:
        return GPT(config.model_config(vocab_size))
    model = GPT.from_pretrained(source)
    if model.config.vocab_size < vocab_size:
        raise InputError(
            f"the data's vocabulary has {vocab_size} tokens, the model in '{source}' {model.config.vocab_size}; prepare the "
            f"text with the model's tokenizer"
        )
    return model


def _embedded_corpus(folder: Path, console: Console) -> Path:
    if not (folder / "meta.json").is_file():
        console.print(f"no --data given: preparing the source of Python's standard library into {folder}")
        prepare(PrepareConfig(out=folder))
    return folder
