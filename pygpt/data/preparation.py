"""Text to token files: what `pygpt prepare` runs.

Files and folders of text become `train.bin` and `val.bin` (see tokens.py), `meta.json` and the tokenizer. A document is
a file, or a row of a Parquet file's column `text`. With several documents, each is followed by `<|endoftext|>` and
whole documents go to validation. A single document is cut by position, its end being validation, with no special token:
exactly nanoGPT's data. The result does not depend on the number of worker processes, and appears under its final names
only when it is complete.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pygpt.data.corpus import Piece, Scan, find_files, find_sources, read_piece, scan_source, split_at_character
from pygpt.data.registry import dataset_path
from pygpt.data.tokens import DTYPES, META_FILE, META_VERSION
from pygpt.data.workers import OrderedMap, worker_count, workers
from pygpt.errors import InputError, InputTypeError, PygptError
from pygpt.tokenizer import TOKENIZER_FILE, CharTokenizer, Tokenizer, get_tokenizer, tokenizer_from_dict

UNIT_BYTES = 1 << 20  # text that a worker encodes at a time
SPLITS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn files or folders of text into token files for training."""

    inputs: tuple[Path, ...] = ()
    """Files, folders that are searched for text, or names that `pygpt data` lists. Without any: the source of Python's
    standard library."""

    out: Path = Path("data")
    """Folder for train.bin, val.bin, meta.json and the tokenizer."""

    tokenizer: str = "gpt2"
    """Encoding: gpt2, r50k_base, p50k_base, cl100k_base, o200k_base; or char, one token per character."""

    max_chars: int | None = None
    """With the char tokenizer: keep only this many characters, the most frequent, and one token for all others."""

    extensions: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    """How names of files in folders must end. Files that are named themselves are always read."""

    val_fraction: float = 0.1
    """Part of the text that is kept for validation, above 0 and below 1."""

    seed: int = 0
    """Chooses the documents for validation where there are several."""

    workers: int = 0
    """Processes that encode. 0: one per processor, but fewer for a text too small to be worth starting them."""

    def __post_init__(self) -> None:
        for name in ("inputs", "extensions"):
            if isinstance(getattr(self, name), (str, Path)):
                raise InputTypeError(f"{name} takes several values, got the single {getattr(self, name)!r}")
        if not self.extensions or not all(ending.startswith(".") for ending in self.extensions):
            raise InputError(f"extensions must each start with a dot, such as .txt; got {', '.join(self.extensions)!r}")
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction must be above 0 and below 1, got {self.val_fraction}")
        if self.max_chars is not None and self.tokenizer != "char":
            raise InputError(f"max_chars is for the char tokenizer, not for {self.tokenizer!r}")
        if self.max_chars is not None and self.max_chars < 1:
            raise InputError(f"max_chars must be at least 1, got {self.max_chars}")
        if self.workers < 0:
            raise InputError(f"workers must be 0 (automatic) or more, got {self.workers}")


@dataclass(frozen=True)
class PrepareSummary:
    """What `prepare` wrote: `meta` is the content of meta.json, `skipped` the files left out, with the reason."""

    folder: Path
    meta: dict[str, Any]
    skipped: list[tuple[str, str]]
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens in all splits together."""
        return sum(split["tokens"] for split in self.meta["splits"].values())

    def __str__(self) -> str:
        splits = self.meta["splits"]
        documents = self.meta["documents"]
        size = sum(split["bytes"] for split in splits.values())
        lines = [
            f"{documents:,} document{'s' if documents > 1 else ''}, {size / 1e6:,.1f} MB of text -> "
            f"{self.tokens:,} tokens of {self.meta['tokenizer']!r} (vocabulary {self.meta['vocab_size']:,}) "
            f"in {self.seconds:.1f} s, {self.tokens / self.seconds:,.0f} tokens/s",
            f"{self.folder}: " + ", ".join(f"{name}.bin {split['tokens']:,} tokens" for name, split in splits.items()),
        ]
        if self.skipped:
            lines.append(_describe_skipped(self.skipped))
        return "\n".join(lines)


def prepare(config: PrepareConfig, console: Console | None = None) -> PrepareSummary:
    """Writes the token files that `config` asks for, and shows progress and a summary on `console` (stderr).

    From a script of your own, either call it under `if __name__ == "__main__":` or with `workers=1`: worker processes
    import the script that started them.

    Raises InputError or MissingFileError for input that gives no text, or too little to split. Files in folders that
    are no UTF-8 text are left out, counted and listed in the summary.
    """
    started = time.perf_counter()
    console = console or Console(stderr=True)
    tokenizer: Tokenizer | None = None if config.tokenizer == "char" else get_tokenizer(config.tokenizer)
    files = find_files([dataset_path(name) for name in config.inputs], config.extensions)
    total = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    with workers(worker_count(config.workers, total)) as ordered_map, _progress(console) as progress:
        scans = _scan(ordered_map, progress, files, total, count_characters=tokenizer is None)
        documents = [scan for scan in scans if not scan.problem]
        skipped = [(scan.path, scan.problem) for scan in scans if scan.problem]
        if not documents:
            raise InputError(f"There is no text to prepare. {_describe_skipped(skipped)}")
        tokenizer = tokenizer or _char_tokenizer(documents, config.max_chars)
        if len(documents) == 1:
            splits = _split_by_position(documents[0], config.val_fraction)
        else:
            splits = _split_by_document(documents, config.val_fraction, config.seed)
        meta = _meta(config, tokenizer, documents, splits, skipped)
        with _complete_or_nothing(Path(config.out)) as folder:
            _write_tokens(ordered_map, progress, folder, tokenizer, meta, splits)
            tokenizer.save(folder)
            (folder / META_FILE).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    summary = PrepareSummary(Path(config.out), meta, skipped, time.perf_counter() - started)
    console.print(str(summary), markup=False, highlight=False, soft_wrap=True)
    return summary


def _scan(
    ordered_map: OrderedMap, progress: Progress, files: Sequence[str], total: int, count_characters: bool
) -> list[Scan]:
    scans: list[Scan] = []
    task = progress.add_task("Reading", total=total)
    sources = list(find_sources(files))
    scanned = ordered_map(partial(scan_source, count_characters=count_characters), sources)
    for source, documents in zip(sources, scanned, strict=True):
        scans += documents
        progress.advance(task, source.size)
    progress.update(task, completed=total)
    return scans


def _write_tokens(
    ordered_map: OrderedMap,
    progress: Progress,
    folder: Path,
    tokenizer: Tokenizer,
    meta: dict[str, Any],
    splits: dict[str, list[Piece]],
) -> None:
    """Writes a `.bin` file for each split, and its number of tokens into `meta`."""
    task = progress.add_task("Encoding", total=sum(split["bytes"] for split in meta["splits"].values()))
    encode = partial(_encode, tokenizer.to_dict(), meta["dtype"], meta["documents"] > 1)
    for name, pieces in splits.items():
        with open(folder / f"{name}.bin", "wb") as file:
            for tokens, size in ordered_map(encode, _units(pieces)):
                file.write(tokens.tobytes())
                meta["splits"][name]["tokens"] += len(tokens)
                progress.advance(task, size)


def _char_tokenizer(documents: Sequence[Scan], max_chars: int | None) -> CharTokenizer:
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(document.characters)
    return CharTokenizer.from_counts(counts, max_chars=max_chars, end_of_text=len(documents) > 1)


def _split_by_position(document: Scan, val_fraction: float) -> dict[str, list[Piece]]:
    """The first part for training, the rest for validation, counted in characters: nanoGPT's split."""
    characters = sum(piece.characters for piece in document.pieces)
    position = int(characters * (1 - val_fraction))
    if not 0 < position < characters:
        raise InputError(
            f"{document.path} has {characters} characters: too few for a training and a validation part "
            f"with val_fraction {val_fraction}"
        )
    train, val = split_at_character(document.pieces, position)
    return {"train": train, "val": val}


