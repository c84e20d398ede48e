"""Text generation: stop strings, characters that span tokens, several prompts and samples."""

from __future__ import annotations

import random

import pytest
import torch

from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.errors import InputError
from pygpt.generate import Generation
from pygpt.text import GrowingText, Piece, generate_text, in_order, stream_text
from pygpt.tokenizer import CharTokenizer

CHARACTERS = CharTokenizer("abcdefgh\n", end_of_text=True)
GPT2 = get_tokenizer("gpt2")


def random_model(vocab_size: int, block_size: int = 32) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=block_size, vocab_size=vocab_size))


def grown(tokens: list[bytes], stop: list[str]) -> list[str]:
    """What is shown after each token and at the end."""

    class Bytes:
        def decode_bytes(self, ids: list[int]) -> bytes:
            return tokens[ids[0]]

    text = GrowingText(Bytes(), stop)
    shown = []
    for token in range(len(tokens)):
        shown.append(text.add(token))
        if text.ended:
            return shown
    return [*shown, text.end()]


def test_a_stop_string_that_spans_tokens():
    assert grown([b"one ", b"two", b" th", b"ree four"], ["two three"]) == ["one ", "", "", ""]
    assert grown([b"one ", b"two", b" th", b"us"], ["two three"]) == ["one ", "", "", "two thus", ""]
    assert grown([b"one ", b"two", b" th"], ["two three"]) == ["one ", "", "", "two th"]  # nothing more came
    assert grown([b"a\n", b"\nb"], ["\n\n"]) == ["a", ""]
    assert grown([b"aab", b"aac"], ["aac"]) == ["aab", ""]
    assert grown([b"aa", b"aac"], ["aaac"]) == ["", "a"]  # the beginning that is held back moves on
    assert grown([b"stop"], ["stop"]) == [""]
    assert grown([], ["stop"]) == [""]
    assert grown([b"abc"], []) == ["abc", ""]


def test_of_several_stop_strings_the_first_that_is_complete_counts():
    for tokens in ([b"xabcdy"], [b"xa", b"bc", b"dy"], [b"x", b"a", b"b", b"c", b"d", b"y"]):
        assert "".join(grown(tokens, ["abcd", "bc"])) == "xa"
        assert "".join(grown(tokens, ["bcd", "abcd"])) == "x"  # both end at the d
        assert "".join(grown(tokens, ["y", "d"])) == "xabc"


def test_characters_that_span_tokens():
    bites = "naïve 🙂".encode()
    assert "".join(grown([bytes([b]) for b in bites], [])) == "naïve 🙂"
    assert grown([bites[:3], bites[3:-1], bites[-1:]], ["🙂"]) == ["na", "ïve ", ""]
    assert grown([bites[:-1]], ["🙂"]) == ["naïve ", "\ufffd"]  # cut within a character
    assert grown([b"a\xff", b"b"], ["\ufffdb"]) == ["a", ""]


