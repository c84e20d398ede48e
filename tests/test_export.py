"""Exported folders, read by transformers and by lm-evaluation-harness as they come."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pygpt.tokenizer
from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.classifier import Classifier
from pygpt.cli import main
from pygpt.data.instructions import Template, get_template, load_template
from pygpt.errors import InputError, MissingFileError
from pygpt.export import ExportConfig, export
from pygpt.tokenizer import CharTokenizer, Tokenizer
from pygpt.train.multiple_choice import answer, encode_question, loglikelihoods, read_questions

transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing can read an export")

TEXTS = [
    "",
    " ",
    "Hello, do you like tea? <|endoftext|> In the sunlit terracesof someunknownPlace.",
    "<|endoftext|><|endoftext|>\n\n",
    "<|endoftext|",
    "  two  blanks\t\ttabs \r\n\n\n lines  \n ",
    "It's we're I'LL 'tis don'T ''s",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "👩‍👩‍👧‍👦 🙂🏽 e\u0301 é Ω≈ç√ 中文字符 ١٢٣ ½ ²",
    "x\x00y\x1c\x85\u00a0\u2028\u200b\u3000\ufeff\ufffd",
    "1234567890 3.14e-10 0xFF __init__ (a[i]+=b);",
    "a" * 500 + " " * 500 + "!" * 500,
]


def random_model(tokenizer: Tokenizer, folder: Path, **changes: Any) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": tokenizer.vocab_size}
    model = GPT(GPTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model.eval()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    """A model with GPT-2's vocabulary and the folder it was exported to."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = random_model(get_tokenizer(), folder / "model")
    return model, export(ExportConfig(run=folder / "model", out=folder / "exported"))


@pytest.fixture(scope="module")
def their_tokenizer(gpt2: tuple[GPT, Path]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(gpt2[1])


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2s_ids_are_the_same(their_tokenizer, text):
    ids = get_tokenizer().encode(text, allowed_special="all")
    assert their_tokenizer(text)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=300, deadline=None)
def test_gpt2s_ids_are_the_same_for_any_text(their_tokenizer, text):
    ids = get_tokenizer().encode(text, allowed_special="all")
    assert their_tokenizer(text)["input_ids"] == ids
    assert their_tokenizer.decode(ids) == text


def test_gpt2s_files_are_read_one_by_one(gpt2, tmp_path):
    """tokenizer.json by the tokenizers library, vocab.json and merges.txt by older versions of transformers."""
    import tokenizers

    whole = tokenizers.Tokenizer.from_file(str(gpt2[1] / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((gpt2[1] / name).read_bytes())
    parts = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = get_tokenizer().encode(text, allowed_special="all")
        assert whole.encode(text).ids == ids
        assert parts(text)["input_ids"] == ids


def test_tokenizer_and_generation_settings(gpt2, their_tokenizer):
    assert len(their_tokenizer) == 50257
    assert (their_tokenizer.bos_token_id, their_tokenizer.eos_token_id, their_tokenizer.pad_token) == (
        50256,
        50256,
        None,
    )
    assert their_tokenizer.model_max_length == 64
    generation = transformers.GenerationConfig.from_pretrained(gpt2[1])
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (50256, 50256, 50256)
    assert not list(gpt2[1].glob("*.py"))
    assert not list(gpt2[1].glob("*.tmp"))


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"vocab_size": 50304}])
def test_logits_and_generation_are_the_same(tmp_path, changes):
    ours = random_model(get_tokenizer(), tmp_path / "model", **changes)
    out = export(ExportConfig(run=tmp_path / "model", out=tmp_path / "a" / "b"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    prompt = torch.tensor([get_tokenizer().encode("Добрый day")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompt).logits, ours(prompt)[0], rtol=1e-4, atol=1e-4)
    text = theirs.generate(prompt, max_new_tokens=30, do_sample=False)
    torch.testing.assert_close(text, ours.generate(prompt, 30, temperature=0, eos_id=50256))
    again = GPT.from_pretrained(out)
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    # Once more from the export, and from what transformers saves of it.
    export(ExportConfig(run=out, out=tmp_path / "c"))
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "theirs").eval()(prompt)[0], ours(prompt)[0])