def _split_by_document(documents: Sequence[Scan], val_fraction: float, seed: int) -> dict[str, list[Piece]]:
    """Random whole documents for validation, as many as stay within `val_fraction` of the bytes; at least one."""
    sizes = [_size(document.pieces) for document in documents]
    room = val_fraction * sum(sizes)
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    chosen = set()
    for index in order:
        if sizes[index] <= room:
            chosen.add(index)
            room -= sizes[index]
    if not chosen:
        chosen.add(min(order, key=lambda index: sizes[index]))
    splits: dict[str, list[Piece]] = {name: [] for name in SPLITS}
    for index, document in enumerate(documents):
        splits["val" if index in chosen else "train"] += document.pieces
    return splits


def _meta(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    documents: Sequence[Scan],
    splits: dict[str, list[Piece]],
    skipped: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    return {
        "version": META_VERSION,
        "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.name,
        "val_fraction": config.val_fraction,
        "seed": config.seed,
        "documents": len(documents),
        "skipped": dict(Counter(reason for _, reason in skipped)),
        "splits": {
            name: {"documents": sum(piece.ends_document for piece in pieces), "bytes": _size(pieces), "tokens": 0}
            for name, pieces in splits.items()
        },
    }


def _size(pieces: Iterable[Piece]) -> int:
    return sum(piece.end - piece.start for piece in pieces)


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces, about 1 MiB together: small files are not worth a message each."""
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += piece.end - piece.start
        if size >= UNIT_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _encode(
    tokenizer_state: dict[str, Any], dtype: str, separate: bool, unit: list[Piece]
) -> tuple[npt.NDArray[np.unsignedinteger], int]:
    """The tokens of a unit, and its size in bytes of text. Runs in a worker process."""
    tokenizer = _worker_tokenizer(tokenizer_state)
    parts = []
    for piece in unit:
        parts.append(tokenizer.encode_array(read_piece(piece)).astype(DTYPES[dtype]))
        if separate and piece.ends_document:
            parts.append(np.array([tokenizer.eot_id], DTYPES[dtype]))
    return np.concatenate(parts), _size(unit)


_built: tuple[dict[str, Any], Tokenizer] | None = None


def _worker_tokenizer(state: dict[str, Any]) -> Tokenizer:
    global _built
    if _built is None or _built[0] != state:
        _built = state, tokenizer_from_dict(state)
    return _built[1]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def _complete_or_nothing(out: Path) -> Iterator[Path]:
    """A temporary folder inside `out` whose files move into `out` at the end, meta.json last."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out) as name:
            yield Path(name)
            for file in (*(f"{split}.bin" for split in SPLITS), TOKENIZER_FILE, META_FILE):
                os.replace(Path(name) / file, out / file)
    except PygptError:
        raise
    except OSError as error:
        raise InputError(f"Cannot write to {out}: {error.strerror or error}") from error


def _describe_skipped(skipped: Sequence[tuple[str, str]]) -> str:
    counts = Counter(reason for _, reason in skipped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    path, reason = next(((path, reason) for path, reason in skipped if reason != "empty"), skipped[0])
    return f"Left out {len(skipped):,} document{'s' if len(skipped) > 1 else ''}: {reasons}; such as {path} ({reason})"
