"""The command line: `pygpt COMMAND`, each command generated from its settings' dataclass."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

import pygpt
from pygpt.chat import ChatConfig, GenerateConfig, chat, generate
from pygpt.data import PrepareConfig, prepare
from pygpt.data.registry import DataConfig, data
from pygpt.embeddings import EmbeddingsConfig, embeddings
from pygpt.errors import PygptError
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


Finetune = (
    Annotated[ClassifyConfig, tyro.conf.subcommand("classify")]
    | Annotated[InstructConfig, tyro.conf.subcommand("instruct")]
)
Command = (
    Annotated[InfoConfig, tyro.conf.subcommand("info")]
    | Annotated[DataConfig, tyro.conf.subcommand("data")]
    | Annotated[PrepareConfig, tyro.conf.subcommand("prepare")]
    | Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune", description="Finetune a pretrained model for a task.")]
    | Annotated[GenerateConfig, tyro.conf.subcommand("generate")]
    | Annotated[ChatConfig, tyro.conf.subcommand("chat")]
    | Annotated[PredictConfig, tyro.conf.subcommand("classify")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("eval")]
    | Annotated[EmbeddingsConfig, tyro.conf.subcommand("embeddings")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script. Returns the exit status: 0, or 2 for an error that the user can mend."""
    try:
        command = tyro.cli(Command, args=arguments, prog="pygpt", description=pygpt.__doc__)
        run(command)
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
        f"On the CPU, layer_norm and add_layer_norm of fewer than {backends.SMALL:,} elements, and an embedding without "
        "positions or gradients, are torch's own, whose calls cost less, unless a backend is forced."
    )
    if backends.forced():
        console.print(f"backend '{backends.forced()}' is forced (PYGPT_BACKEND)")


if __name__ == "__main__":
    sys.exit(main())
