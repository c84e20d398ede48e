"""Instruction finetuning: a tiny model learns its examples by heart; what the run leaves behind; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from pygpt import GPT, GPTConfig
from pygpt.cli import main
from pygpt.data.instructions import get_template, load_template
from pygpt.errors import InputError
from pygpt.pretrained import load_with_tokenizer
from pygpt.tokenizer import TOKENIZER_FILE, CharTokenizer
from pygpt.train.checkpoint import checkpoints
from pygpt.train.instruct import InstructConfig, answer_loss, finetune_instruct, greedy_answers, load_parts

ENTRIES = [
    {"instruction": f"What is {a} plus {b}?", "input": "in words" if a == b else "", "output": f"It is {a + b}."}
    for a in range(4)
    for b in range(4)
]
QUIET = Console(quiet=True)


def make_base(folder: Path, texts: str, n_embd: int = 64) -> Path:
    """A model folder with random weights and a character tokenizer for these texts."""
    markers = get_template("phi3").format([{"role": "user", "content": ""}]) + get_template("phi3").answer_end
    tokenizer = CharTokenizer("".join(sorted(set(texts + markers))), unknown=True, end_of_text=True)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=512, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4, n_embd=n_embd))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def make_config(tmp_path: Path, entries: list[dict[str, str]], n_embd: int = 64, **settings: object) -> InstructConfig:
    (tmp_path / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    base = make_base(tmp_path / "base", json.dumps(entries, ensure_ascii=False) + "\n", n_embd)
    defaults = {
        "template": "phi3", "steps": 6, "warmup": 1, "batch_size": 4, "eval_every": 3, "sample_every": 0, "samples": 1,
        "answers": 2, "answer_tokens": 4, "learning_rate": 3e-3, "val_share": 0.1,
    }  # fmt: skip
    return InstructConfig(data=tmp_path / "data.json", init_from=base, out=tmp_path / "run", **{**defaults, **settings})


def learned(run: Path, config: InstructConfig) -> list[tuple[str, str, bool]]:
    """Expected answer, greedy answer and whether it ended, for all that the run was trained on."""
    model, tokenizer = load_with_tokenizer(checkpoints(run)[-1])  # by heart is not the lowest validation loss
    template = load_template(checkpoints(run)[-1])
    parts, _ = load_parts(config, model, tokenizer, template, lambda _: None)
    asked = parts["train"].conversations
    answers, *others = (greedy_answers(model, tokenizer, template, asked, 150, size) for size in (len(asked), 5))
    assert answers == others[0]  # whatever else is in the batch
    return [(asked[i][-1]["content"], *answer) for i, answer in enumerate(answers)]


def test_32_entries_are_learned_by_heart(shared_data, tmp_path):
    """Of the book's data: greedy answers equal the expected ones, character for character, and end with end-of-text."""
    entries = json.loads((shared_data / "instruction_data.json").read_text(encoding="utf-8"))[:34]
    config = make_config(
        tmp_path, entries, n_embd=128, packing=True, val_share=0.01, test_share=0.01, steps=200, warmup=20, batch_size=2,
        learning_rate=5e-3, betas=(0.9, 0.99), weight_decay=0.0, eval_every=0, samples=0,
    )  # fmt: skip
    found = learned(finetune_instruct(config, QUIET), config)
    assert len(found) == 32
    for expected, given, ended in found:
        assert (given, ended) == (expected, True)


def test_a_run_learns_and_leaves_figures_answers_and_its_template(tmp_path, capsys):
    config = make_config(tmp_path, ENTRIES, steps=400, batch_size=8, eval_every=0, warmup=20, answer_tokens=20)
    run = finetune_instruct(config, QUIET)
    assert all(given == expected and ended for expected, given, ended in learned(run, config))
    results = json.loads((run / "results.json").read_text())
    assert results["examples"] == {"train": 12, "val": 2, "test": 2}
    assert results["test"]["loss_after"] < 0.6 * results["test"]["loss_before"]
    model, tokenizer = load_with_tokenizer(config.init_from)
    parts, _ = load_parts(config, model, tokenizer, get_template("phi3"), lambda _: None)
    assert results["test"]["loss_before"] == pytest.approx(answer_loss(model.eval(), parts["test"], 1), rel=1e-5)
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert results["test"]["ended_with_end_of_text"] == sum(row["ended"] for row in rows) == 2
    assert load_template(checkpoints(run)[-1]) == load_template(run / "checkpoints" / "best") == get_template("phi3")
    # What was learned is what the command line writes.
    row = {key: ENTRIES[-2][key] for key in ("instruction", "input", "output")}
    capsys.readouterr()
    assert main(["generate", str(run), "--instruct", "--prompt", row["instruction"], "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip().startswith("It is ")


def test_held_out_loss_is_the_mean_over_answer_tokens(tmp_path):
    """Against torch's cross-entropy, conversation by conversation, with the mask written out."""
    config = make_config(tmp_path, ENTRIES)
    model, tokenizer = load_with_tokenizer(config.init_from)
    template = get_template("phi3")
    parts, _ = load_parts(config, model, tokenizer, template, lambda _: None)
    total = count = 0.0
    for conversation in parts["train"].conversations:
        prompt = tokenizer.encode(template.format(conversation[:-1]))
        answer_ids = [*tokenizer.encode(conversation[-1]["content"] + "<|end|>"), tokenizer.eot_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer_ids]))[0][0]
        total += F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(answer_ids), reduction="sum").item()
        count += len(answer_ids)
    found = [answer_loss(model.eval(), parts["train"], batch_size) for batch_size in (1, 5)]
    assert found == pytest.approx([total / count] * 2, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "dropout": 0.1}, {"train": "lora", "lora_dropout": 0.1}])
