"""The command line as a user meets it: from text to a trained model, and what it says when something is wrong."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pygpt
from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.cli import main
from pygpt.data import load_tokens
from pygpt.ops import backends
from pygpt.tokenizer import CharTokenizer, load_tokenizer
from pygpt.train import resolve_checkpoint
from pygpt.train.checkpoint import checkpoints
from pygpt.train.metrics import read_metrics

TEXT = "".join(f"{i} + {j} = {i + j}; " + "naïve café 🙂\n" * (j == 0) for i in range(40) for j in range(25))
SMALL = [
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--block-size",
    "32",
    "--batch-size",
    "4",
    "--device",
    "cpu",
]
RUN = [*SMALL, "--steps", "30", "--warmup", "3", "--learning-rate", "1e-2", "--log-every", "1", "--sample-tokens", "20"]
PYGPT = [sys.executable, "-m", "pygpt"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in a folder of their own, so that what they write by default is written there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYGPT_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture
def data(folder: Path) -> Path:
    (folder / "sums.txt").write_text(TEXT, encoding="utf-8")
    assert main(["prepare", "--inputs", "sums.txt", "--out", "data", "--tokenizer", "char"]) == 0
    return folder / "data"


@pytest.fixture
def run(data: Path) -> Path:
    assert main(["pretrain", "--data", "data", "--out", "run", *RUN]) == 0
    return data.parent / "run"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with status 2 and at most two lines on stderr; returns them."""

    def check(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        message = capsys.readouterr().err
        assert message.startswith("pygpt: ")
        assert len(message.strip().splitlines()) <= 2
        return message

    return check


@pytest.fixture
def rejected(fails: Callable[..., str]) -> Callable[..., str]:
    """Runs a command whose settings are refused: one line says why, another where help is. Returns the first."""

    def check(*arguments: str) -> str:
        message, help = fails(*arguments).splitlines()
        command = " ".join(arguments[: 2 if arguments[0] == "finetune" else 1])
        assert help == f"see pygpt {command} --help"
        return message

    return check


def test_from_text_to_a_model_that_writes(data, capsys):
    capsys.readouterr()
    assert main(["pretrain", "--data", "data", "--out", "run", *RUN]) == 0
    out, run = capsys.readouterr().out, Path("run")
    assert "pygpt generate run" in out
    assert "sample after step 30" in out
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.5
    for name in ("checkpoints/step_00000030/model.safetensors", "checkpoints/best/pygpt_tokenizer.json", "loss.png"):
        assert (run / name).is_file(), name

    arguments = ["generate", "run", "--prompt", "1 + 2", "--max-new-tokens", "25", "--seed", "5", "--device", "cpu"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert len(text) == len("1 + 2") + 25 + len("\n")
    assert main(arguments) == 0
    assert capsys.readouterr().out == text
    assert main(["generate", str(resolve_checkpoint(run)), *arguments[2:]]) == 0  # a checkpoint is a model folder too
    assert capsys.readouterr().out == text


def test_what_is_streamed_is_what_is_generated(folder, capsys):
    """Tokens of gpt2 end within characters; a random model writes many bytes that are no text at all."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16))
    model.save_pretrained("model")  # no tokenizer file, as downloaded from Hugging Face
    tokenizer = get_tokenizer("gpt2")
    prompt = tokenizer.encode("🙂🙃")
    arguments = [
        "generate",
        "model",
        "--prompt",
        "🙂🙃",
        "--max-new-tokens",
        "40",
        "--temperature",
        "1.0",
        "--seed",
        "3",
    ]
    assert main([*arguments, "--device", "cpu"]) == 0
    ids = model.generate(torch.tensor([prompt]), 40, temperature=1.0, seed=3)[0]
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
    assert main(["generate", "model", "--max-new-tokens", "0"]) == 0
    assert capsys.readouterr().out == "\n"


def test_evaluation_is_the_mean_over_every_token(run, data, capsys):
    model = GPT.from_pretrained(run).eval()
    assert torch.equal(model.lm_head.weight, GPT.from_pretrained(resolve_checkpoint(run)).lm_head.weight)
    tokens = torch.from_numpy(np.asarray(load_tokens(data, "val")).astype(np.int64))
    losses = []
    for start in range(0, len(tokens) - 1, 32):  # one window at a time, the last one shorter
        x, y = tokens[start : start + 32], tokens[start + 1 : start + 33]
        logits = model(x[None, : len(y)])[0][0]
        losses.append(F.cross_entropy(logits.double(), y, reduction="none"))
    nats = torch.cat(losses)
    assert len(nats) == len(tokens) - 1 > 32 * 8  # several batches of 8 windows
    text = load_tokenizer(data).decode(tokens[1:])
    assert len(text.encode()) > len(text)  # bytes are not characters here

    def measured(*arguments: str) -> list[float]:
        capsys.readouterr()
        assert main(["eval", "run", "--device", "cpu", *arguments]) == 0
        return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\d(?:\.\d+)?", capsys.readouterr().out)]

    loss = nats.mean().item()
    bits = nats.sum().item() / math.log(2) / len(text.encode())
    expected = [len(nats), loss, math.exp(loss), bits]
    assert measured("--data", "data") == pytest.approx(expected, rel=1e-3)
    (data.parent / "val.txt").write_text(load_tokenizer(data).decode(tokens), encoding="utf-8")
    assert measured("--text", "val.txt") == pytest.approx(expected, rel=1e-3)
    assert measured("--data", "data", "--split", "train")[0] == len(load_tokens(data, "train")) - 1


def test_end_of_text_is_no_text(folder, capsys):
    """Bits per byte counts a special token's loss, but no bytes for it."""
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text("Hello, " * 50, encoding="utf-8")
    assert main(["prepare", "--inputs", "a.txt", "b.txt", "c.txt", "--out", "data", "--val-fraction", "0.4"]) == 0
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)).save_pretrained("model")
    capsys.readouterr()
    assert main(["eval", "model", "--data", "data"]) == 0
    found = re.search(r"([\d,]+) tokens: loss ([\d.]+), .* ([\d.]+) bits per byte", capsys.readouterr().out)
    tokens, loss, bits = (float(number.replace(",", "")) for number in found.groups())
    assert tokens == 101  # 50 times two, a last blank and end-of-text, less the first one
    assert bits == pytest.approx(tokens * loss / math.log(2) / (7 * 50 - len("Hello")), rel=1e-3)


