"""Which files a corpus consists of, and where each is cut into pieces that can be encoded one by one.

A document is one file of UTF-8 text, or one row of a Parquet file. Files are read twice, block by block: here to check
the text and find the places to cut, and again when a piece is encoded; so a corpus may be larger than memory.
"""

from __future__ import annotations

import codecs
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from pygpt.data.parquet import count_row_groups, read_row_group
from pygpt.errors import InputError, MissingFileError
from pygpt.tokenizer import cut_position

PIECE_BYTES = 1 << 18

# Not the library itself (packages, tests), or tables rather than text (encodings). Linux distributions leave the
# tests out, so that with them the corpus would depend on where Python came from.
_NOT_CORPUS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


class Source(NamedTuple):
    """What is scanned at a time: a file, or a row group of a Parquet file. `size`: about its bytes on disk."""

    path: str
    size: int
    row_group: int | None = None
    problem: str = ""


class Piece(NamedTuple):
    """Bytes `start` to `end` of a file, or of the texts in a row group of a Parquet file: whole characters, and the same
    tokens as within the whole document."""

    path: str
    start: int
    end: int
    characters: int
    ends_document: bool
    row_group: int | None = None


@dataclass(slots=True)
class Scan:
    """What reading one document showed. `problem` says why it cannot be used; its pieces are then of no use."""

    path: str
    pieces: list[Piece] = field(default_factory=list)
    characters: Counter[str] = field(default_factory=Counter)
    problem: str = ""


def find_files(inputs: Sequence[str | Path], extensions: Iterable[str]) -> list[str]:
    """The files that `inputs` stand for, each once, in an order that depends on names alone.

    Files are taken as they are; folders are walked for files with one of `extensions`, hidden names left out. Without
    inputs: the source of Python's standard library.
    """
    endings = tuple(extension.lower() for extension in extensions)
    if not inputs:
        return _standard_library()
    found: dict[str, str] = {}
    for name in inputs:
        path = os.fspath(name)
        if os.path.isfile(path):
            files = [path]
        elif os.path.isdir(path):
            files = list(_walk(path, endings))
        elif os.path.exists(path):
            raise InputError(f"{path} is neither a file nor a folder")
        else:
            raise MissingFileError(f"No such file or folder: {path}")
        for file in files:
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def _walk(folder: str, endings: tuple[str, ...]) -> Iterator[str]:
    others: Counter[str] = Counter()
    matched = False
    closed: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=lambda error: closed.append(error.filename)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(endings):
                matched = True
                yield os.path.join(parent, name)
            else:
                others[os.path.splitext(name)[1] or "no extension"] += 1
    yield from closed  # folders that cannot be listed: scan_file reports them as unreadable
    if not matched and not closed:
        held = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5)) or "no files at all"
        raise InputError(f"No file in {folder} ends in {', '.join(endings)}: it holds {held}. Change `extensions`.")


def _standard_library() -> list[str]:
    folder = sysconfig.get_path("stdlib")
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _NOT_CORPUS)
        found += [os.path.join(parent, name) for name in sorted(files) if name.endswith(".py")]
    if not found:
        raise MissingFileError(f"This Python has no source of its standard library in {folder}: name a file or folder")
    return found


def find_sources(files: Iterable[str]) -> Iterator[Source]:
    """What to scan of each file."""
    for path in files:
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        if not path.lower().endswith(".parquet"):
            yield Source(path, size)
            continue
        count, problem = count_row_groups(path)
        if problem:
            yield Source(path, size, problem=problem)
        yield from (Source(path, size // count, index) for index in range(count))


def scan_source(source: Source, count_characters: bool) -> list[Scan]:
    """The documents of a source."""
    if source.problem:
        return [Scan(source.path, problem=source.problem)]
    if source.row_group is None:
        return [scan_file(source.path, count_characters)]
    try:
        texts, starts = read_row_group(source.path, source.row_group)
    except OSError:
        return [Scan(f"{source.path}, row group {source.row_group}", problem="unreadable")]
    scans = []
    for row, (start, end) in enumerate(pairwise(starts.tolist())):
        scan = Scan(f"{source.path}, row {row} of row group {source.row_group}")
        try:
            text = str(texts[start:end], "utf-8")
        except UnicodeDecodeError:
            text, scan.problem = "", "not UTF-8 text"
        if "\0" in text:
            scan.problem = "binary"
        elif text:
            scan.pieces.append(Piece(source.path, start, end, len(text), True, source.row_group))
            scan.characters.update(text if count_characters else "")
        else:
            scan.problem = scan.problem or "empty"
        scans.append(scan)
    return scans


def scan_file(path: str, count_characters: bool) -> Scan:
    """Checks that a file is text, and cuts it into pieces of about 256 KiB. A byte-order mark is left out."""
    scan = Scan(path)
    decoder = codecs.getincrementaldecoder("utf-8")()
    pending = ""
    try:
        if not os.path.isfile(path):  # a broken link; or a pipe, which would wait for ever
            scan.problem = "unreadable"
            return scan
        with open(path, "rb") as file:
            block = file.read(PIECE_BYTES).removeprefix(codecs.BOM_UTF8)
            start = file.tell() - len(block)
            while block:
                if b"\0" in block:
                    scan.problem = "binary"
                    return scan
                pending += decoder.decode(block)
                block = file.read(PIECE_BYTES)
                # A text with no good place to cut is cut anyway: the tokens there may differ, the text does not.
                cut = (cut_position(pending) or len(pending)) if block else len(pending)
                text, pending = pending[:cut], pending[cut:]
                if not text:
                    continue
                end = start + len(text.encode())
                scan.pieces.append(Piece(path, start, end, len(text), ends_document=not block))
                start = end
                if count_characters:
                    scan.characters.update(text)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        scan.problem = "not UTF-8 text"
    except OSError:
        scan.problem = "unreadable"
    else:
        scan.problem = "" if scan.pieces else "empty"
    return scan


def read_piece(piece: Piece) -> str:
    """The text of a piece."""
    try:
        if piece.row_group is not None:
            text = str(read_row_group(piece.path, piece.row_group)[0][piece.start : piece.end], "utf-8")
        else:
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                text = file.read(piece.end - piece.start).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if len(text) != piece.characters:
        raise InputError(f"{piece.path} changed while it was being read: try again")
    return text


def split_at_character(pieces: Sequence[Piece], position: int) -> tuple[list[Piece], list[Piece]]:
    """The pieces of one document before and after a character position, one of them cut in two where needed."""
    before: list[Piece] = []
    for index, piece in enumerate(pieces):
        if position < piece.characters:
            middle = piece.start + len(read_piece(piece)[:position].encode())
            left = piece._replace(end=middle, characters=position, ends_document=True)
            right = piece._replace(start=middle, characters=piece.characters - position)
            return [*before, *([left] if position else [])], [right, *pieces[index + 1 :]]
        before.append(piece)
        position -= piece.characters
    return before, []
