"""The training loop. It knows nothing of tasks: it is given a model, a function from step to batch and, optionally, how to
evaluate and how to show a sample.

    Trainer(model, RandomOffsets(tokens, 1024, 8).batch, TrainConfig(steps=1000), run=Path("runs/mine")).train()
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from pygpt.classifier import Classifier
from pygpt.data.instructions import Template
from pygpt.errors import InputError, MissingFileError, PygptError
from pygpt.model import GPT, GPTConfig
from pygpt.optim import build_optimizer, clip_factor, cosine_with_warmup
from pygpt.peaks import peak_flops
from pygpt.tokenizer import Tokenizer
from pygpt.train.checkpoint import (
    checkpoints,
    last_checkpoint,
    load_checkpoint,
    read_training,
    remove_leftovers,
    save_best,
    save_checkpoint,
)
from pygpt.train.metrics import (
    RESULTS_FILE,
    Metrics,
    best_validation_loss,
    evaluations_since_best,
    holds_run,
    plot_loss,
    progress_bar,
    read_metrics,
)

Batch = tuple[Tensor, ...]
MAX_SEED = 2**63 - 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DivergedError(PygptError):
    """The loss is no longer a finite number."""


class _StopRequestedError(Exception):
    """Leaves an evaluation or a sample that Ctrl-C came in."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train, whatever the task."""

    steps: int = 1000
    """Optimizer steps in all."""
    learning_rate: float = 1e-3
    """Peak learning rate, reached after the warmup."""
    min_learning_rate: float = 1e-4
    """Learning rate at the last step, at the end of the cosine."""
    warmup: int = 100
    """Steps of linear warmup."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0 does not clip."""
    accumulate: int = 1
    """Batches whose gradients are averaged in one step."""
    dtype: str = "float32"
    """float32, or bfloat16: weights and gradients in bfloat16, the optimizer keeps float32 masters."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps."""
    compile: bool = False
    """Run the model through torch.compile."""
    seed: int = 1337
    """Decides initial weights, batches and dropout."""
    eval_every: int = 250
    """Steps between evaluations; 0: only at the end."""
    patience: int = 0
    """Evaluations in a row without a lower validation loss after which training stops; 0: it never stops early."""
    sample_every: int = 0
    """Steps between samples of the model; 0: only at the end."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end. Ctrl-C saves one too."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl."""
    peak_tflops: float | None = None
    """Peak of the device in TFLOP/s, for MFU. Known by itself for common GPUs; for CPUs MFU is shown only if given."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        at_least_0 = ("learning_rate", "min_learning_rate", "warmup", "weight_decay", "grad_clip", "seed")
        for name in (*at_least_0, "eval_every", "patience", "sample_every", "checkpoint_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise InputError(f"peak_tflops must be above 0, got {self.peak_tflops}")
        if self.seed > MAX_SEED:
            raise InputError(f"seed must be at most 2**63 - 1, got {self.seed}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'")


def resolve_device(name: str) -> torch.device:
    """The device that a setting means. Raises InputError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has tensors, but no numbers in them
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{name}' cannot be used here: {reason}; try --device cpu") from error
    return device


def new_model(config: GPTConfig, device: str, train_all: bool = True) -> GPT:
    """A model of random weights to train on `device`. Raises InputError where this machine's memory cannot hold what they
    alone need: Linux ends such a process without a word."""
    with torch.device("meta"):
        parameters = GPT(config).get_num_params(non_embedding=False)
    # Made in float32. On the CPU training adds a gradient and two moments, in bfloat16 14 bytes in all; a GPU has its own errors.
    needed = parameters * (14 if train_all and resolve_device(device).type == "cpu" else 4)
    if needed > (memory := _physical_memory()):
        raise InputError(
            f"a model of {parameters / 1e6:,.1f}M parameters needs {needed / 2**30:,.1f} GiB of memory or more, and this machine "
            f"has {memory / 2**30:,.1f}: choose a smaller --preset"
        )
    return GPT(config)