@pytest.fixture
def one_thread():
    """As in ENVIRONMENT: torch's own reductions, unlike ours, give other bits with another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_interrupted_by_ctrl_c_and_resumed(data, run, one_thread):
    """In a process of its own: Ctrl-C, a clean exit, the same command with --resume, the very same weights."""
    command = [*PYGPT, "pretrain", "--data", "data", "--out", "stopped", *RUN, "--dropout", "0.1"]
    assert main([*command[3:-4], *command[-4:], "--out", "straight"]) == 0
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = data.parent / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"loss"') >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    step = int(checkpoints(Path("stopped"))[-1].name.removeprefix("step_"))
    if step < 30:  # it may have been quicker than the signal
        assert "--resume" in out
        assert "topping after this step" in err
        assert main([*command[3:], "--resume"]) == 0
    weights = [checkpoints(Path(name))[-1] / "model.safetensors" for name in ("straight", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_continued_pretraining(run, data, capsys):
    """--init-from starts where the other run's weights are, with a shorter context and dropout if asked for."""
    last = [row["val_loss"] for row in read_metrics(run) if "val_loss" in row][-1]
    rest = ["--data", "data", "--steps", "1", "--device", "cpu", "--batch-size", "4"]
    assert main(["pretrain", "--out", "more", "--init-from", "run", *rest]) == 0
    assert read_metrics(Path("more"))[0]["val_loss"] == pytest.approx(last, rel=1e-5)
    arguments = ["--init-from", "run", "--block-size", "8", "--dropout", "0.5", "--learning-rate", "0", *rest]
    assert main(["pretrain", "--out", "short", *arguments]) == 0
    model = GPT.from_pretrained(resolve_checkpoint("short"))
    assert (model.config.block_size, model.config.dropout) == (8, 0.5)
    original = GPT.from_pretrained(resolve_checkpoint("run"))
    assert torch.equal(model.transformer.wpe.weight, original.transformer.wpe.weight[:8])
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, original.transformer.h[0].mlp.c_fc.weight)


def test_commands_read_the_best_checkpoint(run, data, capsys):
    """Without any other: what follows it in a run is there for --resume only."""

    def says() -> list[str]:
        found = []
        for command in (["eval", "run", "--data", "data"], ["generate", "run", "--temperature", "0"]):
            capsys.readouterr()
            assert main([*command, "--device", "cpu"]) == 0
            found.append(capsys.readouterr().out)
        assert main(["export", "run", "exported"]) == 0
        shutil.rmtree("exported")
        return found

    expected = says()
    for checkpoint in checkpoints(run):
        (checkpoint / "model.safetensors").write_bytes(b"damaged")
    assert says() == expected
    weights = Path("run/checkpoints/best/model.safetensors")
    weights.write_bytes(b"damaged")
    assert main(["embeddings", "run", "--near", "a"]) == 2
    assert f"'{weights}' cannot be read" in capsys.readouterr().err


