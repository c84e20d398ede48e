"""The command line: `pygpt COMMAND`, each command generated from its settings' dataclass."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, fields
from typing import Annotated, Any, Union

import torch
import tyro
from rich.console import Console
from rich.table import Table

import pygpt
from pygpt.bench import BenchConfig, bench
from pygpt.chat import ChatConfig, GenerateConfig, chat, generate
from pygpt.data import PrepareConfig, prepare
from pygpt.data.registry import DataConfig, data
from pygpt.embeddings import EmbeddingsConfig, embeddings
from pygpt.errors import InputError, PygptError
from pygpt.export import ExportConfig, export
from pygpt.ops import backends
from pygpt.train import EvaluateConfig, PretrainConfig, evaluate, pretrain
from pygpt.train.classify import ClassifyConfig, finetune_classify
from pygpt.train.evaluate import LabelledEvaluation
from pygpt.train.instruct import InstructConfig, finetune_instruct
from pygpt.train.predict import PredictConfig, predict


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show versions, devices, and per operator the backend in use and why the others are not."""


COMMANDS: dict[str, type] = {
    "info": InfoConfig,
    "data": DataConfig,
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "finetune classify": ClassifyConfig,
    "finetune instruct": InstructConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "classify": PredictConfig,
    "eval": EvaluateConfig,
    "embeddings": EmbeddingsConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
}


def _grammar() -> Any:
    """What tyro reads the command line by."""
    found: dict[str, list[Any]] = {}
    for words, config in COMMANDS.items():
        name, *task = words.split()
        command: Any = Annotated[_unchecked(config), tyro.conf.subcommand(task[0] if task else name)]
        found.setdefault(name, []).append(command)
    group = tyro.conf.subcommand("finetune", description="Finetune a pretrained model for a task.")
    found["finetune"] = [Annotated[Union[tuple(found["finetune"])], group]]  # noqa: UP007  (as many as there are)
    return Union[tuple(command for commands in found.values() for command in commands)]  # noqa: UP007


def _unchecked(config: type) -> type:
    """The settings without their checks, whose errors tyro would put into a box of its own: `_checked` makes them."""
    names = ("__module__", "__qualname__", "__doc__")
    return type(config.__name__, (config,), {name: getattr(config, name) for name in names} | {"__post_init__": _pass})


def _pass(self: object) -> None: ...


def _checked(parsed: Any) -> Any:
    """The settings that were read. Raises PygptError, with the command's help named, where they cannot be used."""
    config: Any = type(parsed).__base__
    try:
        return config(**{field.name: getattr(parsed, field.name) for field in fields(parsed)})
    except PygptError as error:
        words = next(words for words, known in COMMANDS.items() if known is config)
        raise InputError(f"{error}\nsee pygpt {words} --help") from error


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status: 0, or 2 for an error that the user can mend."""
    try:
        run(_checked(tyro.cli(_grammar(), args=arguments, prog="pygpt", description=pygpt.__doc__)))
    except PygptError as error:
        if os.environ.get("PYGPT_TRACEBACK"):
            raise
        print(f"pygpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pygpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter still flushes at exit
        return 141
    except OSError as error:  # a full disk, a file that may not be read
        if os.environ.get("PYGPT_TRACEBACK"):
            raise
        print(f"pygpt: {error}", file=sys.stderr)
        return 2
    return 0


def run(command: object) -> None:
    """Carry out one command."""
    console = Console()
    match command:
        case InfoConfig():
            info(console)
        case DataConfig():
            data(command, console)
        case PrepareConfig():
            prepare(command)
        case PretrainConfig():
            pygpt.tune_allocator()
            pretrain(command, console)
        case ClassifyConfig():
            pygpt.tune_allocator()
            finetune_classify(command, console)
        case InstructConfig():
            pygpt.tune_allocator()
            finetune_instruct(command, console)
        case PredictConfig():
            predict(command)
        case GenerateConfig():
            generate(command)
        case ChatConfig():
            chat(command)
        case EmbeddingsConfig():
            embeddings(command, console)
        case EvaluateConfig():
            result = evaluate(command, console)
            print(result)
            if isinstance(result, LabelledEvaluation):
                console.print(result.scores.table("labels"))
        case ExportConfig():
            export(command, console)
        case BenchConfig():
            bench(command, console)


def info(console: Console) -> None:
    """Print what is installed and who answers."""
    table = Table(title=f"pygpt {pygpt.__version__}", show_header=False)
    for key, value in backends.build_info().items():
        table.add_row(key, value)
    for index in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    console.print(table)
    table = Table(title="operators")
    for name in ("op", "device", "in use", "dtypes"):
        table.add_column(name, no_wrap=True)
    table.add_column("why not the others")
    for row in backends.report():
        by_reason: dict[str, list[str]] = {}
        for name, reason in row.why_not.items():
            by_reason.setdefault(reason, []).append(name)
        reasons = "\n".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        table.add_row(row.op, row.device, row.backend, row.dtypes, reasons)
    console.print(table)
    console.print(
        f"On the CPU, layer_norm and add_layer_norm of fewer than {backends.SMALL:,} elements, in float32 "
        f"{backends.SMALL_IN_FLOAT32:,} (but for add_layer_norm without gradients), linear_cross_entropy of "
        f"fewer than {backends.SMALL:,} logits in training but for "
        "bfloat16, and an embedding without positions, with gradients only if it is of fewer than "
        f"{backends.SMALL_IN_FLOAT32:,} elements of float32, are torch's own, whose calls cost less, "
        "unless a backend is forced; on GPUs layer_norm and add_layer_norm of fewer than "
        f"{backends.SMALL_ON_GPU:,} elements, and gelu without a bias."
    )
    if backends.forced():
        console.print(f"backend '{backends.forced()}' is forced (PYGPT_BACKEND)")
    if hopper := os.environ.get("PYGPT_CUDA_HOPPER"):
        effect = "attention by the portable kernels" if hopper == "0" else "no effect, only 0 has one"
        console.print(f"PYGPT_CUDA_HOPPER={hopper}: cuda on compute capability 9.0: {effect}")


if __name__ == "__main__":
    sys.exit(main())
