"""`pygpt eval` of texts and of labelled texts, against transformers and scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.classifier import Classifier
from pygpt.cli import main
from pygpt.errors import InputError, MissingFileError
from pygpt.tokenizer import CharTokenizer, Tokenizer
from pygpt.train import EvaluateConfig, evaluate

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")

TEXT = "Съешь же ещё этих мягких французских булок 🙂, да выпей чаю. The quick brown fox; naïve café.\n" * 9


def random_model(folder: Path, tokenizer: Tokenizer | None = None, block_size: int = 32) -> GPT:
    torch.manual_seed(0)
    vocab_size = tokenizer.vocab_size if tokenizer else 50257
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer.save(folder)
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_loss_is_that_of_transformers_on_the_same_windows(tmp_path, batch_size):
    random_model(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
    ids = torch.tensor(get_tokenizer().encode(TEXT))
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        x, y = ids[start : start + 32], ids[start + 1 : start + 33]
        with torch.no_grad():
            logp = theirs(x[None, : len(y)]).logits[0].log_softmax(-1)
        nats -= logp[torch.arange(len(y)), y].sum().item()
    result: Any = evaluate(
        EvaluateConfig(run=tmp_path, text=tmp_path / "text.txt", batch_size=batch_size, device="cpu")
    )
    assert result.tokens == len(ids) - 1 > 32 * 8
    assert result.loss == pytest.approx(nats / result.tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / result.tokens), rel=1e-4)
    size = len(TEXT.encode()) - len(get_tokenizer().decode_bytes(ids[:1]))  # the first token is not predicted
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_weights_of_8_bits(tmp_path, capsys):
    random_model(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    loss = evaluate(EvaluateConfig(run=tmp_path, text=tmp_path / "text.txt", device="cpu")).loss
    small = GPT.from_pretrained(tmp_path).to_int8()
    ids = torch.tensor(get_tokenizer().encode(TEXT))
    nats = 0.0
    for start in range(0, len(ids) - 1, 32):
        x, y = ids[start : start + 32], ids[start + 1 : start + 33]
        logp = small(x[None, : len(y)])[0][0].log_softmax(-1)
        nats -= logp[torch.arange(len(y)), y].sum().item()
    expected = nats / (len(ids) - 1)
    assert expected != pytest.approx(loss, rel=1e-6)
    assert main(["eval", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--int8", "--device", "cpu"]) == 0
    assert f"loss {expected:.4f}" in capsys.readouterr().out


def test_a_single_prediction(tmp_path):
    """Two tokens, one of which is predicted; and no fewer."""
    tokenizer = CharTokenizer("abc")
    model = random_model(tmp_path, tokenizer)
    (tmp_path / "text.txt").write_text("ab")
    result: Any = evaluate(EvaluateConfig(run=tmp_path, text=tmp_path / "text.txt", device="cpu"))
    expected = -model(torch.tensor([[0]]))[0][0, 0].log_softmax(-1)[1].item()
    assert (result.tokens, result.loss) == (1, pytest.approx(expected, rel=1e-5))
    assert result.bits_per_byte == pytest.approx(expected / math.log(2), rel=1e-5)
    for text in ("", "a"):
        (tmp_path / "text.txt").write_text(text)
        with pytest.raises(InputError, match=f"{len(text)} tokens; at least 2"):
            evaluate(EvaluateConfig(run=tmp_path, text=tmp_path / "text.txt", device="cpu"))


LABELS = ["ham", "spam", "жареное"]
ROWS = [(LABELS[i % 7 % 3], f"text {i} " + "🙂 ещё " * (i % 11)) for i in range(60)]


@pytest.fixture
def classifier(tmp_path: Path) -> Classifier:
    classifier = Classifier(random_model(tmp_path / "base"), LABELS, get_tokenizer(), max_length=16).eval()
    with torch.no_grad():
        classifier.score.weight.normal_()
    classifier.save_pretrained(tmp_path / "run")
    return classifier


def labelled(folder: Path, *rows: tuple[str, str]) -> Path:
    file = folder / "labelled.tsv"
    file.write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
    return file


def test_accuracy_and_macro_f1_are_those_of_transformers_and_scikit_learn(tmp_path, classifier, capsys):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed: nothing to compare with")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    predicted, truncated = [], 0
    for _, text in ROWS:
        ids = get_tokenizer().encode(text)
        truncated += len(ids) > 16
        with torch.no_grad():
            predicted.append(LABELS[theirs(torch.tensor([ids[:16]])).logits[0].argmax()])
    true = [label for label, _ in ROWS]
    assert len(set(predicted)) > 1
    file = labelled(tmp_path, *ROWS, ("spam", "  "), ("", "no label"))
    for batch_size in (1, 7, 100):
        config = EvaluateConfig(run=tmp_path / "run", labelled=file, batch_size=batch_size, device="cpu")
        result: Any = evaluate(config)
        assert result.scores.accuracy == pytest.approx(metrics.accuracy_score(true, predicted))
        assert result.scores.macro_f1 == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
        assert result.scores.confusion.tolist() == metrics.confusion_matrix(true, predicted, labels=LABELS).tolist()
        assert (result.truncated, result.skipped) == (truncated, {"empty text": 1, "empty label": 1})
    assert 0 < truncated < 60
    assert main(["eval", str(tmp_path / "run"), "--labelled", str(file), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"60 texts: accuracy {result.scores.accuracy:.2%}, macro-F1 {result.scores.macro_f1:.4f}" in out
    assert f"1 more left out: empty text; 1 more left out: empty label; {truncated} of them longer than" in out


@pytest.mark.parametrize("option", ["text", "choices", "data"])
def test_a_classifier_has_no_perplexity(tmp_path, classifier, capsys, option):
    assert main(["eval", str(tmp_path / "run"), f"--{option}", str(tmp_path)]) == 2
    assert "is a classifier, which predicts labels and not the next token: give --labelled" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a"]) == 2
    assert "try pygpt classify" in capsys.readouterr().err


def test_columns_by_name(tmp_path, classifier):
    rows = [{"body": text, "class": label} for label, text in ROWS]
    (tmp_path / "rows.dat").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options: Any = {"text_column": "body", "label_column": "class", "format": "jsonl"}
    config = EvaluateConfig(run=tmp_path / "run", labelled=tmp_path / "rows.dat", device="cpu", **options)
    plain = EvaluateConfig(run=tmp_path / "run", labelled=labelled(tmp_path, *ROWS), device="cpu")
    assert str(evaluate(config)) == str(evaluate(plain))


def test_labelled_texts_that_do_not_fit(tmp_path, classifier):
    def fails(run: str, file: Path) -> Any:
        return lambda: evaluate(EvaluateConfig(run=tmp_path / run, labelled=file, device="cpu"))

    for rows, message in (
        ([*ROWS[:2], ("egg", "x")], "line 3: the classifier does not know the label 'egg', only ham, spam, жареное"),
        ([("spam", " ")], "has no labelled text"),
    ):
        with pytest.raises(InputError, match=message):
            fails("run", labelled(tmp_path, *rows))()
    with pytest.raises(MissingFileError, match=r"no file at '.*gone\.tsv'"):
        fails("run", tmp_path / "gone.tsv")()
    with pytest.raises(InputError, match="a language model without a classification head"):
        fails("base", labelled(tmp_path, *ROWS))()
    Classifier(random_model(tmp_path / "chars", CharTokenizer("abc")), ["a", "b"]).save_pretrained(tmp_path / "chars")
    (tmp_path / "chars" / "pygpt_tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"'.*chars' does not say which tokenizer it uses"):
        fails("chars", labelled(tmp_path, ("a", "abc")))()
    CharTokenizer("abc").save(tmp_path / "chars")
    with pytest.raises(InputError, match=r"line 2: Character 'd'"):
        fails("chars", labelled(tmp_path, ("a", "abc"), ("b", "abcd")))()


def test_one_source_at_a_time(tmp_path):
    file = tmp_path / "x"
    for sources in ({}, {"text": file, "choices": file}, {"data": file, "labelled": file}):
        with pytest.raises(InputError, match="one of --data"):
            EvaluateConfig(run=tmp_path, **sources)
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        EvaluateConfig(run=tmp_path, text=file, batch_size=0)


def test_a_model_without_a_tokenizer(tmp_path):
    tokenizer = CharTokenizer("abc")
    random_model(tmp_path / "model", tokenizer)
    (tmp_path / "model" / "pygpt_tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text("abc")
    (tmp_path / "questions.jsonl").write_text('{"ctx": "a", "endings": ["b", "c"], "label": 0}')
    for source in ({"text": tmp_path / "text.txt"}, {"choices": tmp_path / "questions.jsonl"}):
        with pytest.raises(InputError, match="does not say which tokenizer it uses"):
            evaluate(EvaluateConfig(run=tmp_path / "model", device="cpu", **source))
