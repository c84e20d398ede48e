"""Text in, text out: generation as `pygpt.generate` does it, between a tokenizer's encoding and decoding.

    generate_text(model, tokenizer, ["Once upon", "The end"], max_new_tokens=50, stop=["\\n"], temperature=0.8, seed=1)
    for piece in stream_text(model, tokenizer, ["Once upon"]):
        print(piece.text, end="", flush=True)

A text ends before the first stop string in it, wherever tokens begin and end, or with end-of-text, or after max_new_tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pygpt.errors import InputError
from pygpt.generate import Generation
from pygpt.tokenizer import Tokenizer, encode_prompt

if TYPE_CHECKING:
    from pygpt.model import GPT


class Piece(NamedTuple):
    """What comes next in one of the texts. The last piece of each is marked; a piece may be empty."""

    row: int
    text: str
    last: bool


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
    **settings: Any,
) -> list[str]:
    """What follows each prompt, prompts not included: num_samples texts of the first, then those of the next.

    prompts: texts, encoded by `encode_prompt`, or token ids. settings: temperature, top_k, top_p, seed,
    repetition_penalty, num_samples as in `pygpt.generate.Generation`, whose errors are raised too.
    """
    texts = [""] * (len(prompts) * settings.get("num_samples", 1))
    for piece in stream_text(model, tokenizer, prompts, max_new_tokens, stop, **settings):
        texts[piece.row] += piece.text
    return texts


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 200,
    stop: Sequence[str] = (),
    **settings: Any,
) -> Iterator[Piece]:
    """The texts of `generate_text` piece by piece, as soon as it is certain that a piece is no part of a stop string."""
    if isinstance(prompts, str):
        raise InputError("prompts must be a list of texts: put a single one in brackets")
    ids = [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    generation = Generation(
        model, ids, max_new_tokens, eos_id=tokenizer.eot_id, vocab_size=tokenizer.vocab_size, **settings
    )
    return _pieces(generation, tokenizer, [GrowingText(tokenizer, stop) for _ in generation.tokens])


def _pieces(generation: Generation, tokenizer: Tokenizer, texts: list[GrowingText]) -> Iterator[Piece]:
    going_on = set(range(len(texts)))
    for tokens in generation:
        for row, token in tokens.items():
            shown = texts[row].end() if token == tokenizer.eot_id else texts[row].add(token)
            if texts[row].ended:
                generation.finish(row)
                going_on.discard(row)
            yield Piece(row, shown, texts[row].ended)
    for row in sorted(going_on):
        yield Piece(row, texts[row].end(), True)


class GrowingText:
    """The text of a row as its tokens arrive: whole characters, up to the first stop string.

    Of several stop strings the one that is complete first counts, as if characters arrived one by one. What may turn out
    to be the beginning of a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [stop] if isinstance(stop, str) else list(stop)
        if "" in self._stop:
            raise InputError("a stop string must not be empty")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
        self._held = ""
        self.ended = False

    def add(self, token: int) -> str:
        """What can be shown after this token and could not before."""
        return self._grow(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._grow(self._decoder.decode(b"", final=True))
        if not self.ended:
            text, self._held, self.ended = text + self._held, "", True
        return text

    def _grow(self, more: str) -> str:
        text = self._held + more
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self._held, self.ended = "", True
            return text[: min(found)[1]]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[shown:]
        return text[:shown]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def in_order(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same pieces, one text after the other: those of later texts wait until the earlier ones have ended."""
    waiting: dict[int, list[Piece]] = {}
    row = 0
    for piece in pieces:
        waiting.setdefault(piece.row, []).append(piece)
        while row in waiting:
            ready = waiting.pop(row)
            yield from ready
            if not ready[-1].last:
                break
            row += 1
