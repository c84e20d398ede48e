"""A look into a model's token vectors: nearest neighbours, a map of words in two dimensions, and export as text.

pygpt embeddings runs/mine --near king London
pygpt embeddings runs/mine --map-top 200 --method tsne
pygpt embeddings runs/mine --export vectors.txt
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pygpt.data import load_tokens
from pygpt.errors import InputError, MissingFileError
from pygpt.maps import draw_map
from pygpt.pretrained import load_with_tokenizer, resolve_checkpoint
from pygpt.tokenizer import TOKENIZER_FILE, CharTokenizer, Tokenizer, load_tokenizer
from pygpt.word2vec import Vectors, escape, read_word2vec, token_vectors, unescape, write_word2vec

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """Look into a model's token vectors: nearest neighbours, a map in two dimensions, export.

    A word stands for its tokens in running text, thus with the space before it: king is the token "▁king". Where it has
    several tokens, the mean of their vectors is taken. One certain token is written with an equals sign, as this
    command prints it: =king, =▁king, =\\x0a.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best checkpoint), a checkpoint, a model folder, or a file of vectors in word2vec's text format."""
    near: tuple[str, ...] = ()
    """Show the tokens nearest to each of these words, by the cosine of the angle between the vectors."""
    count: int = 10
    """Neighbours to show."""
    map: tuple[str, ...] = ()
    """Draw a map of these words."""
    map_file: Path | None = None
    """Draw a map of the words in this text file, one a line."""
    map_top: int | None = None
    """Draw a map of this many tokens made of letters: the most frequent in --data, or without it the first of the
    vocabulary, which byte-pair encoding orders by frequency, roughly."""
    data: Path | None = None
    """Folder that `pygpt prepare` wrote. Only tokens of its training part are shown as neighbours or counted for
    --map-top; others that the model has never seen have vectors that mean nothing."""
    method: Literal["pca", "tsne"] = "pca"
    """pca keeps distances as far as two dimensions can; tsne keeps neighbourhoods."""
    seed: int = 0
    """For tsne."""
    out: Path | None = None
    """Folder for map_pca.png and map_pca.html (or map_tsne); by default `embeddings` in RUN, or beside its file."""
    export: Path | None = None
    """Write all vectors to this file in word2vec's text format."""

    def __post_init__(self) -> None:
        for name in ("count", "map_top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be from 0 to 4294967295, got {self.seed}")
        if not (self.near or self.maps or self.export):
            raise InputError("nothing to do: ask for --near, --map, --map-file, --map-top or --export")
        if self.data is not None and not self.near and self.map_top is None:
            raise InputError("data is for near and map_top: it says which tokens occur, and how often")

    @property
    def maps(self) -> bool:
        """Whether a map is asked for."""
        return bool(self.map or self.map_file or self.map_top)

    @property
    def folder(self) -> Path:
        """Where maps go."""
        return self.out or (self.run if self.run.is_dir() else self.run.parent) / "embeddings"


@dataclass(frozen=True)
class Word:
    """A word looked up: its tokens and their mean vector (C,), float32."""

    text: str
    tokens: list[bytes]
    vector: Floats


def embeddings(config: EmbeddingsConfig, console: Console) -> None:
    """Carry out `pygpt embeddings`."""
    tell = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    vectors, tokenizer = load_vectors(config.run)
    among = None if config.data is None else _by_frequency(config.data, vectors, tokenizer)
    for text in config.near:
        word = find_word(vectors, tokenizer, text)
        tell(f"nearest to {_describe(word)}")
        table = Table("token", "cosine")
        for token, cosine in neighbours(vectors, word, config.count, among):
            table.add_row(Text(escape(token)), f"{cosine:.4f}")
        console.print(table)
    if config.maps:
        words = _map_words(config, vectors, tokenizer, among)
        points = np.stack([word.vector for word in words])
        labels = [word.text.removeprefix("=") or "=" for word in words]
        hover = [_describe(word) for word in words]
        for path in draw_map(points, labels, hover, config.folder, config.method, config.seed, console):
            tell(f"map of {len(words)} words: {path}")
    if config.export:
        write_word2vec(config.export, vectors)
        size = f"{len(vectors.tokens):,} vectors of dimension {vectors.table.shape[1]}"
        tell(f"{size}: {config.export}")


def load_vectors(path: str | Path) -> tuple[Vectors, Tokenizer | None]:
    """The vectors of a run, checkpoint or model folder with its tokenizer, or those of a file in word2vec's format."""
    if Path(path).is_file():
        return read_word2vec(path), None
    folder = resolve_checkpoint(path)
    model, tokenizer = load_with_tokenizer(folder)
    return token_vectors(model, tokenizer), tokenizer


