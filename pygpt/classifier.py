"""A GPT that puts texts into classes: its last hidden state at the last real token, and a linear head on it.

    classifier = Classifier.from_pretrained("runs/spam")
    classifier.classify(["You won! Call now", "see you at 8"])   # -> [Prediction(label="spam", ...), ...]

Only the last token has seen the whole text, so it is the one that is read. Texts of a batch are padded on the right, where
causal attention keeps the padding from everything that is read. On disk a classifier is a GPT-2 folder with the head
(`score.weight`) and the labels (`id2label`), which `transformers` loads as GPT2ForSequenceClassification.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pygpt import pretrained
from pygpt.data.labelled import encode_text, pad
from pygpt.errors import InputError, InputTypeError
from pygpt.model import GPT
from pygpt.nn import Linear
from pygpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of a text, and the probability of each label."""

    label: str
    probabilities: dict[str, float]
    truncated: bool
    """Whether the text was longer than the classifier reads, so that its end was not seen."""

    @property
    def probability(self) -> float:
        """How sure the classifier is of `label`."""
        return self.probabilities[self.label]


class Classifier(nn.Module):
    """The transformer of `gpt`, shared with it, and a head without bias, freshly drawn from N(0, 0.02).

    labels: names of the classes, in the order of the logits. tokenizer: needed to classify text. max_length: tokens of a
    text that are read, block_size by default. Raises InputError for fewer than two labels, or the same twice.
    """

    def __init__(
        self, gpt: GPT, labels: Sequence[str], tokenizer: Tokenizer | None = None, max_length: int | None = None
    ) -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise InputError(f"a classifier needs at least two labels, each once, got {list(labels)}")
        block_size = gpt.config.block_size
        if max_length is not None and not 1 <= max_length <= block_size:
            raise InputError(f"max_length must be from 1 to the model's block_size ({block_size}), got {max_length}")
        self.config, self.labels, self.tokenizer = gpt.config, list(labels), tokenizer
        self.max_length = max_length or block_size
        self.transformer = gpt.transformer
        self.score = Linear(gpt.config.n_embd, len(labels), bias=False)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, idx: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, labels). idx: (B, T) int64, padded on the right with any token. lengths: (B,) int64, 1 to T, the
        number of real tokens in each row."""
        hidden = self.transformer(idx)  # (B, T, C)
        last = hidden[torch.arange(len(idx), device=idx.device), lengths - 1]  # (B, C)
        return self.score(last)

    @torch.no_grad()
    def logits(self, examples: Sequence[npt.NDArray[np.int64]], batch_size: int = 32) -> Tensor:
        """Logits (N, labels), float32 on the CPU, of N token sequences, each (T,) with 1 <= T <= block_size.

        Sequences of similar length share a batch. The model is in evaluation mode meanwhile.
        """
        device, was_training = self.score.weight.device, self.training
        out = torch.empty(len(examples), len(self.labels))
        order = np.argsort([len(example) for example in examples], kind="stable")
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                idx, lengths = pad([examples[row] for row in rows])
                out[torch.from_numpy(rows)] = self(idx.to(device), lengths.to(device)).float().cpu()
        finally:
            self.train(was_training)
        return out

    def classify(self, texts: Sequence[str], batch_size: int = 32) -> list[Prediction]:
        """A prediction for each text. One longer than `max_length` tokens is cut there. Raises InputError for a text
        without tokens, which names its position."""
        if isinstance(texts, str):
            raise InputTypeError("classify takes a list of texts, got one str: put it in a list")
        if self.tokenizer is None:
            raise InputError("the classifier has no tokenizer: pass one to Classifier(...), or token ids to logits()")
        examples, cut = [], []
        for number, text in enumerate(texts):
            try:
                ids, truncated = encode_text(text, self.tokenizer, self.max_length)
            except InputError as error:
                raise InputError(f"text {number}: {error}") from error
            examples.append(ids)
            cut.append(truncated)
        rows = self.logits(examples, batch_size).softmax(-1).tolist()
        return [
            Prediction(max(self.labels, key=p.__getitem__), p, truncated)
            for p, truncated in zip((dict(zip(self.labels, row, strict=True)) for row in rows), cut, strict=True)
        ]

    def flops_per_token(self) -> int:
        """Floating-point operations of forward + backward per token, as `GPT.flops_per_token`."""
        c = self.config
        return 6 * sum(p.numel() for p in self.parameters()) + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Classifier:
        """Load a classifier from a run (its best checkpoint) or a model folder: pygpt's, or a GPT-2 with a classification
        head that `transformers` saved. Raises InputError for a model without such a head."""
        folder = pretrained.resolve_checkpoint(path)
        gpt = GPT.from_pretrained(folder)
        score = _read_head(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = config.get("id2label") or {}  # `transformers` leaves out names it made up itself
        labels = [names.get(str(index), f"LABEL_{index}") for index in range(len(score))]
        tokenizer = pretrained.checkpoint_tokenizer(folder, gpt.config.vocab_size)
        model = cls(gpt, labels, tokenizer, config.get("pygpt_max_length"))
        if score.shape != model.score.weight.shape:
            raise InputError(f"'{folder}': score.weight is {tuple(score.shape)}, not (labels, {gpt.config.n_embd})")
        model.score.weight = nn.Parameter(score)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Save to a folder; `transformers` loads it as GPT2ForSequenceClassification."""
        pretrained.save(
            self,
            path,
            architectures=["GPT2ForSequenceClassification"],
            id2label={str(index): label for index, label in enumerate(self.labels)},
            label2id={label: index for index, label in enumerate(self.labels)},
            problem_type="single_label_classification",
            pad_token_id=None if self.tokenizer is None else self.tokenizer.eot_id,
            pygpt_max_length=self.max_length,
        )
        if self.tokenizer is not None:
            self.tokenizer.save(path)


def _read_head(folder: Path) -> Tensor:
    file = folder / "model.safetensors"
    if file.is_file():
        with safe_open(file, "pt") as tensors:
            if "score.weight" in tensors.keys():  # noqa: SIM118
                return tensors.get_tensor("score.weight")
    raise InputError(
        f"'{folder}' holds a language model without a classification head: train one with "
        f"pygpt finetune classify --init-from {folder} --data FILE"
    )
