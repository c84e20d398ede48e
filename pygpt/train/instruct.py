"""Instructions: finetune a GPT on questions and their answers, which it learns to end with end-of-text.

pygpt finetune instruct --init-from runs/base --data instruction_data.json --out runs/assistant
pygpt generate runs/assistant --instruct --prompt "Rewrite the sentence in the past tense." --input "I eat."
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pygpt.data.instructions import (
    Example,
    Message,
    PackedBatches,
    PaddedBatches,
    Template,
    encode_conversation,
    encode_messages,
    get_template,
    load_template,
    read_instructions,
)
from pygpt.data.registry import dataset_path
from pygpt.data.samplers import IGNORED, _random_bits
from pygpt.errors import InputError
from pygpt.generate import Generation
from pygpt.model import GPT
from pygpt.pretrained import load_with_tokenizer, refuse_classifier, resolve_checkpoint
from pygpt.tokenizer import Tokenizer
from pygpt.train.lora import add_lora
from pygpt.train.metrics import DATASET_FILE, RESULTS_FILE, check_same_data, write_json
from pygpt.train.trainer import Batch, TrainConfig, Trainer, check_run, remove_run


@dataclass(frozen=True, kw_only=True)
class InstructConfig(TrainConfig):
    """Finetune a model to follow instructions, from a file of questions and answers."""

    data: Path
    """A .json list or .jsonl lines of instruction, input and output, or of chat messages; or a data set's name."""
    init_from: Path
    """The run or model folder to start from; of a run, its best checkpoint."""
    out: Path = Path("runs/instruct")
    """The run's folder: checkpoints, metrics.jsonl, results.json, answers.jsonl, loss.png."""
    resume: bool = False
    """Go on from the run's latest checkpoint."""
    overwrite: bool = False
    """Delete what an earlier run left in OUT."""
    template: str = "alpaca"
    """How questions and answers are written: alpaca; phi3; a text with {content} in it, and perhaps {input}, up to where the
    answer starts; or a file with such a text, or .json with the fields of pygpt.data.instructions.Template."""
    loss_on: str = "answers"
    """answers: only they, and the end-of-text after each, count in the loss; all: every token does."""
    packing: bool = False
    """Put several examples into one row, as many as fit, instead of one each with padding. They do not see each other."""
    train: str = "all"
    """What trains: all; lora: LoRA adapters on all blocks."""
    lora_rank: int = 8
    """With train lora: rank of the adapters."""
    lora_alpha: float = 16.0
    """With train lora: the adapters' update counts alpha / rank times."""
    lora_dropout: float = 0.0
    """With train lora: probability of dropping an adapter's input while training."""
    dropout: float | None = None
    """Dropout probability while training; by default the model's own."""
    val_share: float = 0.05
    """Share of the examples for validation."""
    test_share: float = 0.1
    """Share of the examples that are held out for the figures at the end."""
    max_length: int | None = None
    """Tokens of an example that are used; by default the model's block_size."""
    long: str = "skip"
    """What happens to a longer example: skip, or truncate, which loses its end. Both are counted and reported."""
    batch_size: int = 8
    """Examples in a batch; with packing, rows."""
    steps: int = 500
    """Optimizer steps in all."""
    learning_rate: float = 3e-4
    """Peak learning rate, reached after the warmup."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step, at the end of the cosine."""
    warmup: int = 30
    """Steps of linear warmup."""
    eval_every: int = 100
    """Steps between evaluations; 0: only at the end."""
    sample_every: int = 100
    """Steps between sample answers; 0: only at the end."""
    keep: int = 1
    """Newest checkpoints that are kept, beside the best one."""
    samples: int = 2
    """Validation questions that are answered while training."""
    answers: int = 20
    """Held-out questions that are answered at the end, into answers.jsonl."""
    answer_tokens: int = 100
    """Tokens of an answer at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("loss_on", ("answers", "all")),
            ("train", ("all", "lora")),
            ("long", ("skip", "truncate")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got '{getattr(self, name)}'")
        for name in ("batch_size", "answer_tokens", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("samples", "answers"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not (self.val_share > 0 and self.test_share > 0 and self.val_share + self.test_share < 1):
            raise InputError(
                f"val_share and test_share must be above 0 and below 1 together, got {self.val_share} and {self.test_share}"
            )
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other")


# What may differ between a run and its continuation: how long, how often, where - not what is computed per step.
CHANGEABLE = (
    "steps", "resume", "overwrite", "out", "data", "init_from", "eval_every", "patience", "checkpoint_every", "keep",
    "log_every", "sample_every", "peak_tflops", "device", "compile", "samples", "answers", "answer_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Conversations, or one part of them, and their tokens with the loss on answers (`scored`) or as trained on."""

    conversations: list[list[Message]]
    examples: list[Example]
    scored: list[Example]

    def at(self, rows: Sequence[int]) -> Part:
        """Those at the given positions."""
        return Part(
            [self.conversations[i] for i in rows], [self.examples[i] for i in rows], [self.scored[i] for i in rows]
        )