def test_sliding_windows_and_bfloat16(data):
    arguments = ["--data", "data", "--sampler", "sliding", "--stride", "16", "--dtype", "bfloat16", *RUN]
    assert main(["pretrain", "--out", "run", *arguments]) == 0
    weights = GPT.from_pretrained(resolve_checkpoint("run")).state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert main(["generate", "run", "--max-new-tokens", "3", "--device", "cpu"]) == 0


def test_characters_without_a_line_break(folder):
    """A sample starts with a line break where there is nothing better; here there is not even that."""
    (folder / "digits.txt").write_text("0123456789" * 200, encoding="utf-8")
    assert main(["prepare", "--inputs", "digits.txt", "--out", "data", "--tokenizer", "char"]) == 0
    assert main(["pretrain", "--data", "data", "--out", "run", *SMALL, "--steps", "2"]) == 0
    assert main(["generate", "run", "--device", "cpu"]) == 0


def test_without_data_the_standard_library_is_prepared(folder):
    assert (
        main(["pretrain", "--out", "run", *SMALL, "--steps", "1", "--eval-batches", "1", "--sample-tokens", "1"]) == 0
    )
    assert json.loads((folder / "run" / "data" / "meta.json").read_text())["documents"] > 100
    assert GPT.from_pretrained(resolve_checkpoint("run")).config.vocab_size == 50257


def test_a_run_is_not_overwritten_unasked(run, data, fails, rejected):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def untouched() -> bool:
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    again = ["pretrain", "--data", "data", "--out", "run", *RUN]
    assert "--overwrite" in fails(*again)
    assert "exclude each other" in rejected(*again, "--resume", "--overwrite")
    assert "already at step 30" in fails(*again, "--resume")
    # Asked for, but the new run cannot start: the old one is still there.
    assert "no folder" in fails("pretrain", "--data", "nowhere", "--out", "run", *RUN, "--overwrite")
    assert "block_size" in fails("pretrain", "--data", "data", "--out", "run", "--block-size", "5000", "--overwrite")
    assert untouched()
    (run / "notes.txt").write_text("mine")
    assert main([*again, "--overwrite", "--seed", "1"]) == 0
    assert not untouched()
    assert (run / "notes.txt").read_text() == "mine"


def test_what_cannot_be_resumed(run, data, fails):
    again = ["pretrain", "--data", "data", "--resume", *RUN]
    assert "'nowhere' has no checkpoint" in fails(*again, "--out", "nowhere")
    Path("empty/checkpoints/.tmp-step_00000003").mkdir(parents=True)
    assert "'empty' has no checkpoint" in fails(*again, "--out", "empty")
    assert "n_embd was 16" in fails(*again, "--out", "run", "--n-embd", "32", "--steps", "40")
    assert "learning_rate was 0.01" in fails(*again, "--out", "run", "--learning-rate", "0.1", "--steps", "40")
    again = [*again, "--out", "run", "--steps", "31"]
    Path("moved").mkdir()
    for name in ("train.bin", "val.bin", "meta.json", "pygpt_tokenizer.json"):
        Path("moved", name).write_bytes(Path("data", name).read_bytes())
    assert main([*again, "--data", "moved"]) == 0  # the same data in another place
    for name in ("train.bin", "val.bin"):
        tokens = bytearray(Path("moved", name).read_bytes())
        tokens[1000:1004] = tokens[1002:1004] + tokens[1000:1002]
        Path("moved", name).write_bytes(tokens)
        assert "the data are not those" in fails(*again, "--data", "moved", "--steps", "40")
        Path("moved", name).write_bytes(Path("data", name).read_bytes())
    Path("run/dataset.json").rename("dataset.json")
    assert "'run/dataset.json', which says" in fails(*again, "--steps", "40")
    Path("dataset.json").rename("run/dataset.json")
    again = again[:-4]
    (checkpoints(Path("run"))[-1] / "training.safetensors").unlink()
    assert "training.safetensors" in fails(*again, "--out", "run", "--steps", "40")


