"""Token vectors as text, in the format of word2vec (Mikolov et al., 2013), which gensim and many others read and write.

The first line holds the number of vectors and their dimension, every other line a token and its values, separated by
spaces. As neither spaces nor line breaks can be part of a token there, `escape` writes a space as `▁` (as SentencePiece
does) and every other byte that is no printable character as `\\xNN`, so that GPT-2's tokens, which include spaces and
fractions of characters, come back byte for byte. The token of " king" is the line `▁king 0.1 ...`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from pygpt.errors import InputError, MissingFileError
from pygpt.model import GPT
from pygpt.tokenizer import Tokenizer

SPACE = "▁"
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


@dataclass(frozen=True)
class Vectors:
    """Tokens and a vector for each.

    Attributes:
        tokens: the bytes of N different tokens.
        table: (N, C) float32.
    """

    tokens: list[bytes]
    table: npt.NDArray[np.float32]

    @cached_property
    def row(self) -> dict[bytes, int]:
        """The row of each token."""
        return {token: row for row, token in enumerate(self.tokens)}


def escape(token: bytes) -> str:
    """A token as printable text without spaces: "▁" for a space, `\\xNN` for a byte of anything not printable, of "▁"
    itself and of a backslash."""
    text = token.decode("utf-8", errors="surrogateescape")
    return "".join(
        character
        if character.isprintable() and character not in " \\" + SPACE
        else SPACE
        if character == " "
        else "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors="surrogateescape"))
        for character in text
    )


def unescape(text: str) -> bytes:
    """The token that `escape` wrote. Other text, of files that pygpt did not write, is taken as it stands."""
    plain = text.replace(SPACE, " ").encode("utf-8", errors="surrogateescape")
    return _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), plain)


def token_vectors(model: GPT, tokenizer: Tokenizer) -> Vectors:
    """The rows of a model's token embedding, in the order of their ids, without those that stand for no token."""
    table = model.transformer.wte.weight.detach().float().cpu().numpy()
    tokens = _tokens(tokenizer, len(table))
    return Vectors(list(tokens.values()), table[list(tokens)])


def write_word2vec(path: str | Path, vectors: Vectors) -> None:
    """Write vectors as text, with as many digits as give every float32 back exactly."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    row_format = " %.9g" * vectors.table.shape[1] + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(f"{len(vectors.tokens)} {vectors.table.shape[1]}\n")
            for token, row in zip(vectors.tokens, vectors.table, strict=True):
                file.write(escape(token) + row_format % tuple(row.tolist()))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}") from error


def read_word2vec(path: str | Path, only: Collection[bytes] | None = None, size: int | None = None) -> Vectors:
    """Read vectors from text; where `only` is given, just those of its tokens, as a file may be larger than memory.

    A token that occurs twice keeps its first vector, as with gensim. Raises MissingFileError where there is no file, and
    InputError with the line's number for what is not in the format, or where the vectors' dimension is not `size`.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"No file of vectors at {path}")
    try:
        with path.open("rb") as file:
            return _read(path, file, only, size)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}") from error


def _read(path: Path, file: BinaryIO, only: Collection[bytes] | None, expected: int | None) -> Vectors:
    header = re.fullmatch(rb"(\d+) (\d+)\s*", file.readline(100))
    if header is None or int(header[2]) < 1:
        raise InputError(
            f"{path}, line 1: expected the number of vectors and their dimension, as in '400000 300'. A file of GloVe has "
            "no such line: put it in front"
        )
    count, size = int(header[1]), int(header[2])
    if expected is not None and size != expected:
        raise InputError(f"{path} has vectors of dimension {size}; the model needs n_embd of them, {expected}")
    found: dict[bytes, npt.NDArray[np.float32]] = {}
    number = 1
    for number, line in enumerate(file, 2):
        if number > count + 1:
            raise InputError(f"{path}, line {number}: more than the {count} vectors that line 1 announces")
        fields = line.rstrip(b" \r\n").rsplit(b" ", size)  # a token of another program may hold spaces
        if len(fields) <= size:
            raise InputError(f"{path}, line {number}: a token and {size} values expected, got {len(fields)} fields")
        token = _token(path, number, fields[0])
        if token in found or (only is not None and token not in only):
            continue
        try:
            with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
                row = np.array([float(field) for field in fields[1:]], np.float32)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if not np.isfinite(row).all():
            raise InputError(f"{path}, line {number}: a value is infinite or not a number")
        found[token] = row
    if number != count + 1:
        raise InputError(f"{path} ends after line {number}: line 1 announces {count} vectors, it has {number - 1}")
    table = np.stack(list(found.values())) if found else np.empty((0, size), np.float32)
    return Vectors(list(found), table)


def _token(path: Path, number: int, field: bytes) -> bytes:
    try:
        return unescape(field.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: the token is not UTF-8 text ({error.reason})") from None


@torch.no_grad()
def init_embeddings(model: GPT, tokenizer: Tokenizer, path: str | Path, rescale: bool = True) -> int:
    """Copy pretrained vectors into the rows of the token embedding (and of the head, which shares them), in place.

    A token takes the vector of exactly its bytes or else, as files of word vectors know no spaces, of its bytes without
    the space in front. Other tokens keep what they have. One factor for all vectors gives them the root mean square of
    the rows they replace: angles stay, and logits start as small as the model's initialisation means them to be.
    rescale=False copies them as they are.

    Returns the number of tokens that were given a vector. Raises InputError where that is none, or where the vectors'
    dimension is not n_embd.
    """
    weight = model.transformer.wte.weight
    tokens = _tokens(tokenizer, len(weight))
    wanted = {*tokens.values(), *(token.removeprefix(b" ") for token in tokens.values())}
    vectors = read_word2vec(path, wanted, weight.shape[1])
    rows = {
        token_id: vectors.row.get(token, vectors.row.get(token.removeprefix(b" ")))
        for token_id, token in tokens.items()
    }
    matched = {token_id: row for token_id, row in rows.items() if row is not None}
    new = torch.from_numpy(vectors.table[list(matched.values())])
    if not new.any():
        what = "only zeros for the tokens" if matched else f"no vector for any of the {len(tokens):,} tokens"
        raise InputError(f"{path} has {what} of {tokenizer.name!r}: is it for another vocabulary?")
    ids = torch.tensor(list(matched))
    if rescale:
        new *= weight[ids].float().square().mean().sqrt().cpu() / new.square().mean().sqrt()
    weight[ids] = new.to(weight)
    return len(matched)


def _tokens(tokenizer: Tokenizer, size: int) -> dict[int, bytes]:
    """The bytes of each id below `size` that has any. Tables are often padded, and some vocabularies have gaps."""
    tokens = {}
    for token_id in range(min(size, tokenizer.vocab_size)):
        with suppress(InputError):
            tokens[token_id] = tokenizer.decode_bytes([token_id])
    return tokens
