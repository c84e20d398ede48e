"""Multiple-choice questions in HellaSwag's format: which of several endings does the model find likeliest?

    pygpt eval runs/mine --choices hellaswag_val.jsonl

A line of the file is a JSON object with the keys `endings` (a list of texts), `label` (position of the right one) and
either `ctx` or, as the published files have them, `activity_label`, `ctx_a` and `ctx_b`. HellaSwag is by Zellers et al.
(2019). Texts are cleaned, encoded and scored, and accuracies defined, as in the `hellaswag` task of EleutherAI's
lm-evaluation-harness, so that figures compare with published ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from pygpt.data.labelled import IDS, json_rows, pad
from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """A context, its possible endings and the position of the right one; line: where it is in the file, from 1."""

    line: int
    context: str
    endings: list[str]
    label: int


@dataclass(frozen=True)
class MultipleChoice:
    """accuracy: share of questions whose right ending has the highest log-likelihood. accuracy_normalised: with each
    log-likelihood divided by its ending's length in characters. skipped: questions longer than block_size."""

    questions: int
    skipped: int
    accuracy: float
    accuracy_normalised: float

    def __str__(self) -> str:
        figures = ((self.accuracy, "accuracy"), (self.accuracy_normalised, "length-normalised accuracy"))
        text = ", ".join(f"{name} {value:.4f} +- {self._standard_error(value):.4f}" for value, name in figures)
        skipped = f"; {self.skipped:,} more skipped, longer than the model's block_size" * bool(self.skipped)
        return f"{self.questions:,} questions: {text}{skipped}"

    def _standard_error(self, accuracy: float) -> float:
        return math.sqrt(accuracy * (1 - accuracy) / max(1, self.questions - 1))


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda rows: None,
) -> MultipleChoice:
    """Score every question. advance is called with the number of rows of each batch done; a row is a context with one
    ending. Raises InputError, which names the line, for text that the tokenizer cannot encode, and where no question fits
    into the model's block_size."""
    block_size, asked, rows = model.config.block_size, [], []
    for question in questions:
        encoded = encode_question(question, tokenizer)
        if max(len(tokens) for tokens, _ in encoded) - 1 <= block_size:  # the last token is predicted, not read
            asked.append(question)
            rows += encoded
    if not asked:
        raise InputError(f"none of the {len(questions):,} questions fits into the model's block_size ({block_size})")
    scores = loglikelihoods(model, rows, batch_size, advance)
    if not np.isfinite(scores).all():
        raise InputError("the model's log-likelihoods are not finite numbers: its weights are damaged, or it diverged")
    right = right_normalised = start = 0
    for question in asked:
        score = scores[start : start + len(question.endings)]
        start += len(question.endings)
        right += int(score.argmax() == question.label)
        lengths = np.array([len(ending) for ending in question.endings])
        right_normalised += int((score / lengths).argmax() == question.label)
    return MultipleChoice(len(asked), len(questions) - len(asked), right / len(asked), right_normalised / len(asked))


def encode_question(question: Question, tokenizer: Tokenizer) -> list[tuple[IDS, int]]:
    """For each ending the token ids of context, blank and ending, int64 (T,), and how many of them are the context's.

    A blank that ends the context belongs to the ending, whose first token it usually begins. Raises InputError, which
    names the line, for a character that the tokenizer lacks.
    """
    try:
        context = len(tokenizer.encode(question.context.rstrip(), allowed_special="all"))
        texts = [f"{question.context} {ending}" for ending in question.endings]
        return [(np.array(tokenizer.encode(text, allowed_special="all"), np.int64), context) for text in texts]
    except InputError as error:
        raise InputError(f"the question in line {question.line}: {error}") from error


@torch.no_grad()
def loglikelihoods(
    model: GPT,
    rows: Sequence[tuple[IDS, int]],
    batch_size: int = 8,
    advance: Callable[[int], object] = lambda rows: None,
) -> npt.NDArray[np.float64]:
    """Log-likelihood (N,), in nats, of the end of each of N token sequences, given its beginning.

    rows: token ids (T,) with 2 <= T <= block_size + 1, and the index, at least 1, of the first one that counts. Sequences
    of similar length share a batch, the longest first, so that memory that does not suffice shows at once. They are padded
    on the right, where causal attention keeps the padding from everything that is read. The model must be in evaluation
    mode.
    """
    device = model.lm_head.weight.device
    out = np.zeros(len(rows))
    order = np.argsort([-len(tokens) for tokens, _ in rows], kind="stable")
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        idx, lengths = pad([rows[i][0] for i in batch])  # (B, T)
        starts = torch.tensor([rows[i][1] for i in batch])
        position = torch.arange(1, idx.shape[1])
        counts = (position >= starts[:, None]) & (position < lengths[:, None])  # (B, T - 1)
        hidden = model.transformer(idx[:, :-1].to(device))[counts.to(device)]  # (tokens that count, C)
        loss = F.cross_entropy(model.lm_head(hidden).float(), idx[:, 1:][counts].to(device), reduction="none")
        out[batch] = -np.bincount(counts.nonzero()[:, 0].numpy(), loss.double().cpu().numpy(), len(batch))
        advance(len(batch))
    return out


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a JSONL file. Raises MissingFileError for no such file, and InputError, with the line's number, for
    broken JSON, a key that is missing or has another type, text that is empty, and a label that is no ending's position."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no file at '{path}'")
    questions = []
    for line, entry in json_rows(path):
        try:
            questions.append(_question(line, entry))
        except InputError as error:
            raise InputError(f"'{path}', line {line}: {error}") from error
    if not questions:
        raise InputError(f"'{path}' has no questions: it is empty")
    return questions


def _question(line: int, entry: dict[str, Any]) -> Question:
    split = "ctx_a" in entry
    context = f"{_text(entry, 'ctx_a')} {_text(entry, 'ctx_b', '').capitalize()}" if split else _text(entry, "ctx")
    activity = _text(entry, "activity_label", "")
    context = _clean(f"{activity}: {context}" if activity else context)
    if not context.strip():
        raise InputError("the context is empty")
    endings = entry.get("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(ending, str) for ending in endings):
        raise InputError(f"'endings' must be a list of two texts or more, got {_shown(endings)}")
    endings = [_clean(ending) for ending in endings]
    for index, ending in enumerate(endings):
        if not ending.strip():
            raise InputError(f"ending {index} is empty")
    label = entry.get("label")
    if isinstance(label, str) and label.strip().isdecimal():  # "3", as in the copy on Hugging Face's hub
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(endings):
        raise InputError(
            f"'label' must be the right ending's position, from 0 to {len(endings) - 1}, got {_shown(label)}"
            + "; HellaSwag's test part has no labels" * (label in (None, ""))
        )
    return Question(line, context, endings, label)


def _text(entry: dict[str, Any], key: str, default: str | None = None) -> str:
    value = entry.get(key, default)
    if not isinstance(value, str):
        keys = _shown(", ".join(entry))
        raise InputError(f"'{key}' must be text, got {_shown(value)}" if key in entry else f"no '{key}' among {keys}")
    return value


def _shown(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _clean(text: str) -> str:
    """As the harness does it. [header], [title], [step] and the like are left over from WikiHow's pages."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