def test_data_that_does_not_fit(run, data, fails):
    assert "no folder nowhere" in fails("pretrain", "--data", "nowhere", "--out", "new")
    message = fails("pretrain", "--data", "data", "--out", "new", "--block-size", "2000")
    assert "val.bin' has" in message
    assert "block_size 2000 needs" in message
    # The same number of characters, but other ones.
    other = CharTokenizer("".join(chr(0x400 + i) for i in range(load_tokenizer(data).vocab_size)))
    Path("other.txt").write_text("".join(other.decode([i % other.vocab_size]) for i in range(3000)), encoding="utf-8")
    assert main(["prepare", "--inputs", "other.txt", "--out", "other", "--tokenizer", "char"]) == 0
    assert load_tokenizer("other").vocab_size == load_tokenizer(data).vocab_size
    for command in (
        ["pretrain", "--data", "other", "--out", "new", "--init-from", "run"],
        ["pretrain", "--data", "other", "--out", "run", "--resume", *RUN, "--steps", "40"],
        ["eval", "run", "--data", "other"],
    ):
        message = fails(*command)
        assert "another vocabulary" in message
        assert f"as many tokens ({other.vocab_size}), but other characters" in message
    assert "not among" in fails("eval", "run", "--text", "other.txt")
    assert "no text file at 'gone.txt'" in fails("eval", "run", "--text", "gone.txt")
    Path("latin.txt").write_bytes(b"caf\xe9 con leche")
    assert "not UTF-8" in fails("eval", "run", "--text", "latin.txt")
    Path("one.txt").write_text("1")
    assert "at least 2" in fails("eval", "run", "--text", "one.txt")
    assert not Path("new").exists()