def test_stop_strings_do_not_depend_on_where_tokens_end():
    """Random texts, cut anywhere, against a search of the whole text; nothing is shown that must be taken back."""
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("abé🙂", k=draw.randint(0, 12)))
        stop = ["".join(draw.choices("abé🙂", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        ends = {
            (end, start): text[:start]
            for end in range(len(text) + 1)
            for start in range(end)
            if text[start:end] in stop
        }
        expected = ends[min(ends)] if ends else text
        bites, tokens = text.encode(), []
        while bites:
            n = draw.randint(1, 5)
            tokens.append(bites[:n])
            bites = bites[n:]
        assert "".join(grown(tokens, stop)) == expected, (text, stop, tokens)


def test_texts_are_those_of_the_tokens():
    """Random bytes of gpt2's vocabulary, over several prompts and samples, streamed and whole."""
    model = random_model(50304)  # a padded vocabulary: ids from 50257 on stand for nothing
    prompts = ["naïve café", "", "🙂🙃" * 3]
    ids = [GPT2.encode(prompts[0]), [GPT2.eot_id], GPT2.encode(prompts[2])]
    rows = Generation(model, ids, 60, num_samples=2, seed=0, vocab_size=50257, top_k=3000)
    for _ in rows:
        pass
    expected = [GPT2.decode(row[len(ids[i // 2]) :]) for i, row in enumerate(rows.tokens)]
    settings = {"num_samples": 2, "seed": 0, "top_k": 3000}
    assert generate_text(model, GPT2, prompts, 60, **settings) == expected
    assert generate_text(model, GPT2, ids, 60, **settings) == expected
    streamed = [""] * 6
    for piece in stream_text(model, GPT2, prompts, 60, **settings):
        streamed[piece.row] += piece.text
    assert streamed == expected
    assert len(set(expected)) == 6


def test_texts_end_at_stop_strings_and_end_of_text():
    model = random_model(CHARACTERS.vocab_size)
    prompts = ["a", "bcd", "h" * 30]
    ids = [CHARACTERS.encode(prompt) for prompt in prompts]
    rows = Generation(model, ids, 100, num_samples=20, seed=0)
    for _ in rows:
        pass
    stop, ended, stopped = ["ab", "cd\n", "hh"], 0, 0
    found = generate_text(model, CHARACTERS, prompts, 100, stop, num_samples=20, seed=0)
    for i, (row, text) in enumerate(zip(rows.tokens, found, strict=True)):
        free = CHARACTERS.decode(row[len(ids[i // 20]) :])
        end = min((free.index(s) for s in [*stop, "<|endoftext|>"] if s in free), default=len(free))
        assert text == free[:end]  # the stop strings begin differently and do not overlap
        ended += free[end:].startswith("<|endoftext|>")
        stopped += free[end : end + 2] in ("ab", "cd", "hh")
    assert ended > 5
    assert stopped > 5
    assert generate_text(model, CHARACTERS, ["a"], 100, "ab", seed=0) == generate_text(
        model, CHARACTERS, ["a"], 100, ["ab"], seed=0
    )


def test_a_text_that_ended_is_not_computed_further():
    model = random_model(CHARACTERS.vocab_size)
    steps = 0
    for piece in stream_text(model, CHARACTERS, ["a"], 10_000, [*"abcdefgh\n"], seed=0):
        steps += 1
        assert piece == Piece(0, "", True)
    assert steps == 1


def test_in_order():
    pieces = [(1, "B", False), (0, "a", False), (2, "x", True), (1, "C", True), (0, "b", True), (3, "", True)]
    ordered = list(in_order(Piece(*piece) for piece in pieces))
    assert [piece.row for piece in ordered] == [0, 0, 1, 1, 2, 3]
    assert "".join(piece.text for piece in ordered) == "abBCx"
    shown = in_order(Piece(*piece) for piece in pieces[:2])
    assert next(shown).text == "a"  # as soon as it is there


def test_nothing_to_generate():
    model = random_model(CHARACTERS.vocab_size)
    assert generate_text(model, CHARACTERS, ["a", "b"], 0) == ["", ""]
    assert generate_text(model, CHARACTERS, [], 5) == []


def test_bad_settings():
    model = random_model(CHARACTERS.vocab_size)
    with pytest.raises(InputError, match="stop string"):
        stream_text(model, CHARACTERS, ["a"], 5, [""])
    with pytest.raises(InputError, match="brackets"):
        generate_text(model, CHARACTERS, "abc", 5)
    with pytest.raises(InputError, match="top_p"):
        stream_text(model, CHARACTERS, ["a"], 5, top_p=2)
    with pytest.raises(InputError, match="not among"):
        generate_text(model, CHARACTERS, ["z"], 5)
    with pytest.raises(InputError, match="33 tokens"):
        generate_text(model, CHARACTERS, ["a", "b" * 33], 5)
