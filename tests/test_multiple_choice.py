"""Multiple-choice questions: how HellaSwag's lines are read, and scores against transformers, one ending at a time."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.cli import main
from pygpt.errors import InputError, MissingFileError
from pygpt.tokenizer import CharTokenizer
from pygpt.train.multiple_choice import Question, answer, encode_question, loglikelihoods, read_questions

# Lines as they are published: from ActivityNet and from WikiHow, the latter with what its pages left behind.
PUBLISHED = [
    {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "split": "val",
        "split_type": "indomain",
        "label": 3,
        "endings": [
            "is using wrap.",
            "is ripping tiles.",
            "is holding a cube.",
            "starts pulling up roofing on a roof.",
        ],
        "source_id": "activitynet~v_-JhWjGDPHMY",
    },
    {
        "ind": 3510,
        "activity_label": "Health",
        "ctx_a": "[header] How to sleep [title] Go to  bed [step] Turn   the light off. [step]",
        "ctx_b": "",
        "ctx": "[header] How to sleep [title] Go to  bed [step] Turn   the light off. [step]",
        "split": "val",
        "split_type": "zeroshot",
        "label": "1",
        "endings": ["Wait. [title] Sleep.", " [substeps] Close  your eyes.", "[step] Snore", "🙂"],
        "source_id": "wikihow~1",
    },
]
AS_THE_HARNESS_CLEANS_THEM = [
    Question(
        1,
        "Roof shingle removal: A man is sitting on a roof. He",
        ["is using wrap.", "is ripping tiles.", "is holding a cube.", "starts pulling up roofing on a roof."],
        3,
    ),
    Question(
        2,
        "Health: How to sleep. Go to bed Turn  the light off. ",
        ["Wait.. Sleep.", " Close your eyes.", " Snore", "🙂"],
        1,
    ),
]
OWN = [
    {"ctx": "Столица Франции —", "endings": ["Париж.", "Лондон", "кот 🙂"], "label": 0},
    {"ctx": "no blank", "endings": ["at all", " before it"], "label": 1, "comment": None},
    {"ctx": "1 + 1 =", "activity_label": "Sums", "endings": ["2", "3", "4", "5", "6"], "label": 0},
]


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "questions.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64))
    with torch.no_grad():
        for parameter in model.parameters():  # so that likelihoods differ by more than a little
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_lines_are_read_and_cleaned_as_published_files_need_it(tmp_path):
    file = written(tmp_path, *PUBLISHED, "", *OWN)
    questions = read_questions(file)
    assert questions[:2] == AS_THE_HARNESS_CLEANS_THEM
    assert [question.line for question in questions] == [1, 2, 4, 5, 6]  # blank lines count as lines
    assert questions[2].context == "Столица Франции —"
    assert questions[3].endings == ["at all", "before it"]
    assert questions[4].context == "Sums: 1 + 1 ="


def test_scores_are_those_of_transformers(model, tmp_path):
    """Each ending on its own, without padding, in float64; tokens, too, are transformers'."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    from pygpt.export import ExportConfig, export

    model.save_pretrained(tmp_path / "model")
    folder = export(ExportConfig(run=tmp_path / "model", out=tmp_path / "exported"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    questions = read_questions(written(tmp_path, *PUBLISHED, *OWN))
    expected, rows, right, normalised = [], [], 0, 0
    assert questions[1].context.endswith(". ")  # a blank that is the ending's
    for question in questions:
        scores = []
        context = tokenizer(question.context.rstrip())["input_ids"]
        for ending in question.endings:
            ids = tokenizer(question.context + " " + ending)["input_ids"]
            assert ids[: len(context)] == context
            with torch.no_grad():
                logp = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(logp[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        expected += scores
        rows += encode_question(question, get_tokenizer())
        right += scores.index(max(scores)) == question.label
        shares = [score / len(ending) for score, ending in zip(scores, question.endings, strict=True)]
        normalised += shares.index(max(shares)) == question.label
    np.testing.assert_allclose(loglikelihoods(model, rows, 4), expected, rtol=1e-5)
    result = answer(model, get_tokenizer(), questions, 4)
    assert (result.questions, result.skipped) == (5, 0)
    assert (result.accuracy, result.accuracy_normalised) == (right / 5, normalised / 5)


def test_batch_size_does_not_change_scores(model):
    generator = np.random.default_rng(0)
    rows = [(generator.integers(0, 50257, size), max(1, size // 2)) for size in (2, 3, 64, 65, 17, 17, 40, 2, 33)]
    alone = np.array([loglikelihoods(model, [row], 1)[0] for row in rows])
    done: list[int] = []
    for batch_size in (1, 2, 4, 9, 100):
        np.testing.assert_allclose(loglikelihoods(model, rows, batch_size, done.append), alone, rtol=2e-6)
    assert sum(done) == 5 * len(rows)
    assert loglikelihoods(model, [], 3).shape == (0,)


def uniform(block_size: int = 32, tokenizer: CharTokenizer | None = None) -> tuple[GPT, CharTokenizer]:
    """A model to which every character is equally likely."""
    tokenizer = tokenizer or CharTokenizer("abcdefgh ")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=block_size, vocab_size=tokenizer.vocab_size))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model.eval(), tokenizer


def test_accuracy_and_its_normalised_twin():
    """All characters being equally likely, the shortest ending is likeliest and, with its blank, the longest likeliest per
    character. Equal ones: the first."""
    model, tokenizer = uniform()
    questions = [
        Question(1, "a", ["bbb", "b", "bb"], 1),
        Question(2, "a", ["bb", "bbb", "b"], 1),
        Question(3, "a", ["bb", "cc"], 0),
        Question(4, "a", ["bb", "cc"], 1),
    ]
    result = answer(model, tokenizer, questions)
    assert (result.accuracy, result.accuracy_normalised) == (0.5, 0.5)
    only = [answer(model, tokenizer, [question]) for question in questions]
    assert [(r.accuracy, r.accuracy_normalised) for r in only] == [(1, 0), (0, 1), (1, 1), (0, 0)]
    assert str(only[0]) == "1 questions: accuracy 1.0000 +- 0.0000, length-normalised accuracy 0.0000 +- 0.0000"
    error = math.sqrt(0.5 * 0.5 / 3)  # of a mean of four zeros and ones
    assert f"accuracy 0.5000 +- {error:.4f}, length" in str(result)
    score = loglikelihoods(model, [(np.array(tokenizer.encode("a bbb")), 1)])
    assert score[0] == pytest.approx(-4 * math.log(tokenizer.vocab_size), rel=1e-6)


def test_questions_that_are_too_long_are_skipped_and_counted():
    model, tokenizer = uniform(block_size=5)
    fits, long = Question(1, "a", ["bbbb", "b"], 1), Question(2, "a", ["b", "bbbbb"], 0)  # 6 and 7 characters
    result = answer(model, tokenizer, [long, fits, long])
    assert (result.questions, result.skipped, result.accuracy) == (1, 2, 1.0)
    assert "2 more skipped, longer than the model's block_size" in str(result)
    with pytest.raises(InputError, match=r"none of the 1 questions fits into the model's block_size \(5\)"):
        answer(model, tokenizer, [long])


def test_a_context_that_ends_with_a_blank_gives_it_to_the_ending():
    _, tokenizer = uniform()
    for context in ("ab ", "ab   "):
        for ids, start in encode_question(Question(1, context, ["cd", " h"], 0), tokenizer):
            assert tokenizer.decode(ids[:start]) == "ab"
            assert tokenizer.decode(ids[start:]) in (f"{context[2:]} cd", f"{context[2:]}  h")


GOOD = {"ctx": "a", "endings": ["b", "c"], "label": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ctx": "a"', "broken JSON"),
        ("[1]", "not a JSON object"),
        ({**GOOD, "ctx": 3}, "'ctx' must be text, got 3"),
        ({"endings": ["b", "c"], "label": 0}, "no 'ctx' among 'endings, label'"),
        ({**GOOD, "ctx_a": None}, "'ctx_a' must be text, got nothing"),
        ({**GOOD, "ctx_a": "x", "ctx_b": 1}, "'ctx_b' must be text, got 1"),
        ({**GOOD, "activity_label": ["x"]}, "'activity_label' must be text"),
        ({**GOOD, "ctx": " [header] "}, "the context is empty"),
        ({**GOOD, "endings": "bc"}, "'endings' must be a list of two texts or more, got 'bc'"),
        ({**GOOD, "endings": ["b"]}, "list of two texts or more"),
        ({**GOOD, "endings": ["b", 2]}, "list of two texts or more"),
        ({"ctx": "a", "label": 0}, "list of two texts or more, got nothing"),
        ({**GOOD, "endings": ["b", "[step]"]}, "ending 1 is empty"),
        ({**GOOD, "label": 2}, "'label' must be the right ending's position, from 0 to 1, got 2"),
        ({**GOOD, "label": -1}, "from 0 to 1, got -1"),
        ({**GOOD, "label": True}, "got True"),
        ({**GOOD, "label": 0.0}, "got 0.0"),
        ({**GOOD, "label": "b"}, "got 'b'"),
        ({**GOOD, "label": ""}, "HellaSwag's test part has no labels"),
        ({"ctx": "a", "endings": ["b", "c"]}, "got nothing; HellaSwag's test part has no labels"),
    ],
)
def test_broken_lines(tmp_path, line, message):
    with pytest.raises(InputError, match=rf"line 3: .*{re.escape(message)}"):
        read_questions(written(tmp_path, GOOD, "", line, GOOD))


def test_broken_files(tmp_path, model):
    with pytest.raises(MissingFileError, match=r"no file at 'gone\.jsonl'"):
        read_questions("gone.jsonl")
    with pytest.raises(InputError, match="has no questions"):
        read_questions(written(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes(b'{"ctx": "caf\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_questions(tmp_path / "latin.jsonl")
    with pytest.raises(InputError, match=r"line 7: Character 'z'.* is not among"):
        answer(*uniform(), [Question(7, "a", ["b", "z"], 0)])
    broken, tokenizer = uniform()
    broken.transformer.wte.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        answer(broken, tokenizer, [Question(1, "a", ["b", "c"], 0)])


def test_command_line(tmp_path, monkeypatch, capsys):
    """A model that has learned to count knows what comes next."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "count.txt").write_text("one two three four five six. " * 300, encoding="utf-8")
    assert main(["prepare", "--inputs", "count.txt", "--out", "data", "--tokenizer", "char"]) == 0
    sizes = "--n-layer 1 --n-head 2 --n-embd 32 --block-size 32 --batch-size 8 --device cpu --sample-tokens 1"
    training = "--steps 150 --warmup 5 --learning-rate 1e-2"
    assert main(["pretrain", "--data", "data", "--out", "run", *sizes.split(), *training.split()]) == 0
    questions = [
        {"ctx": "one two", "endings": ["six", "three", "four"], "label": 1},
        {"ctx": "two three", "endings": [" four five", "six one"], "label": "0"},
        {"ctx": "three four five", "endings": ["one", "three", "two", "six."], "label": 3},
        {"ctx": "one two three four five six. one two three", "endings": ["one", "four"], "label": 1},
    ]
    written(tmp_path, *questions)
    capsys.readouterr()
    assert main(["eval", "run", "--choices", "questions.jsonl", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "3 questions: accuracy 1.0000 +- 0.0000, length-normalised accuracy 1.0000 +- 0.0000; 1 more skipped" in out
    written(tmp_path, *questions[:1], {"ctx": "one", "endings": ["two", "zzz"], "label": 0})
    assert main(["eval", "run", "--choices", "questions.jsonl", "--device", "cpu"]) == 2
    assert "line 2: Character 'z'" in capsys.readouterr().err
