"""The classifier, its finetuning and the two commands, on tiny models, against runs without padding, scikit-learn and
transformers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import pygpt
from pygpt import GPT, Classifier, GPTConfig
from pygpt.cli import main
from pygpt.data.labelled import encode_text, pad
from pygpt.errors import InputError, InputTypeError
from pygpt.tokenizer import CharTokenizer
from pygpt.train import (
    ClassifyConfig,
    InstructConfig,
    PretrainConfig,
    finetune_classify,
    finetune_instruct,
    pretrain,
)
from pygpt.train.checkpoint import checkpoints
from pygpt.train.classify import _cross_entropy, freeze, label_weights
from pygpt.train.metrics import read_metrics
from pygpt.train.scores import Scores

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz ", unknown=True, end_of_text=True)
VOCABULARY, BLOCK = LETTERS.vocab_size, 24
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=VOCABULARY)


def make_base(seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(replace(SHAPE, **changes))


def make_classifier(labels: tuple[str, ...] = ("a", "b", "c"), **changes: Any) -> Classifier:
    model = Classifier(make_base(**changes), labels, LETTERS)
    torch.nn.init.normal_(model.score.weight)  # logits of a size at which differences would show
    return model


def sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, length) for length in lengths]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with a tokenizer to finetune."""
    model = make_base()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.4)  # so that frozen blocks tell letters apart
    model.save_pretrained(tmp_path / "base")
    LETTERS.save(tmp_path / "base")
    return tmp_path / "base"


def labelled(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Texts of random words, each with its label's own word somewhere among them."""
    generator, lines = np.random.default_rng(seed), []
    for label, count in counts.items():
        for _ in range(count):
            words = ["".join(generator.choice(list("bcdfgh"), 3)) for _ in range(generator.integers(1, 4))]
            words.insert(int(generator.integers(0, len(words) + 1)), label)
            lines.append(f"{label}\t{' '.join(words)}\n")
    generator.shuffle(lines)
    (folder / "data.tsv").write_text("".join(lines), encoding="utf-8")
    return folder / "data.tsv"


def settings(base: Path, data: Path, **changes: Any) -> ClassifyConfig:
    defaults: dict[str, Any] = {
        "init_from": base, "data": data, "out": base.parent / "run", "device": "cpu", "steps": 60, "batch_size": 8,
        "learning_rate": 1e-2, "warmup": 5, "eval_every": 20, "checkpoint_every": 20, "keep": 9, "patience": 0,
    }  # fmt: skip
    return ClassifyConfig(**(defaults | changes))


def finetuned(config: ClassifyConfig) -> tuple[str, dict[str, Any]]:
    """What finetuning prints, and results.json."""
    console = Console(file=io.StringIO(), width=200)
    finetune_classify(config, console)
    results = config.out / "results.json"
    return console.file.getvalue(), json.loads(results.read_text()) if results.is_file() else {}


# The model


@pytest.mark.parametrize("backend", ["eager", None])
def test_padded_batches_equal_sequences_one_by_one(backend):
    """The hidden state of the last real token, from the plain model run on the bare sequence."""
    model = make_classifier().eval()
    examples = sequences([1, 24, 5, 13, 5, 2])
    with torch.no_grad(), pygpt.use_backend(backend):
        one_by_one = [
            model.transformer(torch.from_numpy(example)[None])[0, -1] @ model.score.weight.t() for example in examples
        ]
        batch = model(*pad(examples))
        torch.testing.assert_close(batch, torch.stack(one_by_one), rtol=1e-5, atol=1e-5)
        for size in (1, 2, 4, 100):
            torch.testing.assert_close(model.logits(examples, size), batch, rtol=1e-5, atol=1e-5)
    assert batch.std() > 0.1


def test_padding_changes_neither_logits_nor_gradients():
    model, (idx, lengths) = make_classifier(), pad(sequences([3, 9, 1]))
    results = []
    for fill, more in ((0, 0), (VOCABULARY - 1, 0), (7, 11)):
        padded = F.pad(idx, (0, more))
        padded[torch.arange(padded.shape[1]) >= lengths[:, None]] = fill
        model.zero_grad()
        logits = model(padded, lengths)
        F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_evaluation_mode_is_put_back():
    model = make_classifier(dropout=0.5).train()
    one, two = (model.logits(sequences([4, 9])) for _ in range(2))
    assert torch.equal(one, two)  # no dropout
    assert model.training
    model.eval().logits(sequences([4]))
    assert not model.training


def test_transformers_computes_the_same(tmp_path):
    """Saved, it is a GPT2ForSequenceClassification, and what transformers saved is a Classifier."""
    transformers = pytest.importorskip("transformers")
    model = make_classifier(("no", "yes", "später")).eval()
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "no", 1: "yes", 2: "später"}
    examples = [e % 27 for e in sequences([5, 12, 1, 24])]  # they take the last token that is no padding
    idx, lengths = pad(examples)
    idx[torch.arange(idx.shape[1]) >= lengths[:, None]] = theirs.config.pad_token_id
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, lengths), rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = Classifier.from_pretrained(tmp_path / "theirs")
    assert back.labels == ["no", "yes", "später"]
    torch.testing.assert_close(back.logits(examples), model.logits(examples), rtol=1e-5, atol=1e-6)
    two = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)  # its labels are made up
    transformers.GPT2ForSequenceClassification(two).save_pretrained(tmp_path / "two")
    assert Classifier.from_pretrained(tmp_path / "two").labels == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize("bias", [True, False])
