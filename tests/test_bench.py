"""`pygpt bench`: what it measures is what it says, its files can be read, its errors name what was wrong."""

from __future__ import annotations

import importlib
import os
import signal

import pytest
import torch
from common import assert_close
from rich.console import Console

from pygpt import GPT, GPTConfig
from pygpt.bench import BenchConfig, baseline, bench, command, model
from pygpt.bench.command import _alone, cases, contestants, show
from pygpt.bench.ops import OPS
from pygpt.bench.report import TUNED, Row, read_json
from pygpt.bench.timing import disagreement
from pygpt.bench.worker import Case, Worker, WorkerError
from pygpt.cli import main
from pygpt.errors import InputError


def test_a_small_run(tmp_path):
    console = Console(record=True, width=150)
    config = BenchConfig(
        only=("gelu", "adamw", "training"), quick=True, seconds=0.01, threads=1, dtypes=("float32",), out=tmp_path
    )
    rows = bench(config, console)
    assert [(row.op, row.passes) for row in rows if row.who == "pygpt"] == [
        ("gelu", "forward"),
        ("gelu", "forward+backward"),
        ("adamw", "step"),
        ("training", "step"),
    ]
    assert {row.name for row in rows} == {"pygpt", "eager", "eager, tuned"}
    ours = {(row.op, row.passes): row for row in rows if row.who == "pygpt"}
    for row in rows:
        assert not row.problem
        assert row.rounds >= 4
        assert row.best_ms <= row.ms
        assert row.speedup == pytest.approx(row.ms / ours[row.op, row.passes].ms)
    both = ours["gelu", "forward+backward"]
    assert both.rate == pytest.approx(5 * 4 * 768 * 512 / 1e9 / (both.ms / 1e3))  # x, y, gradient, x, gradient of x
    assert ours["training", "step"].rate == pytest.approx(128 / (ours["training", "step"].ms / 1e3))
    found, about = read_json(tmp_path / "bench.json")
    assert found == rows
    assert not (tmp_path / "bench.part.json").exists()
    assert about["threads"] == 1
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = console.export_text()
    for row in rows:  # a line each
        time = f"{row.ms:.3g} ms" if row.ms < 1000 else f"{row.ms / 1e3:.3g} s"
        shown = [time, f"{row.rate:.4g} {row.unit}"] + [f"{row.speedup:.2f}x"] * (row.who != "pygpt")
        assert any(row.name in line and all(x in line for x in shown) for line in text.splitlines())


def test_peak_memory_of_a_process_alone():
    found = _alone(Case("training", ("nano", 1, 16), "float32", "step"), [("pygpt", TUNED)], threads=1, rounds=3)
    [row] = found.rows(Case("training", ("nano", 1, 16), "float32", "step"), "nano", [("pygpt", TUNED)])
    assert row.rounds == 4  # two processes
    weights = GPT(GPTConfig.preset("nano")).get_num_params() * 4 / 2**20
    assert 4 * weights < row.peak_mib < 4000  # weights, gradients, two averages


def test_a_process_that_ends_and_a_peer_that_cannot_run():
    case = Case("decode", ("nano", 1, 2), "float32", "greedy")
    with Worker(tuned=False, threads=1) as worker:
        prepared = worker.prepare(case, ["pygpt", "CTranslate3"])
        assert prepared.problems.keys() == {"CTranslate3"}
        assert "CTranslate3" in prepared.problems["CTranslate3"]
        assert worker.time("pygpt") > 0
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="status -9"):
            worker.time("pygpt")


@pytest.mark.parametrize("op", OPS)
def test_contestants_agree_and_are_compared_by_their_gradients_too(op):
    entry = OPS[op]
    torch.manual_seed(0)
    pair = entry.make(entry.shapes[entry.quick], torch.float32, "cpu")
    ours, peer = (pair.call(side, entry.passes[-1])() for side in (True, False))
    assert disagreement(ours, peer, torch.float32) == ""
    if entry.passes[-1] == "forward+backward":
        assert len(ours) == len(pair.cotangents) + len(pair.inputs)
        ours[-1] = ours[-1] * 1.01
        assert "differ by" in disagreement(ours, peer, torch.float32)


def test_disagreement():
    x = torch.tensor([1.0, 2.0])
    assert disagreement(x, x, torch.float32) == ""
    assert "shape" in disagreement(x, x[None], torch.float32)
    assert "differ" in disagreement(x + 1e-3, x, torch.float32)
    assert "differ" in disagreement(x * torch.nan, x, torch.float32)


