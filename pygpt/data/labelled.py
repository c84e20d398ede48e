"""Labelled texts: read from TSV, CSV or JSONL, balanced, split, and put into batches of similar length.

    data = read_labelled("SMSSpamCollection.tsv")             # label<TAB>text, no header
    train, val, test = split(data.labels, val=0.1, test=0.2, seed=0)

Which column is which. The columns are called `text` and `label` unless told otherwise. Names are looked up in the first
row, which is then a header; a JSON object's keys are its names. Columns told by index, from 0, make no header of the first
row unless `header=True`. Where nothing is told and the first row does not hold both names, a file of two columns has the
label first and no header, as UCI's SMS Spam Collection.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pygpt.data.samplers import _positive, _random_bits, _seed, _step
from pygpt.errors import InputError, MissingFileError
from pygpt.tokenizer import Tokenizer

FORMATS = {".tsv": "tsv", ".tab": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
IDS = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Labelled:
    """texts and labels, one of each per example; lines: where each begins in the file, from 1. skipped: rows left out,
    by reason."""

    texts: list[str]
    labels: list[str]
    lines: list[int]
    skipped: Counter[str]


def read_labelled(
    path: str | Path,
    text_column: str | int | None = None,
    label_column: str | int | None = None,
    header: bool | None = None,
    format: str | None = None,
) -> Labelled:
    """Every text and label of a file. Rows with an empty text or label are skipped and counted.

    format: tsv (tabs; quotes mean nothing), csv (commas; quotes as in RFC 4180) or jsonl; by default the file's ending
    decides. Raises MissingFileError for no such file, InputError for a column that is not there, a row that has more or
    fewer fields than the first, or broken JSON, with the line's number; and for more labels than texts in a file whose
    columns are not told, where the two are most likely the other way round.
    """
    path = Path(path)
    kind = _format(path, format, ("tsv", "csv", "jsonl"))
    found = Labelled([], [], [], Counter())
    for line, text, label in _rows(path, kind, text_column, label_column, header, labelled=True):
        if not text.strip() or not label.strip():
            found.skipped["empty text" if not text.strip() else "empty label"] += 1
            continue
        found.texts.append(text)
        found.labels.append(label.strip())
        found.lines.append(line)
    if not found.texts:
        raise InputError(f"'{path}' has no labelled text")
    different_texts, different_labels = len(set(found.texts)), len(set(found.labels))
    if kind != "jsonl" and text_column is None and label_column is None and different_labels > different_texts:
        raise InputError(
            f"'{path}' has {different_labels:,} different labels for {different_texts:,} different texts: is the text in "
            f"its first column? Say so with --text-column 0 --label-column 1 (and --header True if it has a header)"
        )
    return found


def read_texts(
    path: str | Path,
    text_column: str | int | None = None,
    header: bool | None = None,
    format: str | None = None,
) -> tuple[list[str], list[int], Counter[str]]:
    """Texts without labels: also a .txt file, one text per line -> texts, line numbers, skipped rows by reason."""
    path = Path(path)
    kind = _format(path, format, ("txt", "tsv", "csv", "jsonl"))
    texts, lines, skipped = [], [], Counter[str]()
    for line, text, _ in _rows(path, kind, text_column, None, header, labelled=False):
        if not text.strip():
            skipped["empty text"] += 1
            continue
        texts.append(text)
        lines.append(line)
    return texts, lines, skipped


def _format(path: Path, format: str | None, known: tuple[str, ...]) -> str:
    if not path.is_file():
        raise MissingFileError(f"no file at '{path}'")
    kind = format or FORMATS.get(path.suffix.lower(), "")
    if kind not in known:
        what = f"'{format}' is no format" if format else f"the name of '{path}' does not tell its format"
        raise InputError(f"{what}: give --format one of {', '.join(known)}")
    return kind


def _rows(
    path: Path, kind: str, text: str | int | None, label: str | int | None, header: bool | None, labelled: bool
) -> Iterator[tuple[int, str, str]]:
    """Line number, text and label ("" where no labels are wanted) of each row."""
    if kind == "jsonl":
        keys = "text" if text is None else str(text), "label" if label is None else str(label)
        for line, entry in json_rows(path):
            found = [_json_field(path, line, entry, key) for key in (keys if labelled else keys[:1])]
            yield line, found[0], found[1] if labelled else ""
        return
    if kind == "txt":
        yield from ((line, text, "") for line, text in _lines(path))
        return
    tabbed = ((line, text.split("\t")) for line, text in _lines(path))
    rows = tabbed if kind == "tsv" else _csv_rows(path)
    first = next(rows, None)
    if first is None:
        return
    columns, has_header = _columns(path, first[1], text, label, header, labelled)
    for line, fields in [] if has_header else [first]:
        yield line, fields[columns[0]], fields[columns[1]] if labelled else ""
    for line, fields in rows:
        if len(fields) != len(first[1]):
            raise InputError(f"'{path}', line {line}: {len(fields)} fields, where line {first[0]} has {len(first[1])}")
        yield line, fields[columns[0]], fields[columns[1]] if labelled else ""


def _columns(
    path: Path, first: list[str], text: str | int | None, label: str | int | None, header: bool | None, labelled: bool
) -> tuple[list[int], bool]:
    """Where text and label are, and whether the first row is a header. The module's docstring has the rule."""
    names = [name.strip().lower() for name in first]
    wanted = {"text": text, "label": label} if labelled else {"text": text}
    untold = all(column is None for column in wanted.values())
    if untold and (header is False or not all(what in names for what in wanted)):
        if len(first) == 2 or (len(first) == 1 and not labelled):
            return [len(first) - 1, 0][: len(wanted)], bool(header)
        if header is False or len(first) > 2:
            raise InputError(
                f"'{path}' has {len(first)} columns ({_shorten(first)}), none of which is told to be the text"
                f"{' or the label' * labelled}: name them, --text-column{' and --label-column' * labelled}"
            )
    columns = []
    for what, column in wanted.items():
        found = what if column is None else str(column).strip().lower()
        index = int(found) if found.isdecimal() else names.index(found) if found in names else -1
        if not 0 <= index < len(first) or (header is False and not found.isdecimal()):
            why = "a file without a header has no names" if header is False else f"its first row is: {_shorten(first)}"
            raise InputError(f"'{path}' has no {what} column '{what if column is None else column}'; {why}")
        header = header or not found.isdecimal()
        columns.append(index)
    if len(set(columns)) < len(columns):
        raise InputError(f"text and label cannot both be column {columns[0]} of '{path}'")
    return columns, bool(header)