def finetune_instruct(config: InstructConfig, console: Console | None = None) -> Path:
    """Train as configured, then test the best checkpoint; returns the run's folder.

    RUN/results.json has the mean loss of the answers' tokens on the examples held out, before and after; RUN/answers.jsonl
    some of them with the model's greedy answers. Raises PygptError for settings, data or files that do not fit.
    """
    console = console or Console()
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    latest = check_run(config, config.out, config.resume, config.overwrite, CHANGEABLE)
    torch.manual_seed(config.seed)
    base = resolve_checkpoint(config.init_from)
    refuse_classifier(base, "start from a model that was not finetuned to classify")
    model, tokenizer = load_with_tokenizer(latest or base, config.dropout)
    template = load_template(latest) if latest else get_template(config.template)
    parts, report = load_parts(config, model, tokenizer, template, tell)
    if latest is not None:
        check_same_data(config.out, report["sha256"])
    if config.train == "lora":
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)
    sampler: PackedBatches | PaddedBatches
    if config.packing:
        block_size = model.config.block_size
        sampler = PackedBatches(parts["train"].examples, block_size, config.batch_size, config.seed)
    else:
        sampler = PaddedBatches(parts["train"].examples, config.batch_size, config.seed)
    trainer = Trainer(
        model, sampler.batch, config, config.out, tokenizer=tokenizer, template=template, console=console,
        loss_fn=packed_loss if config.packing else padded_loss,
        evaluate=partial(answer_loss, part=parts["val"], batch_size=config.batch_size),
        sample=partial(_sample, tokenizer=tokenizer, template=template, part=parts["val"], config=config)
        if config.samples else None,
    )  # fmt: skip
    results = config.out / RESULTS_FILE
    if latest is not None:
        trainer.resume(latest, tested=results.is_file())
        results.unlink(missing_ok=True)  # of fewer steps: should the test be cut off, the file must not be there
    if config.overwrite:
        remove_run(config.out)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tell(
        f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters train on {trainer.device} in "
        f"{config.dtype}; {config.steps} steps are {config.steps * config.accumulate / len(sampler):.1f} epochs of "
        f"{len(parts['train'].examples):,} examples; run folder {config.out}"
    )
    write_json(config.out / DATASET_FILE, report)
    trainer.train()
    if not trainer.stop_requested:
        _test(config, base, parts["test"], report, trainer.device, tell)
        tell(f'to use it: pygpt generate {config.out} --instruct --prompt "..." or pygpt chat {config.out}')
    return config.out


