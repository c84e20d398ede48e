"""The commands that talk to a trained model.

pygpt generate runs/mine --prompt "Once upon a time" --num-samples 3
pygpt generate runs/tuned --instruct --prompt "Correct the spelling." --input "I has a dreem."
pygpt chat runs/tuned
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from pygpt.data.instructions import Message, Template, encode_messages, load_template
from pygpt.errors import InputError
from pygpt.generate import Sampling
from pygpt.model import GPT
from pygpt.pretrained import load_with_tokenizer, refuse_classifier, resolve_checkpoint
from pygpt.text import in_order, stream_text
from pygpt.tokenizer import Tokenizer
from pygpt.train.trainer import MAX_SEED, resolve_device


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Sampling):
    """What `generate` and `chat` have in common."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best checkpoint), a checkpoint or a model folder."""
    max_new_tokens: int = 200
    """Tokens to generate at most; a text also ends at end-of-text."""
    temperature: float = 0.8
    """Below 1 sharpens the distribution; 0 always takes the likeliest token."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End before this text; may be repeated for several."""
    seed: int | None = None
    """Makes the text repeatable."""
    int8: bool = False
    """Weights of 8 bits: faster on a CPU for up to 4 texts at a time, with a loss that `pygpt eval --int8` measures."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 0:
            raise InputError(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}")
        if "" in self.stop:
            raise InputError("stop must not be empty")
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def settings(self) -> dict[str, Any]:
        """As `stream_text` takes them."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """Continue a text, or follow an instruction, with a trained model."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text to continue; may be repeated for several. Without one: the start of a document."""
    num_samples: int = 1
    """Texts per prompt."""
    instruct: bool = False
    """The prompts are instructions: put into the template that the model was finetuned with. Only answers are printed."""
    input: str = ""
    """With --instruct: the text that the instruction is about."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.instruct and not all(text.strip() for text in self.prompt or [""]):
            raise InputError("instruct needs a prompt: the instruction")
        if self.input and not self.instruct:
            raise InputError("input is what an instruction is about: it needs instruct")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingConfig):
    """Talk to a model finetuned on instructions. /reset forgets the conversation, /quit leaves.

    A line is a message, typed or piped in. Ctrl-C stops an answer, Ctrl-D leaves. When the conversation and half a context
    (or max_new_tokens, if that is less) no longer fit into the context, its oldest questions and answers are left out.
    """

    system: str = ""
    """What the model is told before the conversation, if its template has a place for that."""


def generate(config: GenerateConfig) -> None:
    """Print prompts and their continuations, or with `instruct` the answers: each as it is generated, one after the other."""
    model, tokenizer, folder = _load(config)
    texts, stop = list(config.prompt) or [""], list(config.stop)
    prompts: list[str] | list[list[int]] = texts
    if config.instruct:
        template = load_template(folder)
        questions = [{"role": "user", "content": text.strip(), "input": config.input.strip()} for text in texts]
        prompts = [encode_messages([question], template, tokenizer) for question in questions]
        stop += template.stop
    pieces = stream_text(model, tokenizer, prompts, stop=stop, num_samples=config.num_samples, **config.settings())
    several, begun = len(texts) * config.num_samples > 1, -1
    for piece in in_order(pieces):
        if piece.row > begun:
            begun = piece.row
            number, sample = divmod(begun, config.num_samples)
            if several:
                _show(f"=== prompt {number + 1}, sample {sample + 1}\n")
            if not config.instruct:
                _show(texts[number])
        _show(piece.text + "\n" * piece.last)


def chat(config: ChatConfig, console: Console | None = None) -> None:
    """Answer messages from the terminal or the standard input until it ends."""
    notices = console or Console(stderr=True)
    model, tokenizer, folder = _load(config)
    template = load_template(folder)
    room = min(config.max_new_tokens, model.config.block_size // 2)
    conversation = Conversation(template, tokenizer, model.config.block_size, room, config.system)
    stop = [*template.stop, *config.stop]
    for message in _messages(notices):
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
            notices.print("(the conversation is forgotten)", style="dim")
            continue
        try:
            prompt, forgotten = conversation.ask(message)
        except InputError as error:
            notices.print(f"({error})", style="dim", markup=False)
            continue
        if forgotten:
            notices.print(f"(the context is full: the oldest {forgotten} messages are left out)", style="dim")
        conversation.answered(_answer(model, tokenizer, prompt, stop, config))


class Conversation:
    """Messages so far, and the prompt they make.

    It may take up all of the context but `room` tokens, for the answer: the oldest questions and answers are left out
    until it does, the system message and the newest question never.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, block_size: int, room: int, system: str = "") -> None:
        self._template, self._tokenizer = template, tokenizer
        self._block_size, self._room = block_size, room
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []

    def ask(self, question: str) -> tuple[list[int], int]:
        """Add a question -> token ids of the prompt, number of messages that were left out for good.

        Raises InputError for a question that does not fit into the context by itself, and does not add it.
        """
        messages, forgotten = [*self.messages, {"role": "user", "content": question}], 0
        ids = encode_messages([*self._system, *messages], self._template, self._tokenizer)
        while len(ids) > self._block_size - self._room and len(messages) > 1:
            messages, forgotten = messages[2:], forgotten + 2
            ids = encode_messages([*self._system, *messages], self._template, self._tokenizer)
        if len(ids) > self._block_size:
            raise InputError(
                f"this message makes a prompt of {len(ids)} tokens, and the model's context holds {self._block_size}: "
                f"shorten it"
            )
        self.messages = messages
        return ids, forgotten

    def answered(self, answer: str) -> None:
        """Add the answer to the last question."""
        self.messages.append({"role": "assistant", "content": answer.strip()})

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages = []


def _answer(model: GPT, tokenizer: Tokenizer, prompt: list[int], stop: list[str], config: ChatConfig) -> str:
    """Print an answer as it is generated; Ctrl-C ends it. Returns what was printed."""
    answer = ""
    with suppress(KeyboardInterrupt):
        for piece in stream_text(model, tokenizer, [prompt], stop=stop, **config.settings()):
            answer += piece.text
            _show(piece.text)
    _show("\n")
    return answer


def _messages(notices: Console) -> Iterator[str]:
    """Lines that are typed, or come from a pipe; empty ones left out."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    notices.print("/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer", style="dim")
    while True:
        try:
            message = input("> ").strip()
        except EOFError:
            _show("\n")
            return
        except KeyboardInterrupt:
            notices.print("\n(Ctrl-D leaves)", style="dim")
            continue
        if message:
            yield message


def _load(config: SamplingConfig) -> tuple[GPT, Tokenizer, Path]:
    """The model, its tokenizer and its folder."""
    folder = resolve_checkpoint(config.run)
    refuse_classifier(folder, f'try pygpt classify {config.run} "a text"')
    device = resolve_device(config.device)
    model, tokenizer = load_with_tokenizer(folder)
    model = model.to(device)
    return model.to_int8() if config.int8 else model, tokenizer, folder


def _show(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    print(text, end="", flush=True)