def test_saved_and_loaded(tmp_path, bias):
    model = Classifier(make_base(bias=bias), ["x", "y"], LETTERS, max_length=7)
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.max_length, loaded.config) == (["x", "y"], 7, model.config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.classify(["abc", "zz zz zz zz"]) == model.classify(["abc", "zz zz zz zz"])
    idx = torch.arange(9)[None]  # the language model under it is there as well
    assert torch.equal(GPT.from_pretrained(tmp_path).transformer(idx), model.transformer(idx))


def test_predictions_come_in_order_with_their_probabilities():
    model = make_classifier()
    texts = ["one", "a text that is much longer than the model reads", "x", "two two", "one"]
    predictions = model.classify(texts, batch_size=2)
    for text, prediction in zip(texts, predictions, strict=True):
        ids, cut = encode_text(text, LETTERS, BLOCK)
        expected = model.logits([ids])[0].softmax(-1)
        assert list(prediction.probabilities) == ["a", "b", "c"]
        assert list(prediction.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert prediction.label == "abc"[int(expected.argmax())]
        assert prediction.probability == max(prediction.probabilities.values())
        assert prediction.truncated == cut == (len(text) > BLOCK)
    assert model.classify([]) == []


def test_what_a_classifier_refuses(tmp_path):
    model = make_classifier()
    with pytest.raises(InputError, match="text 1: the text is empty"):
        model.classify(["a", " "])
    with pytest.raises(InputTypeError, match="list"):
        model.classify("abc")
    with pytest.raises(InputError, match="no tokenizer"):
        Classifier(make_base(), ["a", "b"]).classify(["a"])
    for labels in ([], ["a"], ["a", "a"]):
        with pytest.raises(InputError, match="at least two labels"):
            Classifier(make_base(), labels)
    for length in (0, BLOCK + 1):
        with pytest.raises(InputError, match="max_length"):
            Classifier(make_base(), ["a", "b"], max_length=length)
    make_base().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"language model without a classification head.*pygpt finetune classify"):
        Classifier.from_pretrained(tmp_path)


# Scores


@pytest.mark.parametrize("case", ["random", "a label never predicted", "a label that does not occur", "all right"])
def test_scores_are_scikit_learns(case):
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(7)
    true, predicted = generator.choice(4, 200, p=[0.6, 0.3, 0.07, 0.03]), generator.integers(0, 4, 200)
    if case == "a label never predicted":
        predicted[predicted == 3] = 0
    elif case == "a label that does not occur":
        true[true == 2], predicted[predicted == 2] = 1, 0
    elif case == "all right":
        predicted = true
    scores = Scores.of(["w", "x", "y", "z"], true, torch.from_numpy(predicted))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(true, predicted))
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert np.array_equal(scores.confusion, metrics.confusion_matrix(true, predicted, labels=range(4)))
    with pytest.raises(InputError, match="no example"):
        Scores.of(["a", "b"], [], [])


