"""Generation with a KV cache: each step computes one token per row, not the whole sequence again.

    model.generate(idx, 100, temperature=0.8, top_k=50)               # a tensor (B, T), or lists of different lengths

    generation = Generation(model, prompts, 100, top_p=0.9, num_samples=3, seed=1)
    for tokens in generation:                                        # a step: {row: its next token}
        ...                                                          # generation.finish(row) ends a row

Prompts of different lengths are padded on the left; a token sees nothing of the padding, and positions count from the
prompt's first token, so that a row comes out as if it were alone, up to rounding. A row that has ended leaves the batch.

The rule for a context longer than block_size: a row that has filled it is cut to its last block_size // 2 tokens (at least
one), the newest included; they are encoded again from position 0, and generation goes on from there. Each row follows the
rule on its own, whatever the others' lengths.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pygpt.errors import InputError, InputTypeError
from pygpt.nn import KVCache

if TYPE_CHECKING:
    from pygpt.model import GPT

Prompts = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. The settings apply in this order: repetition_penalty, temperature, top_k, top_p."""

    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely (Keskar et al., 2019: CTRL): a positive logit is
    divided by it, a negative one multiplied."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep only the k likeliest tokens, and those as likely as the k-th."""
    top_p: float | None = None
    """Keep only the fewest likeliest tokens whose probabilities sum to at least p (Holtzman et al., 2020)."""

    def __post_init__(self) -> None:
        for name in ("repetition_penalty", "temperature", "top_p"):
            if not isinstance(value := getattr(self, name), Real | None):
                raise InputError(f"{name} must be a number, got {value!r}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0 (1 changes nothing), got {self.repetition_penalty}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 1):
            raise InputError(f"top_k must be a whole number of at least 1, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6  # dividing by less overflows float32; the result is the same

    def _likeliest(self, logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """logits (B, V) -> the same in float32, penalised, and of each row the largest, (B,), and its token, (B,) int64."""
        logits = logits.float()
        if seen is not None and self.repetition_penalty != 1:
            penalised = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        largest, token = logits.max(-1)
        if not largest.isfinite().all():
            raise InputError("the model's logits are not finite numbers: its weights are damaged, or training diverged")
        return logits, largest, token

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The distribution that tokens are drawn from: logits (B, V) -> (B, V) float32, rows sum to 1.

        seen: bool (B, V), the tokens that repetition_penalty is about. Raises InputError for logits that are NaN or inf.
        """
        logits, largest, likeliest = self._likeliest(logits, seen)
        if self.greedy:
            return F.one_hot(likeliest, logits.shape[1]).float()
        logits = (logits - largest[:, None]) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        p = logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            p = p.masked_fill(p < _least_of_top(p, self.top_p), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def sample(self, logits: Tensor, uniform: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draw a token per row of logits (B, V) -> (B,) int64, a function of numbers in [0, 1): uniform, float64 (B,)."""
        if self.greedy:
            return self._likeliest(logits, seen)[2]
        p = self.probabilities(logits, seen)
        # The first token at which the cumulative probability exceeds the number. In float64 (which MPS does not have)
        # every token can be hit, and none whose probability is 0.
        cumulative = (p.cpu() if p.device.type == "mps" else p).double().cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]
        return torch.searchsorted(cumulative, uniform.to(cumulative)[:, None], right=True).squeeze(1)


def _least_of_top(p: Tensor, top_p: float) -> Tensor:
    """The smallest probability, (B, 1), among the fewest largest of p (B, V) that sum to at least top_p.

    Looks at more and more of the largest, because sorting a whole vocabulary costs as much as a small model's step.
    """
    k = 0
    while True:
        k = min(max(64, 8 * k), p.shape[1])
        largest = p.topk(k).values
        sums = largest.cumsum(-1)
        if k == p.shape[1] or (sums[:, -1] >= top_p).all():
            return largest.masked_fill(sums - largest >= top_p, math.inf).amin(-1, keepdim=True)


class Generation:
    """Continues prompts, a token per row and step, for up to max_new_tokens steps or until all rows are finished.

    prompts: token ids, (B, T) int64 or a sequence of B sequences of any lengths from 1 to block_size. temperature, top_k,
    top_p and repetition_penalty are those of `Sampling`. num_samples rows continue each prompt: rows i * num_samples ..
    (i + 1) * num_samples - 1 are those of prompt i. eos_id: a row ends with this token. vocab_size: only smaller token ids
    are drawn (a model's vocabulary may be padded). Iterating (once) yields {row: token} per step, without the rows that
    have ended, and sets the model to evaluation mode meanwhile. `tokens` are the ids of each row, prompt included.

    With a seed, what a row draws depends on the seed, the number of its prompt in the batch and of its sample, and on its
    prompt, not on other rows or how many there are. Without one, the seed comes from torch's default generator.
    Raises InputError or InputTypeError for prompts and settings that cannot be used.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Prompts,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        num_samples: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative, got {max_new_tokens}")
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        self.model, self.max_new_tokens, self.num_samples = model, max_new_tokens, num_samples
        self.sampling = Sampling(
            repetition_penalty=repetition_penalty, temperature=temperature, top_k=top_k, top_p=top_p
        )
        self.tokens = [list(ids) for ids in _checked(model, prompts) for _ in range(num_samples)]
        self._eos_id, self._seed, self._vocab_size = eos_id, seed, vocab_size
        self._rows = list(range(len(self.tokens)))  # the row that each row of the cache holds
        self._starts: list[int] = []  # column of the cache at which each row's context begins
        self._finished: set[int] = set()
        self._random: list[np.random.Generator] = []
        self._seen: Tensor | None = None

    def finish(self, row: int) -> None:
        """Take a row out before the next step: it gets no more tokens."""
        self._finished.add(row)

    @torch.no_grad()
    def __iter__(self) -> Iterator[dict[int, int]]:
        if not self.tokens or not self.max_new_tokens:
            return
        was_training = self.model.training
        self.model.eval()
        try:
            for step in range(self.max_new_tokens):
                hidden = self._encode_last() if step else self._encode_prompts()  # (B, C)
                tokens = self._sample(self.model.lm_head(hidden)[:, : self._vocab_size])
                self._finished.update(row for row, token in tokens.items() if token == self._eos_id)
                yield tokens
                if len(self._finished) == len(self.tokens):
                    return
        finally:
            self.model.train(was_training)

    def _encode_prompts(self) -> Tensor:
        """Each prompt once, whatever the number of samples -> hidden states of the last tokens."""
        weight, n = self.model.transformer.wte.weight, self.num_samples
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        longest = max(map(len, self.tokens))
        capacity = min(self.model.config.block_size, longest + self.max_new_tokens - 1)  # the last token is not encoded
        self._cache = KVCache(self.model.config, len(self.tokens), weight.device, dtype, capacity)
        self._starts = [longest - len(ids) for ids in self.tokens]
        prompts, starts, first = self.tokens[::n], self._starts[::n], None
        padded = torch.tensor([[0] * start + ids for start, ids in zip(starts, prompts, strict=True)])
        if any(starts):  # each token of the padding sees itself alone
            first = torch.minimum(torch.arange(longest), torch.tensor(starts)[:, None]).int().to(weight.device)
        hidden = self.model.transformer(padded.to(weight.device), self._cache, first)[:, -1]
        if n > 1:
            for row in reversed(self._rows):  # downwards: no prompt is overwritten before it is copied
                self._cache.copy_row(row // n, row)
        return hidden.repeat_interleave(n, 0)

    def _encode_last(self) -> Tensor:
        """The newest token of each row that goes on -> its hidden state."""
        self._drop_finished()
        if self._cache.length == self._cache.capacity:
            self._make_room()
        device, starts = self._cache.k.device, [self._starts[row] for row in self._rows]
        first = torch.tensor(starts, dtype=torch.int32, device=device)[:, None] if any(starts) else None
        newest = torch.tensor([self.tokens[row][-1:] for row in self._rows], device=device)
        return self.model.transformer(newest, self._cache, first)[:, -1]

    def _drop_finished(self) -> None:
        """The last row of the batch takes the place of one that has ended."""
        for index in reversed(range(len(self._rows))):
            if self._rows[index] in self._finished:
                last = self._rows.pop()
                if index < len(self._rows):
                    self._rows[index] = last
                    self._cache.copy_row(len(self._rows), index)
                    if self._seen is not None:
                        self._seen[index] = self._seen[len(self._rows)]

    def _make_room(self) -> None:
        """Encode the last half of each row that fills the context again, and move the other rows to the left."""
        cache, block_size = self._cache, self.model.config.block_size
        again = max(1, block_size // 2) - 1  # without the newest token, which is encoded together with the other rows'
        lengths = [cache.length - self._starts[row] for row in self._rows]
        kept = [again if length == block_size else length for length in lengths]
        for index, row in enumerate(self._rows):
            self._starts[row] = max(kept) - kept[index]
            if lengths[index] < block_size:
                cache.copy_row(index, index, left=cache.length - max(kept))
            elif again:
                ids = torch.tensor([self.tokens[row][-again - 1 : -1]], device=cache.k.device)
                self.model.transformer(ids, cache.part(index, self._starts[row], max(kept)))
        cache.length = max(kept)

    def _sample(self, logits: Tensor) -> dict[int, int]:
        """logits (B, V) of the rows that go on -> their next tokens."""
        sampling, rows = self.sampling, self._rows
        if sampling.repetition_penalty != 1 and self._seen is None:
            vocabulary = self.model.config.vocab_size
            self._seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=logits.device)
            for row, ids in enumerate(self.tokens):
                self._seen[row, torch.tensor(ids, device=logits.device)] = True
        if not sampling.greedy and not self._random:
            seed = int(torch.randint(2**63 - 1, ())) if self._seed is None else self._seed % 2**64
            self._random = [np.random.default_rng([seed, *divmod(row, self.num_samples)]) for row in rows]
        uniform = [0.0 if sampling.greedy else self._random[row].random() for row in rows]
        seen = None if self._seen is None else self._seen[: len(rows), : logits.shape[1]]
        tokens = sampling.sample(logits, torch.tensor(uniform, dtype=torch.float64), seen)
        if self._seen is not None:
            self._seen[torch.arange(len(rows)), tokens] = True
        drawn = dict(zip(rows, tokens.tolist(), strict=True))
        for row, token in drawn.items():
            self.tokens[row].append(token)
        return drawn


def _checked(model: GPT, prompts: Prompts) -> list[list[int]]:
    """The prompts as lists; InputError or InputTypeError for those that the model cannot continue."""
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    if isinstance(prompts, Tensor) and prompts.dim() != 2:
        raise InputError(f"the prompts must be token ids (B, T), got {tuple(prompts.shape)}")
    try:
        rows = [
            [operator.index(token) for token in ids]
            for ids in (p.tolist() if isinstance(p, Tensor) else p for p in prompts)
        ]
    except TypeError as error:
        raise InputTypeError(f"the prompts must be integer token ids, (B, T) or a list of lists ({error})") from None
    for number, ids in enumerate(rows):
        if not ids:
            raise InputError(f"prompt {number} is empty (T >= 1 is needed); start from end-of-text")
        if len(ids) > block_size:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens, more than the model's block_size ({block_size}); "
                f"keep its last {block_size} tokens or fewer"
            )
        outside = [token for token in ids if not 0 <= token < vocab_size]
        if outside:
            raise InputError(
                f"token id {outside[0]} of prompt {number} is outside the model's vocabulary ({vocab_size})"
            )
    return rows
