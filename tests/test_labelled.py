"""Labelled texts: every layout of a file, every way it can be broken, splits and batches."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pygpt import get_tokenizer
from pygpt.data import LengthBuckets, read_labelled
from pygpt.data.labelled import encode_text, pad, read_texts, split, subsample
from pygpt.errors import InputError, MissingFileError

PAIRS = [("ham", 'He said "hi", twice'), ("spam", '"'), ("ham", "naïve café 🙂\u2028\x85x"), ("spam", "5 > 3; a,b")]
TEXTS, LABELS = [text for _, text in PAIRS], [label for label, _ in PAIRS]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def as_csv(rows: list[tuple[str, ...]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_ucis_file_as_it_is(tmp_path, ending, mark):
    """Label, tab, text; no header; quotes and line separators other than the line feed are ordinary characters."""
    file = written(tmp_path, "sms.tsv", mark + "".join(f"{label}\t{text}{ending}" for label, text in PAIRS))
    found = read_labelled(file)
    assert (found.texts, found.labels, found.lines) == (TEXTS, LABELS, [1, 2, 3, 4])
    assert not found.skipped
    nameless = written(tmp_path, "SMSSpamCollection", file.read_bytes())
    assert read_labelled(nameless, format="tsv") == found


def test_csv_with_quotes_and_line_breaks_inside(tmp_path):
    rows = [*PAIRS, ("ham", "two\nlines, and a\ttab"), ("spam", "after"), ("ham", "x" * 200_000)]
    found = read_labelled(written(tmp_path, "a.csv", as_csv(rows)))
    assert list(zip(found.labels, found.texts, strict=True)) == rows
    assert found.lines == [1, 2, 3, 4, 5, 7, 8]
    assert csv.field_size_limit() == 131072  # it is a setting of the whole process


def test_jsonl_with_labels_of_any_simple_type(tmp_path):
    entries = [{"text": "a", "label": 1}, {"label": "x", "text": "b"}, {"text": "c", "label": True, "more": [1]}]
    file = written(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, entries)))
    found = read_labelled(file)
    assert (found.texts, found.labels, found.lines) == (["a", "b", "c"], ["1", "x", "true"], [1, 3, 5])
    renamed = written(tmp_path, "b.ndjson", json.dumps({"message": "a", "class": "x"}))
    assert read_labelled(renamed, text_column="message", label_column="class").texts == ["a"]


HEADED = "id\tMessage\tClass\n1\tone\tA\n2\ttwo\tB\n"


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("text\tlabel\none\tA\n", {}, [("one", "A")]),
        ("Label\t Text\nA\tone\n", {}, [("one", "A")]),
        ("id\tlabel\ttext\n7\tA\tone\n", {}, [("one", "A")]),
        ("label\ttext\nA\tone\n", {"header": False}, [("text", "label"), ("one", "A")]),
        ("Category\tMessage\nA\tone\n", {"header": True}, [("one", "A")]),
        (HEADED, {"text_column": "Message", "label_column": "Class"}, [("one", "A"), ("two", "B")]),
        (HEADED, {"text_column": "message", "label_column": 2}, [("one", "A"), ("two", "B")]),
        (HEADED, {"text_column": "1", "label_column": "2", "header": True}, [("one", "A"), ("two", "B")]),
        ("one\tA\n", {"text_column": 0, "label_column": "1"}, [("one", "A")]),
        ("label\tbody\nA\tone\n", {"text_column": "body"}, [("one", "A")]),
        ("A\tone\nB\tone\n", {"text_column": 1, "label_column": 0}, [("one", "A"), ("one", "B")]),
    ],
)
def test_which_column_is_which(tmp_path, content, options, expected):
    found = read_labelled(written(tmp_path, "a.tsv", content), **options)
    assert list(zip(found.texts, found.labels, strict=True)) == expected
    as_commas = written(tmp_path, "a.csv", content.replace("\t", ","))
    assert read_labelled(as_commas, **options).texts == found.texts


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.tsv", HEADED, {"text_column": "body"}, "no text column 'body'; its first row is: id, Message, Class"),
        ("a.tsv", HEADED, {"text_column": "Message", "label_column": "7"}, "no label column '7'"),
        ("a.tsv", HEADED, {"text_column": "Message"}, "no label column 'label'"),
        ("a.tsv", HEADED, {"text_column": "Message", "label_column": "message"}, "cannot both be column 1"),
        ("a.tsv", HEADED, {"text_column": "Message", "header": False}, "a file without a header has no names"),
        ("a.tsv", HEADED, {"text_column": "-1", "label_column": 0}, "no text column '-1'"),
        ("a.tsv", HEADED, {}, "3 columns.*--text-column and --label-column"),
        ("a.tsv", "only one\n", {}, "no text column 'text'"),
        ("a.tsv", "ham\ta\nspam\tb\tc\n", {}, "line 2: 3 fields, where line 1 has 2"),
        ("a.csv", "ham,a\n\nspam\n", {}, "line 3: 1 fields"),
        ("a.csv", 'ham,"a\nspam,b\n', {}, "line 1: not valid CSV"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', {}, "line 2: broken JSON"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n\n["a"]\n', {}, "line 3: not a JSON object"),
        ("a.jsonl", '{"text": "a"}\n', {}, "line 1: no 'label' in the object, which has text"),
        ("a.jsonl", "{}\n", {}, "line 1: no 'text' in the object, which has nothing"),
        ("a.jsonl", '{"text": null, "label": "x"}\n', {}, "line 1: 'text' is null, which is not text"),
        ("a.jsonl", '{"text": "a", "label": ["x"]}\n', {}, r"line 1: 'label' is \[\"x\"\], which is not text"),
        ("a.tsv", b"ham\tcaf\xe9\n", {}, "not UTF-8 text .* at byte 7.*iconv"),
        ("a.tsv", "", {}, "no labelled text"),
        ("a.tsv", "\n  \n", {}, "no labelled text"),
        ("a.tsv", "ham\t \n", {}, "no labelled text"),
        ("a.csv", "one,ham\ntwo,ham\nthree,spam\n", {}, "3 different labels for 2.*--text-column 0 --label-column 1"),
        ("a.xlsx", "", {}, "does not tell its format: give --format one of tsv, csv, jsonl"),
        ("a.tsv", "", {"format": "parquet"}, "'parquet' is no format"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path, name, content, options, message):
    with pytest.raises(InputError, match=message):
        read_labelled(written(tmp_path, name, content), **options)


def test_no_such_file(tmp_path):
    with pytest.raises(MissingFileError, match="no file at"):
        read_labelled(tmp_path / "none.tsv")


def test_rows_without_text_or_label_are_counted(tmp_path):
    found = read_labelled(written(tmp_path, "a.tsv", "ham\tone\nham\t\n\tthree\nspam\t \nspam\tfive\n"))
    assert found.texts == ["one", "five"]
    assert found.lines == [1, 5]
    assert found.skipped == {"empty text": 2, "empty label": 1}


def test_texts_without_labels(tmp_path):
    lines = "one\ttab, comma\n\n two \n"
    assert read_texts(written(tmp_path, "a.txt", lines)) == (["one\ttab, comma", " two "], [1, 3], Counter())
    assert read_texts(written(tmp_path, "a.tsv", "ham\tone\nspam\t\n")) == (["one"], [1], Counter({"empty text": 1}))
    assert read_texts(written(tmp_path, "b.tsv", "one\ntwo\n"))[0] == ["one", "two"]
    assert read_texts(written(tmp_path, "c.csv", "id,text,x\n1,one,2\n"))[0] == ["one"]
    assert read_texts(written(tmp_path, "a.jsonl", '{"body": "one"}'), text_column="body")[0] == ["one"]
    with pytest.raises(InputError, match=r"3 columns .* told to be the text: name them, --text-column$"):
        read_texts(written(tmp_path, "d.csv", "1,one,2\n"))


def test_the_sms_spam_collection(shared_data):
    file = shared_data / "sms_spam_collection.tsv"
    found = read_labelled(file)
    assert Counter(found.labels) == {"ham": 4827, "spam": 747}
    assert not found.skipped
    rebuilt = "".join(f"{label}\t{text}\n" for label, text in zip(found.labels, found.texts, strict=True))
    assert hashlib.sha256(rebuilt.encode()).digest() == hashlib.sha256(file.read_bytes()).digest()
    chosen = subsample(found.labels, seed=1)
    assert Counter(found.labels[i] for i in chosen) == {"ham": 747, "spam": 747}
    parts = split([found.labels[i] for i in chosen], 0.1, 0.2, seed=1)
    assert list(map(len, parts)) == [1046, 150, 298]


def test_subsample_draws_from_every_label_alike():
    labels = ["a"] * 50 + ["b"] * 3 + ["c"] * 20
    chosen = subsample(labels, seed=3)
    assert chosen == sorted(set(chosen))
    assert Counter(labels[i] for i in chosen) == {"a": 3, "b": 3, "c": 3}
    assert chosen == subsample(labels, seed=3)
    assert {i for seed in range(200) for i in subsample(labels, seed)} == set(range(73))  # anyone may be drawn


def test_splits_are_disjoint_stratified_and_decided_by_the_seed():
    labels = [label for label, count in (("a", 100), ("b", 30), ("c", 3), ("d", 7)) for _ in range(count)]
    train, val, test = split(labels, 0.1, 0.2, seed=5)
    assert sorted(train + val + test) == list(range(140))
    counts = [Counter(labels[i] for i in part) for part in (train, val, test)]
    assert counts == [
        {"a": 70, "b": 21, "c": 1, "d": 5},
        {"a": 10, "b": 3, "c": 1, "d": 1},
        {"a": 20, "b": 6, "c": 1, "d": 1},
    ]
    assert (train, val, test) == split(labels, 0.1, 0.2, seed=5)
    assert train != split(labels, 0.1, 0.2, seed=6)[0]


def test_every_example_is_as_likely_to_be_tested():
    labels = ["a", "b"] * 20
    drawn = Counter(i for seed in range(500) for i in split(labels, 0.1, 0.2, seed)[2])
    assert set(drawn) == set(range(40))
    assert min(drawn.values()) >= 60  # 100 on average, standard deviation 9
    assert max(drawn.values()) <= 140


def test_splits_that_cannot_be():
    with pytest.raises(InputError, match="all examples have the label 'a'"):
        split(["a"] * 10, 0.1, 0.2, 0)
    with pytest.raises(InputError, match=r"'b' has 2 examples.*--header"):
        split(["a"] * 10 + ["b"] * 2, 0.1, 0.2, 0)
    for shares in ((0.0, 0.2), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.2)):
        with pytest.raises(InputError, match="above 0 and below 1"):
            split(["a", "b"] * 5, *shares, 0)


def test_text_is_cut_and_special_tokens_are_text():
    tokenizer = get_tokenizer("gpt2")
    ids, cut = encode_text("one two three", tokenizer, 2)
    assert (ids.tolist(), ids.dtype, cut) == (tokenizer.encode("one two"), np.int64, True)
    ids, cut = encode_text("<|endoftext|>", tokenizer, 7)
    assert (len(ids), cut) == (7, False)
    assert tokenizer.eot_id not in ids
    for text in ("", " \n\t"):
        with pytest.raises(InputError, match="empty"):
            encode_text(text, tokenizer, 7)


def examples_of(lengths: list[int]) -> list[np.ndarray]:
    return [np.full(length, index) for index, length in enumerate(lengths)]


def test_padding_is_on_the_right():
    idx, lengths = pad([np.array([5, 6, 7]), np.array([8])])
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert lengths.tolist() == [3, 1]
    assert idx.dtype == lengths.dtype == torch.int64


def test_an_epoch_has_every_example_once_with_its_label():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 60, 333).tolist()
    sampler = LengthBuckets(examples_of(lengths), list(range(333)), batch_size=8, seed=9)
    assert len(sampler) == 42
    for epoch in range(2):
        seen = []
        for step in range(42 * epoch, 42 * epoch + 42):
            idx, sizes, labels = sampler.batch(step)
            assert idx.shape == (len(labels), int(sizes.max()))
            for row, size, label in zip(idx, sizes, labels, strict=True):
                assert size == lengths[label]
                assert torch.equal(row, torch.cat([label.expand(size), torch.zeros(idx.shape[1] - size)]).long())
            seen += labels.tolist()
        assert sorted(seen) == list(range(333))
    epochs = [{frozenset(sampler.batch(42 * epoch + i)[2].tolist()) for i in range(42)} for epoch in range(2)]
    assert len(epochs[0] & epochs[1]) < 3  # who shares a batch is drawn anew


def test_batches_are_a_function_of_seed_and_step():
    examples = examples_of([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
    one, other = (LengthBuckets(examples, [0, 1] * 5 + [0], 2, seed=4) for _ in range(2))
    in_order = [one.batch(step) for step in range(20)]
    for step in (19, 3, 11, 0):
        assert all(torch.equal(a, b) for a, b in zip(in_order[step], other.batch(step), strict=True))
    first, second = ([one.batch(step)[1].tolist() for step in range(s, s + len(one))] for s in (0, len(one)))
    assert first != second  # another order in every epoch
    assert first != [LengthBuckets(examples, [0] * 11, 2, seed=5).batch(step)[1].tolist() for step in range(len(one))]


def test_buckets_save_padding_and_their_order_tells_nothing():
    lengths = np.random.default_rng(1).integers(1, 100, 512).tolist()
    sampler = LengthBuckets(examples_of(lengths), [0] * 512, 8)
    batches = [sampler.batch(step) for step in range(len(sampler))]
    padded = sum(idx.numel() for idx, _, _ in batches)
    assert padded < 1.2 * sum(lengths)  # in random batches it is nearly twice the tokens
    widths = [idx.shape[1] for idx, _, _ in batches]
    assert abs(np.corrcoef(widths, range(len(widths)))[0, 1]) < 0.5


def test_samplers_refuse_what_they_cannot_use():
    with pytest.raises(InputError, match="at least one example"):
        LengthBuckets([], [], 2)
    with pytest.raises(InputError, match="one label"):
        LengthBuckets(examples_of([1, 2]), [0], 2)
    with pytest.raises(InputError, match="batch_size"):
        LengthBuckets(examples_of([1]), [0], 0)
    assert LengthBuckets(examples_of([1]), [1], 5).batch(3)[2].tolist() == [1]