def _physical_memory() -> float:
    """Bytes; infinity where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


class Trainer:
    """Trains `model` on batch(0), batch(1), ... and writes everything about it into the folder `run`.

    model: moved to the configured device and dtype, in place; parameters that need no gradient stay as they are.
    batch: micro-step -> tensors (a pure function, so that a resumed run sees the same batches), the last of them the
    targets, of which negative ones are ignored. The loss is model(*tensors)[1], a mean over targets, unless
    `loss_fn(model, tensors)` is given. evaluate: model -> validation loss, or {"val_loss": ..., ...} with other figures to
    write down. sample: model -> text to show. tokenizer, template: saved with each checkpoint.
    """

    def __init__(
        self,
        model: GPT | Classifier,
        batch: Callable[[int], Batch],
        config: TrainConfig,
        run: Path,
        *,
        loss_fn: Callable[[Any, Batch], Tensor] = lambda model, tensors: model(*tensors)[1],
        evaluate: Callable[[Any], float | dict[str, float]] | None = None,
        sample: Callable[[Any], str] | None = None,
        tokenizer: Tokenizer | None = None,
        template: Template | None = None,
        console: Console | None = None,
    ) -> None:
        self.device = resolve_device(config.device)
        self.model = model.to(self.device, DTYPES[config.dtype]).train()
        trained = [parameter.requires_grad for parameter in model.parameters()]
        if not any(trained):
            raise InputError("nothing to train: every parameter of the model is frozen")
        self.config, self.run, self.batch, self.loss_fn = config, Path(run), batch, loss_fn
        self.evaluate, self.sample = evaluate, sample
        self.beside = [part for part in (tokenizer, template) if part is not None]
        self.console = console or Console()
        self.optimizer = build_optimizer(
            self.model, weight_decay=config.weight_decay, learning_rate=config.learning_rate, betas=config.betas
        )
        self.forward: Any = torch.compile(self.model) if config.compile else self.model
        peak = 1e12 * config.peak_tflops if config.peak_tflops else peak_flops(self.device, DTYPES[config.dtype])
        self.peak_flops = peak if all(trained) else None  # MFU is about training all weights
        self.step = 0
        self.stop_requested = False
        self._unlogged: list[
            tuple[Tensor, Tensor, int]
        ] = []  # loss, gradient norm and tokens of steps since the last row
        self._since = 0.0

    def resume(self, checkpoint: Path, *, tested: bool = True) -> None:
        """Go on where `checkpoint` stood: its optimizer, random generators and step. The model must hold its weights.
        Raises InputError where nothing is left to do; not tested: after the last step there still is."""
        self.step = load_checkpoint(checkpoint, self.model, self.optimizer)
        beyond = self.step - self.config.steps
        if beyond > 0 or (beyond == 0 and tested and not self._lacks_evaluation()):
            raise InputError(
                f"'{checkpoint}' is already at step {self.step} of {self.config.steps}; ask for more --steps"
            )

    def train(self) -> float:
        """Run the steps that are left; returns the last training loss. Ctrl-C, or validation that no longer gets better
        (`patience`), saves a checkpoint and returns early."""
        if self.step == 0 and holds_run(self.run):
            raise InputError(
                f"'{self.run}' holds an earlier run, which would be overwritten; resume it or take another folder"
            )
        config, loss = self.config, math.nan
        remove_leftovers(self.run)
        with (
            stop_on_signal(self),  # first: opening the metrics imports TensorBoard, which takes its time
            Metrics(self.run, self.step, self.console) as metrics,
            progress_bar(self.console) as bar,
        ):
            task = bar.add_task("training", total=config.steps, completed=self.step, status="")
            if self.step == 0 or self._lacks_evaluation():
                self._evaluate(metrics)
            self._since = time.perf_counter()
            stop = self.stop_requested or self._out_of_patience()
            while self.step < config.steps and not stop:
                self._unlogged.append(self._train_step())
                self.step += 1
                stop = self.stop_requested  # once per step: a signal after this line must not end the loop unsaved
                save = self._due(config.checkpoint_every) or stop
                if save or self._due(config.log_every):
                    values = self._log(metrics)
                    loss = values["loss"]
                    bar.update(task, completed=self.step, status=_status(values))
                pause = time.perf_counter()
                if save:
                    self.save()
                if self._due(config.eval_every):
                    complete = self._evaluate(metrics)
                    if not complete or (self._out_of_patience() and not stop):
                        stop = True
                        if not save:
                            self.save()
                if self._due(config.sample_every) and not stop:
                    self._show_sample()
                self._since += time.perf_counter() - pause  # none of this counts as training time
        plot_loss(self.run, self.console)
        if self._out_of_patience():
            self.console.print(
                f"stopped after step {self.step}: {config.patience} evaluations in a row without a lower validation loss"
            )
        elif self.step == 0:
            self.console.print("stopped before the first step: nothing was saved")
        elif self.step < config.steps or self._lacks_evaluation():
            self.console.print(f"stopped after step {self.step}; the same command with --resume goes on from there")
        return loss

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        settings = {
            key: value if not isinstance(value, Path) else str(value) for key, value in asdict(self.config).items()
        }
        return save_checkpoint(self.run, self.step, self.model, self.optimizer, self.beside, settings, self.config.keep)

    def _train_step(self) -> tuple[Tensor, Tensor, int]:
        """One optimizer step -> mean loss, gradient norm, number of tokens. Waits for nothing on the device."""
        first = self.step * self.config.accumulate
        batches = [self.batch(first + micro) for micro in range(self.config.accumulate)]
        targets = [int((tensors[-1] >= 0).sum()) for tensors in batches]
        if not any(targets):
            raise InputError(f"no batch of step {self.step} has a target that counts")
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        total = torch.zeros((), device=self.device)
        for tensors, count in zip(batches, targets, strict=True):
            if count:  # weighted by targets, accumulation gives the gradient of one large batch
                loss = self.loss_fn(self.forward, tuple(map(self._to_device, tensors))) * (count / sum(targets))
                loss.backward()
                total += loss.detach()
        norm, factor = clip_factor(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step(grad_factor=factor)
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm, sum(tensors[0].numel() for tensors in batches)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _rate(self, step: int) -> float:
        c = self.config
        return cosine_with_warmup(
            step,
            peak=c.learning_rate,
            minimum=min(c.min_learning_rate, c.learning_rate),
            warmup=c.warmup,
            total=c.steps,
        )

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _log(self, metrics: Metrics) -> dict[str, float]:
        """Write a row for the current step. Raises DivergedError if any step since the last row was not finite."""
        losses, norms, tokens = zip(*self._unlogged, strict=True)
        rows = torch.stack([torch.stack(losses), torch.stack(norms)], dim=1).tolist()
        for index, (loss, norm) in enumerate(rows):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._raise_diverged(self.step - len(rows) + 1 + index, loss, norm)
        speed = sum(tokens) / (time.perf_counter() - self._since)
        values = {"loss": loss, "grad_norm": norm, "tokens_per_second": speed, "lr": self._rate(self.step - 1)}
        if self.peak_flops:
            values["mfu"] = speed * self.model.flops_per_token() / self.peak_flops
        metrics.write(self.step, **values)
        self._unlogged.clear()
        self._since = time.perf_counter()
        return values

    def _raise_diverged(self, step: int, loss: float, norm: float) -> NoReturn:
        plot_loss(self.run, self.console)
        raise DivergedError(
            f"training diverged: at step {step} the loss is {loss} and the gradient's norm {norm}; "
            f"{last_checkpoint(self.run)}. Start again with a lower learning_rate or a longer warmup"
        )

    def _lacks_evaluation(self) -> bool:
        """Whether the current step is to be evaluated and was not: Ctrl-C or a crash came first."""
        evaluated = {row["step"] for row in read_metrics(self.run) if "val_loss" in row}
        return self.evaluate is not None and self._due(self.config.eval_every) and self.step not in evaluated

    def _evaluate(self, metrics: Metrics) -> bool:
        """Whether it was completed: Ctrl-C ends it, with nothing written down."""
        if self.evaluate is None:
            return True
        try:
            with self._aside():
                found = self.evaluate(self.model)
        except _StopRequestedError:
            return False
        values = found if isinstance(found, dict) else {"val_loss": found}
        # First: a resumed run evaluates again where a crash left no row, but takes a row for a model that was saved.
        if self.step > 0 and values["val_loss"] < best_validation_loss(self.run):
            save_best(self.run, self.model, self.beside)
        metrics.write(self.step, **values)
        figures = ", ".join(
            f"{name.removeprefix('val_').replace('_', ' ')} {value:.4f}" for name, value in values.items()
        )
        self.console.print(f"step {self.step}: validation {figures}")
        return True

    def _out_of_patience(self) -> bool:
        return 0 < self.config.patience <= evaluations_since_best(self.run)

    def _show_sample(self) -> None:
        if self.sample is None:
            return
        try:
            with self._aside():
                text = self.sample(self.model)
        except _StopRequestedError:
            return
        self.console.rule(f"sample after step {self.step}")
        self.console.print(text, markup=False, highlight=False)
        self.console.rule()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Evaluation mode; random generators are left as they were, so that training draws the same dropout afterwards.
        Raises _StopRequestedError where the model is called after Ctrl-C."""

        def check(*_: object) -> None:
            if self.stop_requested:
                raise _StopRequestedError

        hook = self.model.transformer.register_forward_pre_hook(check)
        try:
            with torch.random.fork_rng(), torch.no_grad():
                self.model.eval()
                yield
        finally:
            hook.remove()
            self.model.train()


