"""The checkpoints of the training loop: what is saved, when, and how a run goes on from them."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import (
    LINUX,
    SETTINGS,
    assert_same_state,
    batch,
    interrupt_after,
    make_model,
    make_trainer,
    printed,
    resumed,
    rows,
)
from torch import Tensor

from pygpt import GPT
from pygpt.errors import InputError, MissingFileError
from pygpt.train import Trainer, resolve_checkpoint
from pygpt.train.checkpoint import NotWrittenError, checkpoints, read_training, save_best
from pygpt.train.metrics import read_metrics
from pygpt.train.trainer import check_run


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was flushed to disk and renamed, in this order."""
    events: list[str] = []
    flush, rename = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(f"flush {os.path.relpath(os.readlink(f'/proc/self/fd/{descriptor}'))}" if LINUX else "flush")
        flush(descriptor)

    def replace(source: str | Path, target: str | Path) -> None:
        events.append(f"rename {os.path.relpath(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return events


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_20_steps_are_10_and_10_more_to_the_last_bit(tmp_path, dtype):
    """With dropout, accumulation, evaluations that draw random numbers, and samples."""
    config = replace(SETTINGS, dtype=dtype, accumulate=2, sample_every=4)

    def options() -> dict[str, Any]:
        return {"sample": lambda model: str(torch.rand(3))}

    straight = make_trainer(tmp_path / "straight", config, make_model(0.2), **options())
    straight.train()
    first = make_trainer(tmp_path / "two", config, make_model(0.2), batch=interrupt_after(20), **options())
    first.train()
    assert first.step == 10
    assert "--resume" in printed(first)
    torch.manual_seed(99)
    second = resumed(tmp_path / "two", config, **options())
    assert second.step == 10
    second.train()
    assert_same_state(straight, second)
    assert rows(tmp_path / "straight") == rows(tmp_path / "two")
    weights = [checkpoints(tmp_path / name)[-1] / "model.safetensors" for name in ("straight", "two")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_crash_leaves_no_duplicate_metrics(tmp_path):
    make_trainer(tmp_path / "straight").train()
    run = tmp_path / "crashed"

    def crash(index: int) -> tuple[Tensor, ...]:
        if index == 13:
            raise RuntimeError("power cut")
        return batch(index)

    with pytest.raises(RuntimeError, match="power cut"):
        make_trainer(run, batch=crash).train()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')
    assert max(row["step"] for row in read_metrics(run)) == 13
    (run / "checkpoints" / ".tmp-step_00000015").mkdir()
    trainer = resumed(run)
    assert trainer.step == 10
    trainer.train()
    assert rows(run) == rows(tmp_path / "straight")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "step_00000015", "step_00000020"]


def test_the_best_model_is_kept_apart(tmp_path):
    losses = iter([9.0, 3.0, 2.0, 2.5, math.nan])  # before the first step, then after 5, 10, 15 and 20
    weights = {}

    def evaluate(model: GPT) -> float:
        loss = next(losses)
        weights[loss] = model.transformer.wte.weight.clone()
        return loss

    make_trainer(tmp_path, evaluate=evaluate).train()
    best = GPT.from_pretrained(tmp_path / "checkpoints" / "best")
    assert torch.equal(best.transformer.wte.weight, weights[2.0])
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000015", "step_00000020"]  # keep=2
    # A resumed run knows what the best was.
    losses = iter([2.2, 2.1, 2.05, 2.01])
    resumed(tmp_path, replace(SETTINGS, steps=30), evaluate=evaluate).train()
    best = GPT.from_pretrained(tmp_path / "checkpoints" / "best")
    assert torch.equal(best.transformer.wte.weight, weights[2.0])


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(("at", "checkpoint_every"), [(15, 5), (15, 10), (20, 5)])
def test_a_crash_while_the_best_model_is_written_is_made_up_for_on_resuming(
    tmp_path, monkeypatch, at, checkpoint_every, written
):
    """Before the new one is in its place, or right after; at a step with a checkpoint, without one, and at the last."""
    config, run = replace(SETTINGS, checkpoint_every=checkpoint_every), tmp_path / "crashed"
    best = Path("checkpoints", "best", "model.safetensors")

    def trained(trainer: Trainer) -> None:
        trainer.evaluate = lambda model: 1.0 if trainer.step == at else 2.0
        trainer.train()

    def crash(folder: Path, *arguments: Any) -> None:
        if crashing.step < at or written:
            save_best(folder, *arguments)
        if crashing.step == at:
            raise RuntimeError("power cut")

    trained(make_trainer(tmp_path / "straight", config))
    crashing = make_trainer(run, config)
    with monkeypatch.context() as patch:
        patch.setattr("pygpt.train.trainer.save_best", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            trained(crashing)
    trained(resumed(run, config))
    assert rows(run) == rows(tmp_path / "straight")
    assert (run / best).read_bytes() == (tmp_path / "straight" / best).read_bytes()


def test_a_crash_between_the_renames_loses_no_best_model(tmp_path):
    make_trainer(tmp_path).train()
    folder = tmp_path / "checkpoints"
    (folder / "best").rename(folder / ".old-best")
    resumed(tmp_path, replace(SETTINGS, steps=21, eval_every=1000), evaluate=lambda model: 1e9).train()
    GPT.from_pretrained(folder / "best")
    assert not list(folder.glob(".*"))


def test_a_run_is_never_overwritten(tmp_path):
    make_trainer(tmp_path).train()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="earlier run"):
        make_trainer(tmp_path).train()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="already at step 20 of 20"):
        resumed(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "training.json", "config.json"])