def test_the_baseline_is_the_same_model():
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, block_size=48)
    torch.manual_seed(0)
    ours = GPT(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # biases too
    plain = baseline.GPT(baseline.GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=97, block_size=48))
    plain.load_state_dict(ours.state_dict())
    idx, targets = torch.randint(97, (2, 2, 48))
    losses = [m(idx, targets)[1] for m in (ours, plain)]
    assert_close(losses[0], losses[1])
    for (name, p), (_, q) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert_close(
            *(torch.autograd.grad(loss, x, retain_graph=True)[0] for loss, x in zip(losses, (p, q), strict=True)),
            what=name,
        )
    prompt = idx[:, :5]
    assert torch.equal(ours.generate(prompt, 30, temperature=0), model._without_cache(plain, prompt, 30))


@pytest.mark.parametrize("side", ["pygpt int8", "transformers", "CTranslate2 int8"])
def test_peers_of_decoding_give_as_many_tokens(side):
    try:
        call = model.build("decode", side, "nano", 2, 3, torch.float32, "cpu")
    except model.NotInstalledError:
        pytest.skip(f"{side} is not installed")
    out = call()
    if side != "CTranslate2 int8":
        assert out.shape == (2, model.PROMPT + 3)
    else:
        assert [len(result.sequences_ids[0]) for result in out] == [3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"only": ("gelu", "attention")}, "unknown op 'attention': choose from embedding, .*, decode"),
        ({"dtypes": ("float16",)}, "unknown dtype 'float16': choose from float32, bfloat16"),
        ({"dtypes": ()}, "no dtypes"),
        ({"preset": "gpt5"}, "unknown preset 'gpt5'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"decode_batches": (1, 0)}, "decode_batches must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds must be over 0"),
        ({"seconds": float("nan")}, "seconds must be over 0"),
        ({"preset": "micro"}, "'micro' takes 64 tokens, and 1024 were asked for"),
        ({"preset": "micro", "block_size": 64, "decode_tokens": 40}, "takes 64 tokens, and 72 were"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**settings)


def test_errors_of_the_command_line(tmp_path, capsys):
    assert main(["bench", "--only", "gelus"]) == 2
    assert "unknown op 'gelus'" in (error := capsys.readouterr().err)
    assert "see pygpt bench --help" in error
    assert main(["bench", "--quick", "--device", "tpu9"]) == 2
    assert "device 'tpu9' cannot be used" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["bench", "--quick", "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_run_that_is_cut_short_leaves_what_it_measured(tmp_path, monkeypatch):
    measure = command._together

    def interrupted(case, *others):
        if case.passes != "forward":
            raise KeyboardInterrupt
        return measure(case, *others)

    monkeypatch.setattr(command, "_together", interrupted)
    (tmp_path / "bench.json").write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        bench(BenchConfig(only=("gelu",), quick=True, seconds=0.01, threads=1, dtypes=("float32",), out=tmp_path))
    assert (tmp_path / "bench.json").read_text() == "of an earlier run"
    found, _ = read_json(tmp_path / "bench.part.json")
    assert {row.passes for row in found} == {"forward"}
    assert all(row.ms for row in found)


def test_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(importlib.import_module("sys").modules, name, None)
    console = Console(record=True, width=150)
    row = Row("gelu", "1x1", "float32", "forward", "pygpt", TUNED, problem="the process ended")
    show([row], {"cpu": "x", "threads": 1}, tmp_path, console)
    text = console.export_text()
    assert "matplotlib is not installed (pip install pygpt-kernels[train])" in text
    assert "the process ended" in text
    assert read_json(tmp_path / "bench.json")[0] == [row]


def test_who_takes_part():
    config = BenchConfig(compile=True)
    assert contestants(Case("training", ("gpt2", 1, 64), "bfloat16", "step"), config) == [
        ("pygpt", "tuned"),
        ("eager", "as it comes"),
        ("eager", "tuned"),
        ("torch.compile", "as it comes"),
        ("torch.compile", "tuned"),
    ]
    assert contestants(Case("decode", ("gpt2", 1, 64), "bfloat16", "greedy"), config)[1] == ("pygpt int8", "tuned")
    on_gpu = contestants(Case("decode", ("gpt2", 1, 64), "bfloat16", "greedy", "cuda"), config)
    assert on_gpu == [("pygpt", "as it comes"), ("eager", "as it comes"), ("transformers", "as it comes")]


def test_which_shapes_are_measured():
    def labels(**settings) -> list[str]:
        return [label for _, label in cases(BenchConfig(only=("gelu",), dtypes=("float32",), **settings), "cpu")]

    shapes = OPS["gelu"].shapes
    assert labels() == [next(iter(shapes))] * 2  # forward, forward+backward
    assert labels(all_shapes=True) == [label for label in shapes for _ in range(2)]
    assert labels(all_shapes=True, quick=True) == [OPS["gelu"].quick] * 2