def test_resumed_equals_uninterrupted(tmp_path, settings):
    if settings.get("train") == "lora":
        pytest.importorskip("peft", reason="LoRA needs the library peft")
    config = make_config(tmp_path, ENTRIES, checkpoint_every=3, keep=2, **settings)
    whole = finetune_instruct(config, QUIET)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step_00000006")
    resumed = finetune_instruct(replace(config, out=half, resume=True), QUIET)
    weights = [load_with_tokenizer(run / "checkpoints" / "step_00000006")[0].state_dict() for run in (whole, resumed)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    config.data.write_text(json.dumps([*ENTRIES, ENTRIES[0]]), encoding="utf-8")
    with pytest.raises(ValueError, match="the data are not those that"):
        finetune_instruct(replace(config, out=half, resume=True, steps=7), QUIET)


def test_a_final_test_that_was_cut_off_is_made_up_for_on_resuming(tmp_path, monkeypatch):
    config = make_config(tmp_path, ENTRIES)
    straight = finetune_instruct(replace(config, out=tmp_path / "straight"), QUIET)

    def cut_off(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pygpt.train.instruct.greedy_answers", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetune_instruct(replace(config, samples=0), QUIET)
    resume = replace(config, resume=True)
    run = finetune_instruct(resume, QUIET)
    for name in ("results.json", "answers.jsonl"):
        assert (run / name).read_text() == (straight / name).read_text()
    with pytest.raises(InputError, match="already at step 6 of 6"):
        finetune_instruct(resume, QUIET)


def test_what_is_left_out_is_counted(tmp_path):
    long = {"instruction": "a" * 600, "output": "b"}
    cut = {"instruction": "a" * 400, "output": "b" * 200}
    empty = {"instruction": "a", "output": ""}
    config = make_config(tmp_path, [*ENTRIES, long, cut, empty])
    model, tokenizer = load_with_tokenizer(config.init_from)
    told: list[str] = []
    parts, report = load_parts(config, model, tokenizer, get_template("phi3"), told.append)
    assert report["skipped"] == {"empty answer": 1, "longer than 512 tokens": 2}
    assert sum(len(part.examples) for part in parts.values()) == len(ENTRIES)
    assert told[0] == "left out 1 of 19 examples: empty answer"
    _, report = load_parts(replace(config, long="truncate"), model, tokenizer, get_template("phi3"), told.append)
    assert report["skipped"] == {"empty answer": 1, "no answer within 512 tokens": 1}
    assert report["truncated"] == 1


def test_test_questions_that_training_has_too_are_counted(tmp_path):
    config = make_config(tmp_path, ENTRIES[:1] * 20)
    model, tokenizer = load_with_tokenizer(config.init_from)
    told: list[str] = []
    _, report = load_parts(config, model, tokenizer, get_template("phi3"), told.append)
    assert report["test_questions_seen_in_training"] == report["examples"]["test"] == 2
    assert told[-1].startswith("2 of 2 test questions are word for word")


def test_loss_on_all_tokens_is_for_training_only(tmp_path):
    config = make_config(tmp_path, ENTRIES, loss_on="all")
    model, tokenizer = load_with_tokenizer(config.init_from)
    parts, _ = load_parts(config, model, tokenizer, get_template("phi3"), lambda _: None)
    for part in parts.values():
        for example, scored in zip(part.examples, part.scored, strict=True):
            assert example.targets[:-1].tolist() == example.idx[1:].tolist()
            assert 0 < (scored.targets >= 0).sum() < 20


def test_a_text_that_the_tokenizer_does_not_know(tmp_path):
    config = make_config(tmp_path, ENTRIES)
    model, _ = load_with_tokenizer(config.init_from)
    tokenizer = CharTokenizer("abc", end_of_text=True)
    with pytest.raises(ValueError, match=r"data.json', entry 1: "):
        load_parts(config, model, tokenizer, get_template("phi3"), lambda _: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_on": "questions"}, "loss_on must be one of answers, all, got 'questions'"),
        ({"train": "head"}, "train must be one of all, lora"),
        ({"val_share": 0.0}, "val_share and test_share must be above 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"template": "vicuna"}, "no template 'vicuna'"),
        ({"val_share": 0.5, "test_share": 0.49}, "training, validation and test need one each"),
        ({"resume": True}, "nothing to resume"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        finetune_instruct(make_config(tmp_path, ENTRIES[:3], **settings), QUIET)


def test_a_base_without_a_tokenizer(tmp_path):
    config = make_config(tmp_path, ENTRIES)
    (config.init_from / TOKENIZER_FILE).unlink()
    with pytest.raises(ValueError, match="does not say which tokenizer it uses"):
        finetune_instruct(config, QUIET)


def test_command_line(tmp_path, capsys):
    config = make_config(tmp_path, ENTRIES)
    arguments = ["finetune", "instruct", "--data", str(config.data), "--init-from", str(config.init_from), "--out"]
    settings = ["--packing", "--steps=2", "--warmup=0", "--batch-size=2", "--answers=1", "--answer-tokens=2"]
    assert main([*arguments, str(tmp_path / "cli"), *settings]) == 0
    assert "held-out answers: loss" in capsys.readouterr().out
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a"', encoding="utf-8")
    arguments[3] = str(tmp_path / "broken.jsonl")
    assert main([*arguments, str(tmp_path / "cli2"), *settings]) == 2
    assert "broken.jsonl', line 1: broken JSON" in capsys.readouterr().err