def _status(values: dict[str, float]) -> str:
    mfu = f" · MFU {values['mfu']:.1%}" if "mfu" in values else ""
    return f"loss {values['loss']:.4f} · {values['tokens_per_second']:,.0f} tokens/s{mfu}"


@contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the trainer to stop after the step; a second one interrupts at once."""

    def handler(number: int, frame: FrameType | None) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step; once more to stop at once, without saving.\n")

    try:
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay with whoever runs us
        yield
        return
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def check_resumable(checkpoint: Path, config: TrainConfig, changeable: tuple[str, ...]) -> None:
    """Raise InputError if a setting that decides the result differs from the checkpoint's."""
    saved = read_training(checkpoint)["settings"]
    for name, value in asdict(config).items():
        value = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        if name not in changeable and name in saved and saved[name] != value:
            raise InputError(
                f"cannot resume: {name} was {saved[name]} in '{checkpoint}' and is {value} now; use the same settings, or "
                f"start a new run with --init-from {checkpoint}"
            )


def check_run(
    config: TrainConfig, run: Path, resume: bool, overwrite: bool, changeable: tuple[str, ...]
) -> Path | None:
    """The checkpoint of `run` to resume from, if any. What is in the folder is never overwritten unasked."""
    file = next((path for path in (run, *run.parents) if path.is_file()), None)
    if file is not None:
        raise InputError(f"'{run}' cannot be a run's folder: '{file}' is a file; choose another --out")
    found = checkpoints(run)
    if resume:
        if not found:
            raise MissingFileError(f"nothing to resume: '{run}' has no checkpoint (checkpoints/step_*)")
        check_resumable(found[-1], config, changeable)
        return found[-1]
    if holds_run(run) and not overwrite:
        raise InputError(
            f"'{run}' holds an earlier run; go on with it (--resume), delete it (--overwrite) or choose another --out"
        )
    return None


def remove_run(run: Path) -> None:
    """Delete what an earlier run wrote into its folder, and nothing else."""
    for name in ("checkpoints", "tensorboard"):
        if (run / name).exists():
            shutil.rmtree(run / name)
    for name in ("metrics.jsonl", "loss.png", RESULTS_FILE, "confusion.png", "answers.jsonl"):
        (run / name).unlink(missing_ok=True)