def test_damaged_and_missing_files_are_named(tmp_path, name):
    make_trainer(tmp_path, replace(SETTINGS, steps=1)).train()
    file = checkpoints(tmp_path)[-1] / name
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=name):
            resumed(tmp_path)
    file.unlink()
    with pytest.raises(MissingFileError, match=name):
        resumed(tmp_path)
    for content in ('{"step": 1}', '{"settings": {}}', "[]", '{"step": "1", "settings": {}}'):
        (file.parent / "training.json").write_text(content)
        with pytest.raises(InputError, match=r"training\.json' is damaged: it lacks"):
            read_training(file.parent)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer/transformer.wte.weight/exp_avg", torch.zeros(3), "its state for transformer.wte.weight does not"),
        ("optimizer/transformer.wte.weight/exp_avg_sq", None, "its state for transformer.wte.weight does not"),
        ("optimizer/transformer.wte.weight/step", torch.zeros(2), "its state for transformer.wte.weight does not"),
        ("optimizer/transformer.wte.weight/step", torch.tensor(1), "its state for transformer.wte.weight does not"),
        ("rng/cpu", torch.zeros(3, dtype=torch.uint8), "its random generator's state"),
        ("rng/cpu", None, "its random generator's state"),
    ],
)
def test_a_training_state_that_does_not_fit(tmp_path, name, value, message):
    make_trainer(tmp_path, replace(SETTINGS, steps=1)).train()
    file = checkpoints(tmp_path)[-1] / "training.safetensors"
    tensors = load_file(file) | {name: value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(
        InputError, match=rf"training\.safetensors' is damaged \({message}.* resume from the one before"
    ):
        resumed(tmp_path, replace(SETTINGS, steps=2))


def test_what_resolves_to_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    make_trainer(run, replace(SETTINGS, keep=3)).train()
    latest = run / "checkpoints" / "step_00000020"
    best = run / "checkpoints" / "best"
    assert resolve_checkpoint(run) == resolve_checkpoint(str(best)) == best
    assert resolve_checkpoint(latest) == latest
    shutil.rmtree(best)
    assert resolve_checkpoint(run) == latest
    (run / "checkpoints" / "step_00000099.bak").mkdir()
    (run / "checkpoints" / ".tmp-step_00000030").mkdir()
    shutil.copytree(latest, run / "checkpoints" / "step_123456789")  # more digits than usual is later, not earlier
    assert resolve_checkpoint(run).name == "step_123456789"
    with pytest.raises(MissingFileError, match="nowhere"):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MissingFileError, match="neither"):
        resolve_checkpoint(tmp_path)


