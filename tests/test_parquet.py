"""`pygpt prepare` on Parquet files, written by pyarrow: one document in each row."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pygpt.data import PrepareConfig, load_tokens, prepare
from pygpt.data.parquet import read_row_group
from pygpt.errors import InputError
from pygpt.tokenizer import CharTokenizer, load_tokenizer

TEXTS = [f"document {i}: naïve 東京 🙂 " + "words\n" * (i % 7) for i in range(50)]


def write(path: Path, texts: list[str | None], row_group_size: int = 8, kind: pa.DataType | None = None) -> Path:
    other = pa.array(range(len(texts)))
    pq.write_table(pa.table({"id": other, "text": pa.array(texts, kind or pa.string())}), path, row_group_size)
    return path


def documents_of(folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    both = [tokenizer.decode(np.asarray(load_tokens(folder, split))) for split in ("train", "val")]
    return [text for part in both for text in part.split("<|endoftext|>")[:-1]]


@pytest.mark.parametrize(("kind", "workers"), [(pa.string(), 1), (pa.large_string(), 2)])
def test_each_row_is_a_document(kind: pa.DataType, workers: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [*TEXTS], kind=kind)
    (tmp_path / "b.txt").write_text("a text file beside it")
    config = PrepareConfig(inputs=(path, tmp_path / "b.txt"), out=tmp_path / "out", workers=workers, val_fraction=0.3)
    summary = prepare(config)
    assert summary.meta["documents"] == 51
    assert sorted(documents_of(tmp_path / "out")) == sorted([*TEXTS, "a text file beside it"])
    size = sum(len(text.encode()) for text in TEXTS) + 21
    assert sum(split["bytes"] for split in summary.meta["splits"].values()) == size


def test_folders_by_extension_and_characters(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.PARQUET", ["aab", "ж"])
    write(tmp_path / "in" / "b.parquet", ["ac"])
    config = PrepareConfig(inputs=(tmp_path / "in",), out=tmp_path / "out", tokenizer="char", extensions=(".parquet",))
    prepare(config)
    assert sorted(documents_of(tmp_path / "out")) == ["aab", "ac", "ж"]
    tokenizer = load_tokenizer(tmp_path / "out")
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.vocab_size == 5


def test_a_single_row_is_cut_by_position(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["é" * 60 + "z" * 40])
    prepare(PrepareConfig(inputs=(path,), out=tmp_path / "out", tokenizer="char", val_fraction=0.5))
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(np.asarray(load_tokens(tmp_path / "out", "train"))) == "é" * 50
    assert tokenizer.decode(np.asarray(load_tokens(tmp_path / "out", "val"))) == "é" * 10 + "z" * 40


def test_rows_and_files_without_text_are_counted(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", ["one", None, "", "a\0b", "two"], row_group_size=2)
    content = good.read_bytes()
    column = pq.ParquetFile(good).metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    write(tmp_path / "none.parquet", [])
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    (tmp_path / "damaged.parquet").write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
    names = ("good", "other", "numbers", "none", "cut", "damaged")
    inputs = tuple(tmp_path / f"{name}.parquet" for name in names)
    summary = prepare(PrepareConfig(inputs=inputs, out=tmp_path / "out"), Console(stderr=True))
    reasons = {Path(path).name: reason for path, reason in summary.skipped if "damaged" not in path}
    assert reasons == {
        "good.parquet, row 1 of row group 0": "empty",
        "good.parquet, row 0 of row group 1": "empty",
        "good.parquet, row 1 of row group 1": "binary",
        "other.parquet": "no column of text named 'text'",
        "numbers.parquet": "no column of text named 'text'",
        "none.parquet": "empty",
        "cut.parquet": "unreadable, or no Parquet file",
    }
    assert (f"{tmp_path / 'damaged.parquet'}, row group 0", "unreadable") in summary.skipped
    assert sorted(documents_of(tmp_path / "out")) == [
        "one",
        "two",
        "two",
    ]  # the other row groups of the damaged file serve


def test_sliced_and_empty_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["", "", "é", None], row_group_size=2)
    text, starts = read_row_group(str(path), 0)
    assert (bytes(text), starts.tolist()) == (b"", [0, 0, 0])
    text, starts = read_row_group(str(path), 1)
    assert (bytes(text), starts.tolist()) == ("é".encode(), [0, 2, 2])


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", [*TEXTS])
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it then fails as if it were not installed
    with pytest.raises(InputError, match=r"a\.parquet needs the package pyarrow: pip install 'pygpt-kernels\[data\]'"):
        prepare(PrepareConfig(inputs=(path,), out=tmp_path / "out"))
