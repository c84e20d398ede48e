from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pygpt.data import (
    PrepareConfig,
    PrepareSummary,
    RandomOffsets,
    corpus,
    load_tokens,
    preparation,
    prepare,
)
from pygpt.errors import InputError, InputTypeError, MissingFileError
from pygpt.tokenizer import CharTokenizer, get_tokenizer, load_tokenizer

EOT = 50256


def run(out: Path, *inputs: Path, workers: int = 1, **options: Any) -> PrepareSummary:
    console = Console(file=io.StringIO())
    return prepare(PrepareConfig(inputs=inputs, out=out, workers=workers, **options), console)


def as_nanogpt_reads(folder: Path, split: str, dtype: type = np.uint16) -> np.ndarray:
    return np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r")


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def documents_of(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded, found by the token that ends each."""
    tokens = as_nanogpt_reads(folder, split)
    ends = np.flatnonzero(tokens == EOT)
    assert ends[-1] == len(tokens) - 1
    return [get_tokenizer().decode(part[part != EOT]) for part in np.split(tokens, ends[:-1] + 1)]


# Preparing: one document


def test_char_data_is_nanogpt_shakespeare_char(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tiny_shakespeare.txt"
    text = source.read_text(encoding="utf-8")
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    run(tmp_path, source, tokenizer="char")
    expected = {"train": text[: int(len(text) * 0.9)], "val": text[int(len(text) * 0.9) :]}
    assert (len(expected["train"]), len(expected["val"])) == (1_003_854, 111_540)  # published in nanoGPT
    for split, part in expected.items():
        assert as_nanogpt_reads(tmp_path, split).tolist() == [ids[character] for character in part]
    assert load_tokenizer(tmp_path).vocab_size == load_tokens(tmp_path, "val").vocab_size == 65
    assert load_tokenizer(tmp_path).decode(load_tokens(tmp_path, "val").tokens) == expected["val"]


def test_gpt2_data_is_nanogpt_shakespeare(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "tiny_shakespeare.txt"
    text = source.read_text(encoding="utf-8")
    run(tmp_path, source)
    train, val = as_nanogpt_reads(tmp_path, "train"), as_nanogpt_reads(tmp_path, "val")
    assert (len(train), len(val)) == (301_966, 36_059)  # published in nanoGPT
    assert train.tolist() == get_tokenizer().encode_ordinary(text[: int(len(text) * 0.9)])
    assert val.tolist() == get_tokenizer().encode_ordinary(text[int(len(text) * 0.9) :])


@pytest.mark.parametrize("length", [2, 3, 10, 1009])
def test_one_document_is_cut_by_characters_not_bytes(length: int, tmp_path: Path) -> None:
    text = "".join(random.Random(length).choices("aЖ🙂\r\n", k=length))
    write(tmp_path, {"in.txt": text})
    summary = run(tmp_path, tmp_path / "in.txt", tokenizer="char", val_fraction=0.5)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(as_nanogpt_reads(tmp_path, "train")) == text[: length // 2]
    assert tokenizer.decode(as_nanogpt_reads(tmp_path, "val")) == text[length // 2 :]
    assert tokenizer.eot_id is None
    assert summary.meta["documents"] == 1
    sizes = {name: split["bytes"] for name, split in summary.meta["splits"].items()}
    assert sizes == {"train": len(text[: length // 2].encode()), "val": len(text[length // 2 :].encode())}


def test_a_text_larger_than_a_piece_gives_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", 101)
    monkeypatch.setattr(preparation, "UNIT_BYTES", 1000)
    words = ["word", " don't", "  ", "\n\n", "\r\n", " Жук", "🙂", " 12", "...", "!\n", "\t"]
    text = "\ufeff" + "".join(random.Random(0).choices(words, k=5000))
    write(tmp_path, {"in.txt": text})
    run(tmp_path, tmp_path / "in.txt", val_fraction=0.25)
    position = int((len(text) - 1) * 0.75)  # without the byte-order mark
    assert as_nanogpt_reads(tmp_path, "train").tolist() == get_tokenizer().encode_ordinary(text[1:][:position])
    assert as_nanogpt_reads(tmp_path, "val").tolist() == get_tokenizer().encode_ordinary(text[1:][position:])
    assert len(corpus.scan_file(str(tmp_path / "in.txt"), False).pieces) > 100


@settings(deadline=None)
@given(text=st.text(alphabet="aЖ🙂 \n!", min_size=1), size=st.integers(1, 9))
def test_pieces_are_the_text(text: str, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    path.write_bytes(text.encode())
    before = corpus.PIECE_BYTES
    corpus.PIECE_BYTES = size
    try:
        scan = corpus.scan_file(str(path), True)
    finally:
        corpus.PIECE_BYTES = before
    assert "".join(corpus.read_piece(piece) for piece in scan.pieces) == text
    assert [piece.ends_document for piece in scan.pieces] == [False] * (len(scan.pieces) - 1) + [True]
    assert scan.characters == {character: text.count(character) for character in set(text)}
    for position in range(len(text)):
        left, right = corpus.split_at_character(scan.pieces, position)
        assert "".join(map(corpus.read_piece, left)) == text[:position]
        assert "".join(map(corpus.read_piece, right)) == text[position:]


# Preparing: several documents


def test_documents_end_with_endoftext_and_are_split_whole(tmp_path: Path) -> None:
    texts = {f"{name}.txt": f"Document {name} <|endoftext|>\n" * (1 + ord(name) % 5) for name in "zyxwvutsrqponmlkjihg"}
    write(tmp_path / "in", {f"folder{i % 3}/{name}": text for i, (name, text) in enumerate(texts.items())})
    summary = run(tmp_path / "out", tmp_path / "in", val_fraction=0.3)
    train, val = documents_of(tmp_path / "out", "train"), documents_of(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts.values())
    size = sum(map(len, texts.values()))
    assert 0.15 * size < sum(map(len, val)) <= 0.3 * size
    assert summary.meta["documents"] == 20
    assert summary.meta["splits"]["train"]["documents"] == len(train)
    assert summary.meta["splits"]["val"]["bytes"] == sum(map(len, val))
    assert summary.meta["splits"]["val"]["tokens"] == len(as_nanogpt_reads(tmp_path / "out", "val"))
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == summary.meta
    # in the order of folders and names
    order = [
        text for _, text in sorted((f"folder{i % 3}/{name}", text) for i, (name, text) in enumerate(texts.items()))
    ]
    assert train == [text for text in order if text in train]


def test_split_depends_on_the_seed_alone(tmp_path: Path) -> None:
    write(tmp_path / "in", {f"{i:02}.txt": f"text number {i}" for i in range(40)})
    first = run(tmp_path / "a", tmp_path / "in", seed=1)
    again = run(tmp_path / "b", tmp_path / "in", seed=1)
    other = run(tmp_path / "c", tmp_path / "in", seed=2)
    assert first.meta == again.meta
    contents = [documents_of(summary.folder, "val") for summary in (first, again, other)]
    assert contents[0] == contents[1] != contents[2]
    assert all(3 <= len(content) <= 4 for content in contents)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_each_split_has_a_document(fraction: float, tmp_path: Path) -> None:
    write(tmp_path / "in", {"big.txt": "big " * 1000, "small.txt": "small"})
    run(tmp_path / "out", tmp_path / "in", val_fraction=fraction)
    assert len(documents_of(tmp_path / "out", "train")) == len(documents_of(tmp_path / "out", "val")) == 1


def test_char_tokenizer_with_documents_has_endoftext_and_may_be_limited(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.txt": "aaabbb", "b.txt": "aabbcЖ"})
    run(tmp_path / "out", tmp_path / "in", tokenizer="char", val_fraction=0.5)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (5, 4)
    both = {tokenizer.decode(as_nanogpt_reads(tmp_path / "out", split)) for split in ("train", "val")}
    assert both == {"aaabbb<|endoftext|>", "aabbcЖ<|endoftext|>"}
    run(tmp_path / "out", tmp_path / "in", tokenizer="char", max_chars=2, val_fraction=0.5)
    tokenizer = load_tokenizer(tmp_path / "out")
    both = {tokenizer.decode(as_nanogpt_reads(tmp_path / "out", split)) for split in ("train", "val")}
    assert both == {"aaabbb<|endoftext|>", "aabb\ufffd\ufffd<|endoftext|>"}


def test_vocabulary_over_65536_is_written_as_uint32(tmp_path: Path) -> None:
    text = "".join(chr(i) for i in range(1, 0x11000) if not 0xD800 <= i <= 0xDFFF)
    write(tmp_path, {"in.txt": text})
    run(tmp_path, tmp_path / "in.txt", tokenizer="char", val_fraction=0.01)
    file = load_tokens(tmp_path, "val")
    assert file.vocab_size == len(text) == 67583
    assert file.tokens.dtype == np.uint32
    assert as_nanogpt_reads(tmp_path, "val", np.uint32).tolist() == list(range(int(len(text) * 0.99), len(text)))
    # and at the limit uint16 still holds every id
    write(tmp_path, {"in.txt": text[: 1 << 16]})
    run(tmp_path, tmp_path / "in.txt", tokenizer="char", val_fraction=0.01)
    assert load_tokens(tmp_path, "val").tokens.dtype == np.uint16
    assert load_tokens(tmp_path, "val").tokens[-1] == 65535


def test_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    rng = random.Random(5)
    files = {f"{i:03}.txt": "".join(rng.choices("word Жук🙂\n,", k=rng.randrange(1, 5000))) for i in range(50)}
    files["large.txt"] = "some words, and more\n" * 150_000
    write(tmp_path / "in", files | {"bad.txt": b"\xff\xfe"})
    one = run(tmp_path / "1", tmp_path / "in", workers=1, val_fraction=0.2)
    two = run(tmp_path / "2", tmp_path / "in", workers=2, val_fraction=0.2)
    assert one.meta == two.meta
    assert one.skipped == two.skipped == [(str(tmp_path / "in" / "bad.txt"), "not UTF-8 text")]
    for name in ("train.bin", "val.bin", "meta.json", "pygpt_tokenizer.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert sorted(documents_of(tmp_path / "2", "train") + documents_of(tmp_path / "2", "val")) == sorted(files.values())


def test_default_corpus_is_the_standard_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = corpus.find_files((), (".txt",))
    names = [os.path.relpath(file, os.path.dirname(os.__file__)) for file in files]
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(Path(name).parts)]
    assert sum(map(os.path.getsize, files)) > 5_000_000
    assert files == corpus.find_files((), (".txt",))
    monkeypatch.setattr(corpus, "_NOT_CORPUS", set(os.listdir(os.path.dirname(os.__file__))) - {"json"})
    summary = run(tmp_path)
    decoder = Path(os.__file__).with_name("json") / "decoder.py"
    assert decoder.read_text() in documents_of(tmp_path, "train") + documents_of(tmp_path, "val")
    assert summary.meta["documents"] > 100


# Preparing: what is left out, and errors


def test_unusable_files_are_counted_and_named(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "in",
        {
            "good.txt": "good",
            "fine.md": "\ufefffine",
            "empty.txt": "",
            "mark.txt": "\ufeff",
            "latin.txt": "café ".encode("latin-1"),
            "cut.txt": "Ж".encode()[:1],
            "binary.txt": b"text\0text",
            "utf16.txt": "text".encode("utf-16"),
            "late.txt": b"good " * 200_000 + b"\xff",
            ".hidden.txt": "hidden",
            ".git/config.txt": "hidden",
            "picture.png": "not asked for",
        },
    )
    (folder / "link.txt").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    console = Console(file=io.StringIO(), width=200)
    summary = prepare(PrepareConfig(inputs=(folder,), out=tmp_path / "out", workers=1), console)
    reasons = {os.path.basename(path): reason for path, reason in summary.skipped}
    text = "not UTF-8 text"
    assert reasons == {
        "empty.txt": "empty",
        "mark.txt": "empty",
        "latin.txt": text,
        "cut.txt": text,
        "late.txt": text,
        "binary.txt": "binary",
        "utf16.txt": "binary",
        "link.txt": "unreadable",
        "pipe.txt": "unreadable",
    }
    assert summary.meta["skipped"] == {text: 3, "empty": 2, "binary": 2, "unreadable": 2}
    assert "Left out 9 documents: 3 not UTF-8 text" in console.file.getvalue()  # type: ignore[attr-defined]
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == ["fine", "good"]


def test_named_files_are_read_whatever_they_are_called_and_only_once(tmp_path: Path) -> None:
    write(tmp_path / "in", {"one.log": "first", "two.txt": "second"})
    run(tmp_path / "out", tmp_path / "in" / "one.log", tmp_path / "in", tmp_path / "in" / ".." / "in" / "two.txt")
    found = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert sorted(found) == ["first", "second"]


@pytest.mark.parametrize(
    ("files", "inputs", "error", "message"),
    [
        ({}, ["missing.txt"], MissingFileError, "No such file or folder: .*missing.txt"),
        ({"in/a.html": "x", "in/b.html": "x"}, ["in"], InputError, r"No file in .*\.txt, \.md.*it holds 2 \.html"),
        ({"in/.keep": ""}, ["in"], InputError, "no files at all"),
        ({"a.txt": ""}, ["a.txt"], InputError, r"no text to prepare.*1 empty; such as .*a\.txt"),
        ({"a.txt": b"\xff", "b.txt": b"\0"}, ["."], InputError, "Left out 2 documents: 1 not UTF-8 text, 1 binary"),
        ({"a.txt": "x"}, ["a.txt"], InputError, r"a\.txt has 1 characters: too few"),
    ],
    ids=["missing", "no-match", "empty-folder", "empty-file", "nothing-usable", "too-short"],
)
def test_input_that_gives_no_text(
    files: dict[str, str | bytes], inputs: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    with pytest.raises(error, match=message):
        run(tmp_path / "out", *[tmp_path / name for name in inputs])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"val_fraction": 0.0}, InputError, "val_fraction must be above 0"),
        ({"val_fraction": 1.0}, InputError, "below 1, got 1.0"),
        ({"val_fraction": float("nan")}, InputError, "got nan"),
        ({"workers": -1}, InputError, "workers must be 0"),
        ({"max_chars": 3}, InputError, "for the char tokenizer, not for 'gpt2'"),
        ({"max_chars": 0, "tokenizer": "char"}, InputError, "at least 1, got 0"),
        ({"extensions": ("txt",)}, InputError, "start with a dot"),
        ({"extensions": ()}, InputError, "start with a dot"),
        ({"extensions": ".txt"}, InputTypeError, "several values, got the single '.txt'"),
        ({"inputs": "text.txt"}, InputTypeError, "several values, got the single 'text.txt'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrepareConfig(**settings)


def test_unknown_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "text"})
    with pytest.raises(InputError, match="Unknown tokenizer 'gtp2'"):
        run(tmp_path / "out", tmp_path / "a.txt", tokenizer="gtp2")


def test_a_failed_run_leaves_the_earlier_result(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no limits on file sizes on this system")
    write(tmp_path, {"a.txt": "first text", "b.txt": "words " * 100_000})
    run(tmp_path / "out", tmp_path / "a.txt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk would, the system refuses to write on
    try:
        with pytest.raises(InputError, match=r"Cannot write to .*out: File too large"):
            run(tmp_path / "out", tmp_path / "b.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    run(tmp_path / "out", tmp_path / "b.txt")
    assert len(load_tokens(tmp_path / "out")) > 80_000
    with pytest.raises(InputError, match="Cannot write to"):
        run(tmp_path / "a.txt" / "out", tmp_path / "b.txt")


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, {"a.txt": "Жук " * 100}) / "a.txt"
    piece = corpus.scan_file(str(path), False).pieces[0]
    for content in ["Жук ".encode() * 99, b"x" * piece.end]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.txt changed while"):
            corpus.read_piece(piece)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.txt changed while"):
        corpus.read_piece(piece)


def test_workers_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "text " * 100})
    script = (
        "from pathlib import Path\n"
        "from pygpt.data import PrepareConfig, prepare\n"
        "prepare(PrepareConfig(inputs=(Path('a.txt'),), out=Path('out'), workers=2))\n"
    )
    write(tmp_path, {"script.py": script})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "InputError: A worker process ended" in done.stderr
    assert not (tmp_path / "out").exists()


# Token files


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write(tmp_path, {"a.txt": "Some words to encode. " * 50})
    run(tmp_path, tmp_path / "a.txt")
    return tmp_path


def test_token_file_is_an_array_to_numpy(prepared: Path) -> None:
    file = load_tokens(prepared, "train")
    expected = np.fromfile(prepared / "train.bin", "<u2")
    assert len(file) == len(expected)
    np.testing.assert_array_equal(np.asarray(file), expected)
    assert np.shares_memory(np.asarray(file), file.tokens)
    assert np.asarray(file, dtype=np.int64).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


@pytest.mark.parametrize("change", [-1, -2, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_or_grown_file(change: int, split: str, prepared: Path) -> None:
    path = prepared / f"{split}.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(InputError, match=rf"{split}.bin has {len(data) + change} bytes and should have {len(data)}"):
        load_tokens(prepared, split)


def test_missing_files(prepared: Path) -> None:
    with pytest.raises(MissingFileError, match=r"No test\.bin: .* holds train\.bin, val\.bin.*pygpt prepare"):
        load_tokens(prepared, "test")
    with pytest.raises(MissingFileError, match="there is no folder"):
        load_tokens(prepared / "nowhere")
    (prepared / "test.bin").write_bytes(b"\0\0")
    with pytest.raises(InputError, match="does not describe a split 'test'"):
        load_tokens(prepared, "test")


def test_damaged_meta(prepared: Path) -> None:
    path = prepared / "meta.json"
    good = json.loads(path.read_text())
    bad = [{**good, "version": 2}, {**good, "dtype": "float32"}, {**good, "vocab_size": "x"}, {**good, "splits": []}]
    for content in ["{", "[]", "{}", *map(json.dumps, bad), json.dumps({**good, "splits": {"train": {}}})]:
        path.write_text(content)
        with pytest.raises(InputError, match=r"meta\.json is damaged"):
            load_tokens(prepared)


def test_data_of_nanogpt_without_meta_json(tmp_path: Path) -> None:
    np.arange(0, 60000, 7, dtype=np.uint16).tofile(tmp_path / "train.bin")
    file = load_tokens(tmp_path)
    assert file.tokens.tolist() == list(range(0, 60000, 7))
    assert file.vocab_size is None
    for size in (0, 3):
        (tmp_path / "train.bin").write_bytes(b"\0" * size)
        with pytest.raises(InputError, match=f"has {size} bytes, which is not a whole number of uint16"):
            load_tokens(tmp_path)


def test_data_of_nanogpt_with_a_vocabulary_of_its_own(prepared: Path) -> None:
    """As in data/shakespeare_char. A pickle may run anything when it is read: this one would."""
    (prepared / "meta.pkl").write_bytes(b"cbuiltins\nexit\n(tR.")
    assert load_tokens(prepared).vocab_size is not None  # written there by pygpt prepare: meta.json tells
    (prepared / "meta.json").unlink()
    for split in ("train", "val"):
        with pytest.raises(InputError, match=r"meta\.pkl.* vocabulary of their own.* --tokenizer char --out DIR"):
            load_tokens(prepared, split)


def test_char_tokens_decode_to_the_windows_text(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog; Съешь ещё этих булок 🙂. " * 5
    write(tmp_path, {"a.txt": text})
    run(tmp_path, tmp_path / "a.txt", tokenizer="char")
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, CharTokenizer)
    x, y = RandomOffsets(load_tokens(tmp_path), 16, 8, seed=1).batch(0)
    for row in range(8):
        assert tokenizer.decode(x[row]) in text
        assert tokenizer.decode(y[row]) in text
        assert tokenizer.decode(x[row])[1:] == tokenizer.decode(y[row])[:-1]