def load_parts(
    config: InstructConfig, model: GPT, tokenizer: Tokenizer, template: Template, tell: Callable[[str], None]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """train, val and test, read, encoded and split; and what was counted on the way, which is told as well."""
    found = read_instructions(dataset_path(config.data))
    limit = min(config.max_length or model.config.block_size, model.config.block_size)
    part, skipped, truncated = Part([], [], []), Counter(found.skipped), 0
    for conversation, place in zip(found.conversations, found.places, strict=True):
        try:
            scored = encode_conversation(conversation, template, tokenizer)
            trained = encode_conversation(conversation, template, tokenizer, all_tokens=config.loss_on == "all")
        except InputError as error:
            raise InputError(f"'{config.data}', {place}: {error}") from error
        cut = len(scored.idx) > limit
        scored, trained = (Example(e.idx[:limit], e.targets[:limit]) for e in (scored, trained))
        if cut and config.long == "skip":
            skipped[f"longer than {limit} tokens"] += 1
        elif (scored.targets == IGNORED).all():
            skipped[f"no answer within {limit} tokens"] += 1
        else:
            truncated += cut
            part.conversations.append(conversation)
            part.examples.append(trained)
            part.scored.append(scored)
    for reason, count in skipped.items():
        tell(f"left out {count:,} of {len(found.conversations) + found.skipped.total():,} examples: {reason}")
    if truncated:
        tell(f"{truncated:,} examples are longer than {limit} tokens and were cut there")
    total = len(part.examples)
    n_val, n_test = (max(1, round(total * share)) for share in (config.val_share, config.test_share))
    if total < n_val + n_test + 1:
        raise InputError(
            f"'{config.data}' has {total} examples that can be used; training, validation and test need one each"
        )
    order = np.argsort(_random_bits(config.seed, 0, total), kind="stable").tolist()
    rows = {"train": order[n_val + n_test :], "val": order[:n_val], "test": order[n_val : n_val + n_test]}
    parts = {name: part.at(sorted(chosen)) for name, chosen in rows.items()}
    counts = {name: len(chosen) for name, chosen in rows.items()}
    tell(", ".join(f"{count:,} {name}" for name, count in counts.items()) + " examples")
    seen = {json.dumps(conversation[:-1]) for conversation in parts["train"].conversations}
    repeated = sum(json.dumps(conversation[:-1]) in seen for conversation in parts["test"].conversations)
    if repeated:
        tell(f"{repeated:,} of {counts['test']:,} test questions are word for word among the training questions too")
    digest = hashlib.sha256(json.dumps(found.conversations).encode()).hexdigest()
    return parts, {
        "examples": counts, "skipped": dict(skipped), "truncated": truncated,
        "test_questions_seen_in_training": repeated, "sha256": digest,
    }  # fmt: skip


def padded_loss(model: Any, batch: Batch) -> Tensor:
    """Mean loss of a batch of `PaddedBatches`."""
    return model(*batch)[1]


def packed_loss(model: Any, batch: Batch) -> Tensor:
    """Mean loss of a batch of `PackedBatches`."""
    idx, document_start, targets = batch
    return model(idx, targets, document_start=document_start)[1]


@torch.no_grad()
def answer_loss(model: GPT, part: Part, batch_size: int) -> float:
    """Mean loss of the answers' tokens, each counting the same, in nats."""
    device = model.lm_head.weight.device
    batches = PaddedBatches(part.scored, batch_size)
    total = count = 0.0
    for index in range(len(batches)):
        idx, targets = (tensor.to(device) for tensor in batches.batch(index))
        tokens = int((targets != IGNORED).sum())
        total += model(idx, targets)[1].item() * tokens
        count += tokens
    return total / count


def greedy_answers(
    model: GPT,
    tokenizer: Tokenizer,
    template: Template,
    conversations: Sequence[list[Message]],
    tokens: int,
    batch_size: int,
) -> list[tuple[str, bool]]:
    """The greedy answer to the last question of each conversation, whose own answer is left out; and whether it ended with
    end-of-text, within so many tokens. Of a prompt that does not fit into the context, the end counts."""
    found = []
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        prompts = [encode_messages(turns[:-1], template, tokenizer)[-model.config.block_size :] for turns in batch]
        generation = Generation(
            model, prompts, tokens, temperature=0.0, eos_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size
        )
        for _ in generation:
            pass
        for prompt, ids in zip(prompts, generation.tokens, strict=True):
            ended = ids[-1] == tokenizer.eot_id
            text = tokenizer.decode(ids[len(prompt) : -1 if ended else None])
            for stop in template.stop:
                text = text.split(stop)[0]
            found.append((text.strip(), ended))
    return found


def _sample(model: GPT, tokenizer: Tokenizer, template: Template, part: Part, config: InstructConfig) -> str:
    asked = part.conversations[: config.samples]
    texts = []
    for conversation, (given, _) in zip(
        asked, greedy_answers(model, tokenizer, template, asked, config.answer_tokens, config.batch_size), strict=True
    ):
        question, expected = conversation[-2], conversation[-1]["content"]
        about = f"\n  {question['input']}" if question.get("input") else ""
        texts.append(f"{question['content']}{about}\n  expected: {expected}\n  answered: {given}")
    return "\n".join(texts)


def _test(
    config: InstructConfig,
    base: Path,
    part: Part,
    report: dict[str, Any],
    device: torch.device,
    tell: Callable[[str], None],
) -> None:
    """Score base and best checkpoint on the examples held out, and write down what the latter answers."""
    best = resolve_checkpoint(config.out)
    before, _ = load_with_tokenizer(base)
    after, tokenizer = load_with_tokenizer(best)
    losses = [answer_loss(model.to(device, torch.float32).eval(), part, config.batch_size) for model in (before, after)]
    asked = part.conversations[: config.answers]
    answers = greedy_answers(after, tokenizer, load_template(best), asked, config.answer_tokens, config.batch_size)
    with (config.out / "answers.jsonl").open("w", encoding="utf-8") as file:
        for conversation, (given, ended) in zip(asked, answers, strict=True):
            expected = conversation[-1]["content"]
            row = {"messages": conversation[:-1], "expected": expected, "answer": given, "ended": ended}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    count = sum(ended for _, ended in answers)
    test = {"loss_before": losses[0], "loss_after": losses[1], "answers": len(asked), "ended_with_end_of_text": count}
    write_json(config.out / RESULTS_FILE, {"test": test, **report})
    tell(
        f"held-out answers: loss {losses[0]:.4f} before, {losses[1]:.4f} after ({1 - losses[1] / losses[0]:.1%} less); "
        f"{count} of {len(asked)} greedy answers end with end-of-text"
    )