def find_word(vectors: Vectors, tokenizer: Tokenizer | None, text: str) -> Word:
    """Look a word up as `EmbeddingsConfig` describes. Raises InputError for a token that has no vector.

    Without a tokenizer (vectors from a file) a word is one token, with or without a space before it.
    """
    tokens = _tokens(vectors, tokenizer, text)
    unknown = [escape(token) for token in tokens if token not in vectors.row]
    if unknown or not tokens:
        raise InputError(f"'{text}': there is no vector for {' '.join(unknown) or 'an empty word'}")
    return Word(text, tokens, vectors.table[[vectors.row[token] for token in tokens]].mean(0))


def _tokens(vectors: Vectors, tokenizer: Tokenizer | None, text: str) -> list[bytes]:
    if text.startswith("=") and len(text) > 1:
        return [unescape(text[1:])]
    spaced = f" {text}" if text[:1].isalnum() else text
    if tokenizer is None:
        return [token for token in (spaced.encode(), text.encode()) if token in vectors.row][:1] or [text.encode()]
    if isinstance(tokenizer, CharTokenizer):  # to it a space is a character of its own
        spaced = text
    return [tokenizer.decode_bytes([token]) for token in tokenizer.encode_ordinary(spaced)]


def _describe(word: Word) -> str:
    tokens = " ".join(escape(token) for token in word.tokens)
    return f"{tokens}, the mean of {len(word.tokens)} tokens" if len(word.tokens) > 1 else tokens


def neighbours(
    vectors: Vectors, word: Word, count: int, among: Sequence[bytes] | None = None
) -> list[tuple[bytes, float]]:
    """The `count` tokens whose vectors have the largest cosine with the word's, and that cosine; of all tokens or `among`
    some of them, but never the word's own."""
    length = np.linalg.norm(word.vector)
    if length == 0:
        raise InputError(f"'{word.text}' has the vector 0, which has no direction and thus no neighbours")
    lengths = np.linalg.norm(vectors.table, axis=1)
    cosines = vectors.table @ (word.vector / length) / np.where(lengths > 0, lengths, 1)
    if among is not None:
        others = np.ones(len(cosines), bool)
        others[[vectors.row[token] for token in among]] = False
        cosines[others] = -np.inf
    cosines[[vectors.row[token] for token in word.tokens]] = -np.inf
    best = np.argsort(-cosines, kind="stable")[:count]
    return [(vectors.tokens[row], float(cosines[row])) for row in best if cosines[row] > -np.inf]


def _map_words(
    config: EmbeddingsConfig, vectors: Vectors, tokenizer: Tokenizer | None, frequent: Sequence[bytes] | None
) -> list[Word]:
    texts = list(config.map)
    if config.map_file is not None:
        if not config.map_file.is_file():
            raise MissingFileError(f"No file of words at {config.map_file}")
        try:
            lines = config.map_file.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{config.map_file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        texts += [line.strip() for line in lines if line.strip()]
    if config.map_top is not None:
        least = 1 if isinstance(tokenizer, CharTokenizer) else 2
        found = [token for token in frequent or vectors.tokens if _letters(token) >= least]
        texts += [f"={escape(token)}" for token in found[: config.map_top]]
    words = [find_word(vectors, tokenizer, text) for text in dict.fromkeys(texts)]
    if len(words) < 3:
        raise InputError(f"a map needs at least 3 different words, got {len(words)}")
    return words


def _by_frequency(data: Path, vectors: Vectors, tokenizer: Tokenizer | None) -> list[bytes]:
    """The tokens that occur in prepared data, the most frequent first."""
    if tokenizer is None:
        raise InputError(
            "a file of vectors has no tokenizer, so that the tokens of --data mean nothing: leave --data out"
        )
    file = load_tokens(data)
    if not (data / TOKENIZER_FILE).is_file() or load_tokenizer(data).to_dict() != tokenizer.to_dict():
        raise InputError(f"'{data}' was prepared with another tokenizer than the model's ('{tokenizer.name}')")
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(file), 1 << 24):
        counts += np.bincount(file.tokens[start : start + (1 << 24)], minlength=len(counts))
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return [token for token in (tokenizer.decode_bytes([row]) for row in order.tolist()) if token in vectors.row]


def _letters(token: bytes) -> int:
    """Number of letters of a token that is letters and nothing else but a space before them; 0 for any other."""
    word = token.removeprefix(b" ").decode("utf-8", errors="replace")
    return len(word) if word.isalpha() else 0