def test_label_weights_are_scikit_learns_and_batches_add_up():
    weights = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = [0] * 50 + [1] * 9 + [2] * 3
    ours = label_weights(labels)
    assert ours.tolist() == pytest.approx(weights("balanced", classes=np.arange(3), y=labels))
    # Trainer weighs accumulated batches by their size: so two halves must give the loss of the whole.
    logits, targets = torch.randn(62, 3), torch.tensor(labels)
    whole = _cross_entropy(logits, targets, ours)
    halves = [_cross_entropy(logits[part], targets[part], ours) for part in (slice(0, 55), slice(55, 62))]
    assert (halves[0] * 55 / 62 + halves[1] * 7 / 62).item() == pytest.approx(whole.item())
    # With the labels in these numbers each one has the same weight in the whole.
    each = torch.stack([F.cross_entropy(logits[targets == k], targets[targets == k]) for k in range(3)])
    assert each.mean().item() == pytest.approx(whole.item(), rel=1e-5)


# Finetuning


@pytest.mark.parametrize("train", ["all", "blocks", "head", "lora"])
def test_a_tiny_model_learns_and_predicts_right(base, train):
    data = labelled(base.parent, {"spam": 60, "ham": 60})
    config = settings(base, data, train=train, steps=400 if train == "lora" else 150, learning_rate=5e-3)
    printed, results = finetuned(config)
    if train != "head":  # the head alone reads what random weights left in the last state
        assert results["train"]["accuracy"] > 0.95
        assert results["test"]["accuracy"] > 0.9
    assert f"accuracy {results['test']['accuracy']:.2%}" in printed
    assert (config.out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    trained, start = Classifier.from_pretrained(config.out).state_dict(), GPT.from_pretrained(base).state_dict()
    changed = {name for name in start if name in trained and not torch.equal(trained[name], start[name])}
    linear = {name for name in trained if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    last = {name for name in trained if ".h.1." in name or ".ln_f." in name}
    assert changed == {"all": trained.keys() - {"score.weight"}, "blocks": last, "head": set(), "lora": linear}[train]


def test_the_results_are_those_of_the_best_checkpoint(base):
    data = labelled(base.parent, {"spam": 40, "ham": 160})
    lines = [line.split("\t") for line in data.read_text().splitlines()]
    for number in range(0, 200, 10):  # a few wrong labels, which can only be learned by heart
        lines[number][0] = "spam" if lines[number][0] == "ham" else "ham"
    data.write_text("".join(f"{label}\t{text}\n" for label, text in lines))
    _, results = finetuned(settings(base, data, steps=100, learning_rate=3e-2, eval_every=10))
    run = base.parent / "run"
    rows = {row["step"]: row for row in read_metrics(run) if "val_loss" in row and row["step"] > 0}
    assert len(rows) == 10
    assert results["best_step"] == min(rows, key=lambda step: rows[step]["val_loss"]) < 100  # the last is another one
    model = Classifier.from_pretrained(run)
    right = sum(p.label == label for p, (label, _) in zip(model.classify([t for _, t in lines]), lines, strict=True))
    parts = [results[part] for part in ("train", "val", "test")]
    assert [part["examples"] for part in parts] == [140, 20, 40]
    assert right == sum(part["confusion"][k][k] for part in parts for k in (0, 1))
    assert results["val"]["accuracy"] == rows[results["best_step"]]["val_accuracy"]
    assert results["val"]["macro_f1"] == rows[results["best_step"]]["val_macro_f1"]
    assert results["texts"]["test"] == dict(zip(("ham", "spam"), map(sum, results["test"]["confusion"]), strict=True))


def test_training_stops_early_and_resuming_it_changes_nothing(base):
    data = labelled(base.parent, {"spam": 30, "ham": 30})
    config = settings(base, data, steps=400, learning_rate=5e-2, eval_every=5, patience=3, checkpoint_every=0)
    printed, results = finetuned(config)
    last = int(checkpoints(config.out)[-1].name.removeprefix("step_"))
    assert results["best_step"] == last - 15 < 385
    assert f"stopped after step {last}: 3 evaluations in a row" in printed
    assert read_metrics(config.out)[-1]["step"] == last
    again, same = finetuned(replace(config, resume=True))
    assert same == results
    assert f"stopped after step {last}: 3 evaluations in a row" in again
    assert "--resume" not in again


@pytest.mark.parametrize("options", [{"train": "blocks", "dtype": "bfloat16"}, {"train": "lora", "lora_dropout": 0.1}])
def test_a_resumed_run_ends_with_the_same_bits(base, options):
    data = labelled(base.parent, {"spam": 30, "ham": 50})
    config = settings(base, data, steps=40, dropout=0.1, balance="weights", accumulate=2, **options)
    results = finetuned(config)[1]
    whole = {path.name: path.read_bytes() for path in checkpoints(config.out)[-1].iterdir()}
    best = (config.out / "checkpoints" / "best" / "model.safetensors").read_bytes()
    rows = [row.get("val_loss", row.get("loss")) for row in read_metrics(config.out)]
    for path in checkpoints(config.out)[1:]:
        path.rename(base.parent / path.name)
    resumed = finetuned(replace(config, resume=True))[1]
    again = {path.name: path.read_bytes() for path in checkpoints(config.out)[-1].iterdir()}
    again.pop("training.json"), whole.pop("training.json")
    assert again.keys() == whole.keys()
    assert all(again[name] == whole[name] for name in whole)
    assert (config.out / "checkpoints" / "best" / "model.safetensors").read_bytes() == best
    assert [row.get("val_loss", row.get("loss")) for row in read_metrics(config.out)] == rows
    assert resumed == results


def test_a_final_test_that_was_cut_off_is_made_up_for_on_resuming(base, monkeypatch):
    data = labelled(base.parent, {"spam": 30, "ham": 50})
    config = settings(base, data, steps=20)
    straight = finetuned(replace(config, out=base.parent / "straight"))[1]

    def cut_off(*arguments: Any) -> None:
        raise KeyboardInterrupt

    def interrupted(config: ClassifyConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Scores, "plot", cut_off)
            with pytest.raises(KeyboardInterrupt):
                finetuned(config)
        assert not (config.out / "results.json").exists()

    interrupted(config)
    resume = replace(config, resume=True)
    assert finetuned(resume)[1] == straight
    with pytest.raises(InputError, match="already at step 20 of 20"):
        finetuned(resume)
    assert (config.out / "results.json").exists()
    interrupted(replace(resume, steps=40))  # which leaves no results of the 20 steps behind either
    assert finetuned(replace(resume, steps=40))[1]["best_step"] in (20, 40)


def test_only_classification_starts_from_a_classifier(base):
    data = labelled(base.parent, {"spam": 30, "ham": 50})
    run = finetune_classify(settings(base, data, steps=1), Console(quiet=True))
    for name in ("train", "val"):
        np.zeros(100, np.uint16).tofile(base.parent / f"{name}.bin")
    out = base.parent / "other"
    with pytest.raises(InputError, match=r"is a classifier, .* start from a model that was not"):
        pretrain(PretrainConfig(data=base.parent, init_from=run, out=out, device="cpu"), Console(quiet=True))
    with pytest.raises(InputError, match=r"is a classifier, .* start from a model that was not"):
        finetune_instruct(InstructConfig(data=data, init_from=run, out=out, device="cpu"), Console(quiet=True))
    assert not out.exists()


def test_a_run_that_cannot_go_on(base):
    data = labelled(base.parent, {"spam": 30, "ham": 50})
    config = settings(base, data, steps=20)
    finetuned(config)
    with pytest.raises(InputError, match="holds an earlier run"):
        finetuned(config)
    with pytest.raises(InputError, match=r"train was all .* head now"):
        finetuned(replace(config, resume=True, steps=30, train="head"))
    labelled(base.parent, {"spam": 30, "other": 50})
    with pytest.raises(InputError, match="the data are not those that"):
        finetuned(replace(config, resume=True, steps=30))
    (config.out / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json', which says what the run was trained on, is not readable"):
        finetuned(replace(config, resume=True, steps=30))
    _, results = finetuned(replace(config, overwrite=True))
    assert results["labels"] == ["other", "spam"]


def test_random_weights_share_only_sizes_and_tokenizer(base):
    data = labelled(base.parent, {"spam": 20, "ham": 20})
    frozen = {"train": "head", "steps": 5}
    finetuned(settings(base, data, **frozen))
    finetuned(settings(base, data, random_weights=True, out=base.parent / "random", **frozen))
    start = GPT.from_pretrained(base).transformer.wte.weight
    assert torch.equal(Classifier.from_pretrained(base.parent / "run").transformer.wte.weight, start)
    other = Classifier.from_pretrained(base.parent / "random")
    assert other.config == GPT.from_pretrained(base).config
    assert other.tokenizer.to_dict() == LETTERS.to_dict()
    assert not torch.isclose(other.transformer.wte.weight, start).any(1).all()


def test_a_preset_with_gpt2s_tokenizer(tmp_path):
    data = labelled(tmp_path, {"spam": 8, "ham": 8})
    config = ClassifyConfig(preset="nano", data=data, out=tmp_path / "run", steps=2, device="cpu", dropout=0.2)
    finetuned(config)
    model = Classifier.from_pretrained(tmp_path / "run")
    assert (model.config.n_embd, model.config.vocab_size, model.config.dropout) == (48, 50257, 0.2)
    assert model.tokenizer.name == "gpt2"


def test_balance_and_long_texts_are_counted(base):
    data = labelled(base.parent, {"spam": 20, "ham": 90})
    lines = data.read_text().splitlines()
    long = sum(len(line.split("\t")[1]) > 10 for line in lines)
    data.write_text("\n".join([*lines, "ham\t ", "spam\t", "\tno label"]))
    printed, results = finetuned(settings(base, data, steps=1, balance="subsample", max_length=10))
    assert {part: sum(counts.values()) for part, counts in results["texts"].items()} == {
        "train": 28,
        "val": 4,
        "test": 8,
    }
    assert results["texts"]["test"] == {"ham": 4, "spam": 4}
    assert results["skipped"] == {"empty text": 2, "empty label": 1}
    assert results["truncated"] == long
    assert "left out 2 of 113 texts: empty text" in printed
    assert f"{long} texts are longer than 10 tokens and were cut there" in printed
    assert Classifier.from_pretrained(base.parent / "run").max_length == 10
    config = settings(base, data, steps=1, max_length=10, long="skip", out=base.parent / "skipped")
    printed, results = finetuned(config)
    assert results["skipped"]["longer than 10 tokens"] == long
    assert results["truncated"] == 0
    assert f"left out {long} of 113 texts: longer than 10 tokens" in printed
    assert sum(results[part]["examples"] for part in ("train", "val", "test")) == 110 - long


def test_repeated_texts_across_the_split_are_reported(base):
    data = base.parent / "data.tsv"
    data.write_text("ham\tsame\n" * 20 + "".join(f"spam\t{'abcdefghijklmnopqrst'[i] * 3}\n" for i in range(20)))
    printed, results = finetuned(settings(base, data, steps=1))
    assert results["test_texts_seen_in_training"] == 4
    assert "4 of 8 test texts are word for word among the training texts too" in printed


def test_unknown_characters_are_named_with_their_line(tmp_path):
    make_base(vocab_size=2).save_pretrained(tmp_path / "base")
    CharTokenizer("ab").save(tmp_path / "base")
    (tmp_path / "data.tsv").write_text("x\tab\ny\tac\n")
    with pytest.raises(InputError, match=r"data.tsv', line 2: Character 'c'"):
        finetuned(settings(tmp_path / "base", tmp_path / "data.tsv"))


def test_a_base_without_tokenizer(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="does not say which tokenizer"):
        finetuned(settings(tmp_path / "base", labelled(tmp_path, {"a": 9, "b": 9})))


def test_a_length_beyond_the_models(base):
    data = labelled(base.parent, {"a": 9, "b": 9})
    with pytest.raises(InputError, match=r"max_length must be from 1 to the model's block_size \(24\), got 25"):
        finetuned(settings(base, data, max_length=25))


def test_labels_are_printed_as_they_are(base):
    data = base.parent / "data.tsv"
    data.write_text("[b]\tone\n[/b]\ttwo\n$x_$\tthree\n" * 9)
    printed, results = finetuned(settings(base, data, steps=1))
    assert results["labels"] == ["$x_$", "[/b]", "[b]"]
    assert all(label in printed.split("predicted", 1)[1] for label in results["labels"])
    assert (base.parent / "run" / "confusion.png").is_file()


def test_freezing_more_blocks_than_there_are(base):
    data = labelled(base.parent, {"a": 9, "b": 9})
    with pytest.raises(InputError, match="blocks is 3, and the model has 2"):
        freeze(make_classifier(), settings(base, data, train="blocks", blocks=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "tail"}, "train must be one of all, blocks, head, lora, got 'tail'"),
        ({"balance": "x"}, "balance must be one of"),
        ({"long": "x"}, "long must be one of truncate, skip"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"patience": -1}, "patience must be 0 or more"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"init_from": None}, "either init_from .* or preset"),
        ({"preset": "nano"}, "either init_from .* or preset"),
        ({"init_from": None, "preset": "nano", "random_weights": True}, "random_weights takes its sizes"),
        ({"init_from": None, "preset": "huge"}, "unknown preset 'huge'"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        ClassifyConfig(**({"data": Path("x.tsv"), "init_from": Path("base")} | changes))


# The command line


@pytest.fixture
def run(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(base.parent)
    labelled(base.parent, {"spam": 60, "ham": 60})
    arguments = "--init-from base --data data.tsv --out run --steps 120 --learning-rate 2e-2 --warmup 5 --device cpu"
    assert main(["finetune", "classify", *arguments.split()]) == 0
    assert 'pygpt classify run "a text"' in capsys.readouterr().out
    return base.parent / "run"


@pytest.fixture
def classified(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[list[list[str]], str]]:
    """Runs `pygpt classify` -> the fields it prints, and its stderr."""

    def call(*arguments: str | Path) -> tuple[list[list[str]], str]:
        capsys.readouterr()
        assert main(["classify", *map(str, arguments), "--device", "cpu"]) == 0
        out, err = capsys.readouterr()
        return [line.split("\t") for line in out.splitlines()], err

    return call


def test_from_the_command_line(run, classified):
    rows, err = classified("run", "bcd spam", "ham fgh")
    assert [(row[0], row[2]) for row in rows] == [("spam", "bcd spam"), ("ham", "ham fgh")]
    assert all(0.5 < float(row[1]) <= 1 for row in rows)
    assert err == ""
    expected = [p.label for p in pygpt.Classifier.from_pretrained("run").classify(["bcd spam", "ham fgh"])]
    assert [row[0] for row in rows] == expected
    (run.parent / "texts.txt").write_text("spam bcd\n\n \nham " + "bcd " * 9 + "\n")
    rows, err = classified(run, "--file", "texts.txt", "--batch-size", "1")
    assert rows[0][0] == "spam"
    assert len(rows) == 2
    assert "1 texts are longer than 24 tokens" in err
    rows, err = classified(run / "checkpoints" / "best", "--file", "data.tsv")
    assert np.mean([row[0] in row[2].split() for row in rows]) > 0.95
    (run.parent / "texts.jsonl").write_text('{"body": "spam"}\n{"body": ""}\n')
    rows, err = classified(run, "--file", "texts.jsonl", "--text-column", "body")
    assert [row[2] for row in rows] == ["spam"]
    assert "left out 1 rows: empty text" in err


def test_errors_on_the_command_line(run, base, capsys):
    def fails(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments]) == 2
        message = capsys.readouterr().err
        assert len(message.strip().splitlines()) <= 2
        return message

    assert "language model without a classification head" in fails("classify", "base", "x")
    for arguments in (["run"], ["run", "x", "--file", "data.tsv"], ["run", "x", "--batch-size", "0"]):
        wanted = "batch_size must be at least 1" if "0" in arguments else "either texts to classify or --file"
        assert wanted in fails("classify", *arguments)
    assert "text 0: the text is empty" in fails("classify", "run", "")
    assert "no file at" in fails("classify", "run", "--file", "none.txt")
    (run.parent / "one.tsv").write_text("ham\ta\n" * 9)
    assert "all examples have the label 'ham'" in fails(
        "finetune", "classify", "--init-from", "base", "--data", "one.tsv", "--out", "other"
    )
    (run.parent / "broken.jsonl").write_text('{"text": "a", "label": "x"}\n{"text"\n')
    assert "line 2: broken JSON" in fails(
        "finetune", "classify", "--init-from", "base", "--data", "broken.jsonl", "--out", "other"
    )


def test_sms_spam_by_the_books_protocol(tmp_path, shared_data):
    """747 of each label, 70/10/20, a small model from random weights: far better than chance after a few steps."""
    config = ClassifyConfig(
        preset="nano", data=shared_data / "sms_spam_collection.tsv", out=tmp_path, balance="subsample", device="cpu",
        steps=60, warmup=5, learning_rate=3e-3, eval_every=20, max_length=48,
    )  # fmt: skip
    _, results = finetuned(config)
    assert [results[part]["examples"] for part in ("train", "val", "test")] == [1046, 150, 298]
    assert results["texts"]["test"] == {"ham": 149, "spam": 149}
    assert results["test"]["accuracy"] > 0.85