def _shorten(fields: list[str]) -> str:
    text = ", ".join(fields)
    return text if len(text) <= 100 else text[:100] + "..."


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, and their numbers. A line ends at a line feed, and nowhere else."""
    for number, line in enumerate(_read(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip(" "):
            yield number, line


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start}): convert it, for instance with "
            f"iconv -f latin1 -t utf-8"
        ) from error


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    text = _read(path)
    limit = csv.field_size_limit(max(len(text), 1))  # csv's own limit, 128 KiB in a field, guards against nothing here
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        line = 1
        try:
            for fields in reader:
                if fields:
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"'{path}', line {line}: not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(path):
        try:
            entry = json.loads(text)
        except ValueError as error:
            raise InputError(f"'{path}', line {line}: broken JSON ({error})") from error
        if not isinstance(entry, dict):
            raise InputError(f"'{path}', line {line}: not a JSON object but {text[:60]}")
        yield line, entry


def _json_field(path: Path, line: int, entry: dict[str, Any], key: str) -> str:
    """A string; numbers and truth values, as labels may be, as JSON writes them."""
    if key not in entry:
        raise InputError(
            f"'{path}', line {line}: no '{key}' in the object, which has {_shorten(list(entry)) or 'nothing'}"
        )
    value = entry[key]
    if not isinstance(value, str | int | float):
        raise InputError(f"'{path}', line {line}: '{key}' is {json.dumps(value)[:60]}, which is not text")
    return value if isinstance(value, str) else json.dumps(value)


def subsample(labels: Sequence[Hashable], seed: int) -> list[int]:
    """Positions of as many examples of every label as the rarest one has, drawn at random, in ascending order."""
    groups = _groups(labels)
    size = min(map(len, groups.values()))
    return sorted(i for number, group in enumerate(groups.values()) for i in _shuffled(group, seed, number)[:size])


def split(labels: Sequence[Hashable], val: float, test: float, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Positions of the training, validation and test examples, drawn at random, in ascending order.

    Every label is split on its own: round(n * val) examples go to validation and round(n * test) to test, at least one to
    each. Raises InputError for a single label, and for one with fewer than three examples.
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise InputError(
            f"the shares of validation and test must be above 0 and below 1 together, got {val} and {test}"
        )
    groups = _groups(labels)
    if len(groups) < 2:
        raise InputError(
            f"all examples have the label '{next(iter(groups), '')}': a classifier needs two labels or more"
        )
    parts: tuple[list[int], list[int], list[int]] = [], [], []
    for number, (label, group) in enumerate(groups.items()):
        if len(group) < 3:
            raise InputError(
                f"the label '{label}' has {len(group)} example{'s' * (len(group) > 1)}, and each of training, validation "
                f"and test needs one; if it is a column's name, the file has a header: --header True"
            )
        n_val = max(1, round(len(group) * val))
        n_test = min(max(1, round(len(group) * test)), len(group) - n_val - 1)
        order = _shuffled(group, seed, number)
        for part, chosen in zip(
            parts, np.split(order, [len(group) - n_val - n_test, len(group) - n_test]), strict=True
        ):
            part.extend(chosen.tolist())
    return sorted(parts[0]), sorted(parts[1]), sorted(parts[2])


def _groups(labels: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    return groups


def _shuffled(group: list[int], seed: int, number: int) -> npt.NDArray[np.int64]:
    return np.array(group)[np.argsort(_random_bits(seed, number, len(group)), kind="stable")]


def encode_text(text: str, tokenizer: Tokenizer, max_length: int) -> tuple[IDS, bool]:
    """The first max_length token ids of a text, int64, and whether there were more. Special tokens' text is ordinary text.
    Raises InputError for a text without tokens."""
    if not text.strip():
        raise InputError("the text is empty")
    ids = tokenizer.encode_array(text)
    return ids[:max_length].astype(np.int64), len(ids) > max_length


def pad(examples: Sequence[IDS]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) int64 of B sequences, T the longest, filled up with 0 on the right; and their lengths (B,) int64."""
    lengths = [len(example) for example in examples]
    idx = np.zeros((len(examples), max(lengths)), np.int64)
    for row, example in zip(idx, examples, strict=True):
        row[: len(example)] = example
    return torch.from_numpy(idx), torch.tensor(lengths)