def test_line_ends_count_as_they_are(folder, capsys):
    """prepare and eval read the same text: with its carriage returns, and without a byte-order mark."""
    text = "".join(f"{i} is a number\r\n" for i in range(400))
    (folder / "dos.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert main(["prepare", "--inputs", "dos.txt", "--out", "data", "--tokenizer", "char"]) == 0
    assert main(["pretrain", "--data", "data", "--out", "run", *SMALL, "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--text", "dos.txt", "--device", "cpu"]) == 0
    assert f"{len(text) - 1:,} tokens: loss" in capsys.readouterr().out
    tokens = load_tokenizer(folder / "data").encode(text)
    assert len(tokens) == sum(len(load_tokens(folder / "data", split)) for split in ("train", "val"))


def test_folders_and_seeds_that_cannot_be_used(run, data, fails, rejected):
    Path("file").write_text("mine")
    for out in ("file", "file/run"):
        for more in ([], ["--overwrite"]):
            assert "'file' is a file" in fails("pretrain", "--data", "data", "--out", out, *RUN, *more)
    if sys.platform == "linux":
        assert "'/proc/x' cannot be made" in fails("pretrain", "--data", "data", "--out", "/proc/x", *RUN)
    assert Path("file").read_text() == "mine"
    for seed in (2**63, 2**64 - 1, 10**23, -1):
        for command in (["pretrain"], ["generate", "run"], ["chat", "run"]):
            assert "seed must be" in rejected(*command, "--seed", str(seed))
    largest = ["--seed", str(2**63 - 1)]
    assert main(["pretrain", "--data", "data", "--out", "new", *RUN, *largest]) == 0
    assert main(["generate", "new", "--device", "cpu", "--max-new-tokens", "3", *largest]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that exists and cannot be read, by root neither")
def test_what_the_system_refuses_is_no_traceback(run, fails, monkeypatch):
    assert "Input/output error" in fails("eval", "run", "--text", "/proc/self/mem", "--device", "cpu")
    monkeypatch.setenv("PYGPT_TRACEBACK", "1")
    with pytest.raises(OSError, match="Input/output"):
        main(["eval", "run", "--text", "/proc/self/mem", "--device", "cpu"])


def test_models_that_cannot_be_had(run, data, fails):
    assert "'nowhere'" in fails("generate", "nowhere")
    assert "'nowhere'" in fails("eval", "nowhere", "--data", "data")
    assert "'nowhere'" in fails("pretrain", "--data", "data", "--init-from", "nowhere", "--out", "new")
    Path("empty").mkdir()
    assert "'empty' holds neither" in fails("generate", "empty")
    assert "n_embd (10)" in fails("pretrain", "--data", "data", "--out", "new", "--n-embd", "10", "--n-head", "3")
    assert "crop" in fails("pretrain", "--data", "data", "--out", "new", "--init-from", "run", "--block-size", "99")
    weights = resolve_checkpoint(run) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in fails("generate", "run")
    (resolve_checkpoint(run) / "pygpt_tokenizer.json").unlink()
    weights.unlink()
    assert "model.safetensors" in fails("generate", "run")


def test_prompts_that_cannot_be_used(run, fails):
    message = fails("generate", "run", "--prompt", "1" * 33)
    assert "33 tokens" in message
    assert "block_size (32)" in message
    assert "not among" in fails("generate", "run", "--prompt", "Ω")
    # While training, before the first step rather than after the last one.
    for prompt in ("1" * 33, "Ω"):
        fails("pretrain", "--data", "data", "--out", "new", *RUN, "--prompt", prompt)
    assert not Path("new/metrics.jsonl").exists()


def test_models_that_memory_cannot_hold(run, fails, monkeypatch):
    """Refused before any of their tensors is made; where few parameters are trained, weights alone have to fit."""
    monkeypatch.setattr("pygpt.train.trainer._physical_memory", lambda: 64 * 2**30)
    for arguments, needed in (
        (["pretrain", "--data", "data"], "173,987.0M parameters needs 2,268.5 GiB"),
        (["finetune", "classify", "--data", "texts.tsv"], "174,604.3M parameters needs 2,276.6 GiB"),
        (["finetune", "classify", "--data", "texts.tsv", "--train", "head"], "174,604.3M parameters needs 650.5 GiB"),
    ):
        message = fails(*arguments, "--out", "new", "--preset", "gpt3-175b", "--device", "cpu")
        assert f"a model of {needed} of memory or more, and this machine has 64.0" in message, message
    assert not Path("new").exists()


def test_settings_are_refused_when_the_command_line_is_read(rejected):
    assert rejected("pretrain", "--steps", "-3") == "pygpt: steps must be at least 1, got -3"
    assert "unknown preset 'gpt9'" in rejected("pretrain", "--preset", "gpt9")
    assert "leave out n_layer" in rejected("pretrain", "--init-from", "run", "--n-layer", "3")
    assert "stride is for" in rejected("pretrain", "--stride", "3")
    assert "dtype must be one of" in rejected("finetune", "instruct", "--init-from", "a", "--data", "b", "--dtype", "x")
    assert "one of --data" in rejected("eval", "run")


def test_arguments_that_cannot_be_read(capsys):
    for arguments, wanted in (
        (["pretrain", "--learning-rage", "1"], "learning-rate"),
        (["pretrain", "--steps", "x"], "invalid literal"),
        ([], "info"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert wanted in capsys.readouterr().err


def test_an_unknown_backend():
    environment = {**ENVIRONMENT, "PYGPT_BACKEND": "fast"}
    done = subprocess.run([*PYGPT, "info"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "unknown backend 'fast': choose one of" in done.stderr.strip().splitlines()[-1]


def test_a_device_that_is_not_there(run, fails):
    for device in ("cuda:99", "meta"):
        assert f"device '{device}' cannot be used" in fails("generate", "run", "--device", device)


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("PYGPT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["generate", "nowhere"])


def test_info_says_who_answers_and_why_the_others_do_not(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert pygpt.__version__ in out
    assert torch.__version__ in out
    for row in backends.report():
        line = next(line for line in out.splitlines() if f" {row.op} " in line and f" {row.device} " in line)
        assert f" {row.backend} " in line
        for reason in row.why_not.values():
            assert reason in out
    with pygpt.use_backend("eager"):
        assert main(["info"]) == 0
    assert "'eager' is forced" in capsys.readouterr().out
    assert "PYGPT_CUDA_HOPPER" not in out
    for value, effect in (("0", "by the portable kernels"), ("yes", "no effect, only 0 has one")):
        monkeypatch.setenv("PYGPT_CUDA_HOPPER", value)
        assert main(["info"]) == 0
        assert effect in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "prepare", "pretrain", "generate", "chat", "eval", "export"])
def test_help_explains_every_setting(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    # tyro leaves the text of a setting without a docstring empty, so that its default follows at once.
    assert not re.search(r"--[a-z-]+ \S+\s+│\n│\s+\(default", out)
    assert {"pretrain": "Adam's decay rates", "prepare": "Folder for train.bin"}.get(command, "") in out


def test_a_reader_that_goes_away(run):
    """As `pygpt generate ... | head -c 1`."""
    command = [*PYGPT, "generate", "run", "--max-new-tokens", "2000", "--device", "cpu"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) != 0