@pytest.mark.skipif(not LINUX, reason="names of open files come from /proc")
def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, flushed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(Path("run"), replace(SETTINGS, steps=1), evaluate=None).train()
    rename = flushed.index("rename run/checkpoints/step_00000001")
    names = ["config.json", "model.safetensors", "training.json", "training.safetensors"]
    temporary = "flush run/checkpoints/.tmp-step_00000001"
    assert sorted(flushed[rename - 5 : rename]) == [temporary, *(f"{temporary}/{name}" for name in names)]
    assert flushed[rename + 1] == "flush run/checkpoints"


def test_a_failed_write_leaves_the_checkpoints_as_they_were(tmp_path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, steps=5))
    trainer.train()

    class FullDisk:
        def save(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    trainer.beside = [FullDisk()]
    before = (checkpoints(tmp_path)[-1] / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.transformer.wte.weight.zero_()
    with pytest.raises(
        NotWrittenError, match=r"could not be written .*No space .*last good checkpoint is '.*00000005'"
    ):
        trainer.save()
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []
    assert (checkpoints(tmp_path)[-1] / "model.safetensors").read_bytes() == before
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.skipif(not LINUX, reason="a limit on the size of files stands for a full disk")
def test_a_full_disk(tmp_path):
    """In a process of its own, whose files may not grow much beyond what the weights take: the optimizer's state does not fit."""
    make_trainer(tmp_path, replace(SETTINGS, steps=5, checkpoint_every=5)).train()
    code = """if True:
        import resource, sys
        from dataclasses import replace
        from pathlib import Path
        import tiny_training as t
        from pygpt.train.checkpoint import NotWrittenError
        run = Path(sys.argv[1])
        trainer = t.resumed(run)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
        try:
            trainer.train()
        except NotWrittenError as error:
            print(error)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    limit = (checkpoints(tmp_path)[-1] / "model.safetensors").stat().st_size + 10_000
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(limit)],
        cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "step_00000010' could not be written" in done.stdout, done.stderr
    assert done.stdout.endswith("step_00000005'\n")
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000005"]


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/run"):
        with pytest.raises(InputError, match="cannot be made"):
            make_trainer(tmp_path / name).train()
        with pytest.raises(InputError, match=r"/file' is a file; choose another --out"):
            check_run(SETTINGS, tmp_path / name, resume=False, overwrite=True, changeable=())
    assert (tmp_path / "file").read_text() == "mine"


def test_frozen_parameters_stay_and_a_resumed_run_ends_with_the_same_bits(tmp_path):
    def partly_frozen(model: GPT) -> GPT:
        model.transformer.requires_grad_(False)
        model.transformer.h[1].requires_grad_(True)
        return model

    start = make_model().state_dict()
    whole = make_trainer(tmp_path / "whole", model=partly_frozen(make_model()))
    whole.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, start[name]) == (".h.1." not in name), name
    config = replace(SETTINGS, keep=9)
    make_trainer(tmp_path / "parts", config, partly_frozen(make_model())).train()
    folder = tmp_path / "parts" / "checkpoints" / "step_00000010"
    parts = make_trainer(tmp_path / "parts", config, partly_frozen(GPT.from_pretrained(folder)))
    parts.resume(folder)
    parts.train()
    trained = [p for p in whole.model.parameters() if p.requires_grad]
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.optimizer.state.keys() == set(trained)
    with pytest.raises(InputError, match="nothing to train"):
        make_trainer(tmp_path / "none", model=make_model().requires_grad_(False))