class LengthBuckets:
    """Batches of labelled token sequences, those of one batch similar in length so that little of it is padding.

    Each example comes once per epoch. An epoch's examples are shuffled, taken BUCKET batches at a time and sorted by
    length within that; its batches then come in random order. A pure function of (seed, step), as every sampler here.

    Args:
        examples: N sequences of token ids, each (T,) int64 with T >= 1.
        labels: (N,) integers.
        batch_size: B; an epoch's last batch may have fewer.
        seed: 0 to 2**63 - 1.
    """

    BUCKET = 16  # on SMS messages 18% of what is computed is padding, instead of 125%; larger ones mix an epoch less

    def __init__(self, examples: Sequence[IDS], labels: Sequence[int], batch_size: int, seed: int = 0) -> None:
        if not examples or len(examples) != len(labels):
            raise InputError(
                f"one label is needed for each of at least one example, got {len(labels)}, {len(examples)}"
            )
        self.examples, self.labels = examples, np.asarray(labels, np.int64)
        self.lengths = np.array([len(example) for example in examples])
        self.batch_size, self.seed = _positive("batch_size", batch_size), _seed(seed)
        self._epoch: tuple[int, list[npt.NDArray[np.int64]]] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.examples) // self.batch_size)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (B, T), lengths (B,) and labels (B,), all int64; steps go on from one epoch into the next."""
        epoch, index = divmod(_step(step), len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._batches(epoch)
        rows = self._epoch[1][index]
        return *pad([self.examples[row] for row in rows]), torch.from_numpy(self.labels[rows])

    def _batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        order = np.argsort(_random_bits(self.seed, 2 * epoch, len(self.examples)), kind="stable")
        batches = []
        for start in range(0, len(order), self.BUCKET * self.batch_size):
            bucket = order[start : start + self.BUCKET * self.batch_size]
            bucket = bucket[np.argsort(self.lengths[bucket], kind="stable")]
            batches += np.split(bucket, range(self.batch_size, len(bucket), self.batch_size))
        return [batches[i] for i in np.argsort(_random_bits(self.seed, 2 * epoch + 1, len(batches)), kind="stable")]