CHARACTERS = "\n !<abcdeforxt|>Жé中🙂\u0301\u2028"


@pytest.mark.parametrize("end_of_text", [False, True])
@pytest.mark.parametrize("unknown", [False, True])
def test_characters(tmp_path, end_of_text, unknown):
    tokenizer = CharTokenizer(CHARACTERS, unknown=unknown, end_of_text=end_of_text)
    ours = random_model(tokenizer, tmp_path / "model")
    out = export(ExportConfig(run=tmp_path / "model", out=tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert len(theirs) == tokenizer.vocab_size == model.config.vocab_size
    assert theirs.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eot_id
    generator = random.Random(0)
    texts = ["", "a", "\n", "<|endoftext|>", "a <|endoftext|>\n\nb", CHARACTERS]
    texts += ["".join(generator.choices(CHARACTERS, k=50)) for _ in range(20)]
    for text in texts:
        if "endoftext" in text and not end_of_text:  # its letters, not all of which are known
            text = text.replace("n", "a")
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    if unknown:
        assert theirs("aZ\u0416")["input_ids"] == tokenizer.encode("aZ\u0416")
    else:
        with pytest.raises(Exception, match="UNK"):
            theirs("aZ")
    idx = torch.tensor([tokenizer.encode("aЖ🙂")])
    torch.testing.assert_close(model(idx).logits, ours(idx)[0], rtol=1e-4, atol=1e-4)


def test_a_classifier_is_exported_as_one(tmp_path):
    gpt = random_model(get_tokenizer(), tmp_path / "model")
    classifier = Classifier(gpt, ["ham", "spam", "жареное"], get_tokenizer())
    with torch.no_grad():
        classifier.score.weight.normal_()
    classifier.eval().save_pretrained(tmp_path / "run" / "checkpoints" / "best")
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir()
    Classifier(gpt, ["x", "y"], get_tokenizer()).save_pretrained(tmp_path / "run" / "checkpoints" / "step_00000001")
    out = export(ExportConfig(run=tmp_path / "run", out=tmp_path / "out"))
    texts = ["You won! Call now", "see you", "Привет 🙂 and a longer one, so that there is padding"]
    pipeline = transformers.pipeline("text-classification", model=str(out), top_k=None, batch_size=3, device="cpu")
    for ours, theirs in zip(classifier.classify(texts), pipeline(texts), strict=True):
        assert {row["label"]: row["score"] for row in theirs} == pytest.approx(ours.probabilities, abs=1e-5)
    assert Classifier.from_pretrained(out).labels == classifier.labels


CONVERSATIONS = [
    [{"role": "user", "content": 'Напиши "стих"\\ 🙂 {input} {{ x }} {% if'}],
    [{"role": "user", "content": "Sum up.", "input": "A long\n\ntext with {content}"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi", "input": ""}],
    [
        {"role": "user", "content": "a", "input": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "f", "input": "g"},
    ],
]


@pytest.mark.parametrize("name", ["alpaca", "phi3", "own"])
def test_a_chat_template_comes_along(tmp_path, name):
    own = Template(
        user="\\\"{content}'\t→ ",
        opening="🙂 {content} {{ 1 }}\n",
        system="{content}!",
        answer_end="\n\n",
        between="--\n",
    )
    template = own if name == "own" else get_template(name)
    random_model(get_tokenizer(), tmp_path / "model", n_layer=1, n_embd=4)
    template.save(tmp_path / "model")
    out = export(ExportConfig(run=tmp_path / "model", out=tmp_path / "out"))
    assert load_template(out) == template
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for messages in CONVERSATIONS:
        prompt = template.format(messages)
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == prompt
        answered = [*messages, {"role": "assistant", "content": "The answer."}]
        whole = prompt + "The answer." + template.answer_end + "<|endoftext|>"
        assert tokenizer.apply_chat_template(answered, tokenize=False) == whole


def test_lm_evaluation_harness_agrees(gpt2, tmp_path):
    """The harness, as installed, on the exported folder: the same log-likelihoods and accuracies as ours."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'pygpt-kernels[eval]')")
    from test_multiple_choice import OWN, PUBLISHED, written

    model, folder = gpt2
    own = [{"ctx_a": row["ctx"], "ctx_b": "", "activity_label": "Ещё", **row} for row in OWN]
    file = written(
        tmp_path, *(row | {"label": int(row["label"])} for row in [*PUBLISHED, *own] if len(row["endings"]) < 6)
    )
    tasks = Path(__file__).parent / "lm_eval_tasks"
    command = (
        f"-m lm_eval --model hf --tasks local_choices --device cpu --batch_size 3 --log_samples --include_path {tasks}"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command.split(), "--model_args", f"pretrained={folder}", "--output_path", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(tmp_path.glob("out/*/results_*.json")).read_text())["results"]["local_choices"]
    samples = [json.loads(line) for line in next(tmp_path.glob("out/*/samples_*.jsonl")).read_text().splitlines()]
    questions = read_questions(file)
    result = answer(model, get_tokenizer(), questions)
    assert (result.questions, result.skipped) == (len(samples), 0)
    assert result.accuracy == pytest.approx(theirs["acc,none"])
    assert result.accuracy_normalised == pytest.approx(theirs["acc_norm,none"])
    for sample, question in zip(sorted(samples, key=lambda sample: sample["doc_id"]), questions, strict=True):
        assert (sample["doc"]["query"], sample["doc"]["choices"]) == (question.context, question.endings)
        rows = encode_question(question, get_tokenizer())
        expected = [float(response[0]) for response in sample["filtered_resps"]]
        np.testing.assert_allclose(loglikelihoods(model, rows), expected, rtol=1e-5)


def test_what_cannot_be_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_model(get_tokenizer(), tmp_path / "model", n_layer=1, n_embd=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for out in ("full", "full/notes.txt", "model"):
        assert main(["export", "model", out]) == 2
        assert f"'{out}' exists already: choose a new folder" in capsys.readouterr().err
    with pytest.raises(MissingFileError, match="no run or model at 'gone'"):
        export(ExportConfig(run=Path("gone"), out=Path("out")))
    random_model(CharTokenizer("abc"), tmp_path / "nameless")
    (tmp_path / "nameless" / "pygpt_tokenizer.json").unlink()
    with pytest.raises(InputError, match="'nameless' does not say which tokenizer it uses"):
        export(ExportConfig(run=Path("nameless"), out=Path("out")))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated or damaged"):
        export(ExportConfig(run=Path("model"), out=Path("out")))
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        export(ExportConfig(run=Path("model"), out=Path("out")))
    assert not (tmp_path / "out").exists()


def test_other_encodings_are_refused(tmp_path, monkeypatch):
    """r50k_base is GPT-2's vocabulary under another name; its file is placed where tiktoken looks for it."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    ranks = sorted(get_tokenizer()._encoding._mergeable_ranks.items(), key=lambda item: item[1])
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    (tmp_path / hashlib.sha1(url.encode()).hexdigest()).write_bytes(content)
    pygpt.tokenizer._get_tokenizer.cache_clear()
    random_model(get_tokenizer("r50k_base"), tmp_path / "model", n_layer=1, n_embd=4)
    with pytest.raises(InputError, match="'r50k_base' cannot be exported, only gpt2 and character tokenizers can"):
        export(ExportConfig(run=tmp_path / "model", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    random_model(get_tokenizer(), tmp_path / "model", n_layer=1, n_embd=4)
    (tmp_path / "out").mkdir()  # empty
    assert main(["export", "model", "out"]) == 0
    assert "AutoModelForCausalLM.from_pretrained('out')" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    theirs = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names == theirs | {"vocab.json", "merges.txt", "pygpt_tokenizer.json"}
    assert main(["generate", "out", "--max-new-tokens", "2", "--device", "cpu"]) == 0
