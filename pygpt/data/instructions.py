"""Instructions and their answers: read from JSON, written into a template, tokenised, and put into batches.

    found = read_instructions("instruction_data.json")
    template = get_template("alpaca")
    example = encode_conversation(found.conversations[0], template, tokenizer)

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": text}: at most one of the system, at the
start, then questions and answers in turns, an answer last. A user's message may have an "input", the text that it is about.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pygpt.data.labelled import LengthBuckets
from pygpt.data.samplers import IGNORED, _positive, _random_bits, _seed, _step
from pygpt.errors import InputError, MissingFileError
from pygpt.tokenizer import Tokenizer

Message = dict[str, str]
IDS = npt.NDArray[np.int64]
TEMPLATE_FILE = "pygpt_template.json"
END_OF_TEXT = "<|endoftext|>"


# --- reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructions:
    """conversations; where each stands in the file ("line 3", "entry 3"); skipped: entries left out, by reason."""

    conversations: list[list[Message]]
    places: list[str]
    skipped: Counter[str]


def read_instructions(path: str | Path) -> Instructions:
    """Every conversation of a file: a JSON list, or JSON lines (.jsonl, .ndjson).

    An entry has `instruction`, `output` and perhaps `input` (Alpaca's names), or `messages`. Whitespace around texts is
    dropped, and so is an empty message of the system. Entries without a question or an answer are skipped and counted.
    Raises MissingFileError for no such file, InputError for broken JSON, with the line's number, and for an entry of
    another form.
    """
    path = Path(path)
    found = Instructions([], [], Counter())
    for place, entry in _entries(path):
        conversation = _conversation(f"'{path}', {place}", entry)
        empty = next((message["role"] for message in conversation if not message["content"]), None)
        if empty is not None:
            found.skipped["empty answer" if empty == "assistant" else "empty question"] += 1
            continue
        found.conversations.append(conversation)
        found.places.append(place)
    if not found.conversations:
        raise InputError(f"'{path}' has no instruction with an answer")
    return found


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise MissingFileError(f"no file of instructions at '{path}'")
    text = _read(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", _json(path, line, number)
        return
    entries = _json(path, text)
    if not isinstance(entries, list):
        raise InputError(f"'{path}' must hold a list of entries, or be named .jsonl and hold one entry a line")
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _json(path: Path, text: str, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = line or getattr(error, "lineno", 1)
        raise InputError(f"'{path}', line {place}: broken JSON ({error})") from error


def _conversation(place: str, entry: Any) -> list[Message]:
    """The messages of an entry, checked; contents may be empty."""
    if not isinstance(entry, dict):
        raise InputError(f"{place}: not a JSON object but {str(entry)[:60]}")
    if "messages" in entry:
        return _messages(place, entry["messages"])
    instruction, output = (_text(place, entry, name) for name in ("instruction", "output"))
    about = _text(place, entry, "input") if entry.get("input") is not None else ""
    question = {"role": "user", "content": instruction} | ({"input": about} if about else {})
    return [question, {"role": "assistant", "content": output}]


def _text(place: str, entry: dict[str, Any], name: str) -> str:
    if not isinstance(entry.get(name), str):
        what = f"is {json.dumps(entry[name])[:60]}, which is not text" if name in entry else "is missing"
        raise InputError(f"{place}: '{name}' {what}; an entry has instruction, output and perhaps input, or messages")
    return _clean(entry[name])


def _clean(text: str) -> str:
    # JSON can hold half a surrogate pair, which no file can: it becomes U+FFFD, as in tokenizers.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").strip()


def _messages(place: str, messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{place}: 'messages' must be a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise InputError(f"{place}: message {number} needs a role and a content, both text; it has {list(message)}")
    conversation = [{"role": message["role"], "content": _clean(message["content"])} for message in messages]
    if conversation[:1] == [{"role": "system", "content": ""}]:
        del conversation[0]
    check_turns(place, conversation)
    if conversation[-1]["role"] != "assistant":
        raise InputError(
            f"{place}: the last message is the {conversation[-1]['role']}'s; there is no answer to learn from"
        )
    return conversation


def check_turns(place: str, messages: Sequence[Message]) -> None:
    """Raise InputError unless questions and answers take turns, after at most one message of the system."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise InputError(
            f"{place}: after at most one message of the system, those of user and assistant must take turns, "
            f"the user's first; the roles are {', '.join(roles) or 'none'}"
        )


# --- templates -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """How a conversation is written as text. {content} and {input} stand for a message's; an answer follows what was
    written last, and ends with end-of-text."""

    user: str
    """A question, up to where its answer starts."""
    user_with_input: str = ""
    """A question with an input; by default `user`, with the input on a line of its own after the content."""
    opening: str = ""
    """What stands before the first question."""
    opening_with_input: str = ""
    """The same where that question has an input; by default `opening`."""
    system: str = "{content}\n\n"
    """A message of the system, which takes the place of the opening."""
    answer_end: str = ""
    """What follows an answer, before end-of-text."""
    between: str = ""
    """What stands between an answer and the next question."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer; they are not part of it."""

    def __post_init__(self) -> None:
        if "{content}" not in self.user or (self.user_with_input and "{input}" not in self.user_with_input):
            raise InputError("a template's user needs {content}, and its user_with_input {input} as well")

    def format(self, messages: Sequence[Message]) -> str:
        """The prompt for an answer to the last message: all text up to where the answer starts."""
        check_turns("messages", messages)
        if messages[-1]["role"] != "user":
            raise InputError("a prompt ends with the user's message; the last one is the assistant's")
        return "".join(text + (self.answer_end + END_OF_TEXT) * answer for text, answer in self.pieces(messages))

    def pieces(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """(text, is it an answer?) one after the other. What follows an answer is not among them: `answer_end` and
        end-of-text."""
        first = next(message for message in messages if message["role"] == "user")
        text = self.opening_with_input if first.get("input") and self.opening_with_input else self.opening
        for message in messages:
            if message["role"] == "system":
                text = _fill(self.system, message)
            elif message["role"] == "user":
                text += _fill(self.question(message), message)
            else:
                yield text, False
                yield message["content"], True
                text = self.between
        if messages[-1]["role"] == "user":
            yield text, False

    def question(self, message: Message) -> str:
        """The pattern for a user's message, with or without an input."""
        if not message.get("input") or "{input}" in self.user:
            return self.user
        return self.user_with_input or self.user.replace("{content}", "{content}\n{input}")

    def save(self, folder: str | Path) -> Path:
        """Write pygpt_template.json into a model folder."""
        path = Path(folder) / TEMPLATE_FILE
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def _fill(text: str, message: Message) -> str:
    # In one pass: what stands in braces in a message is its text.
    return re.sub(r"\{(content|input)\}", lambda match: message.get(match[1], ""), text)


_TASK = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request.\n\n"
TEMPLATES = {
    # The prompts that Stanford Alpaca was trained with (Taori et al., 2023).
    "alpaca": Template(
        opening=f"{_TASK}. {_RESPOND}",
        opening_with_input=f"{_TASK}, paired with an input that provides further context. {_RESPOND}",
        user="### Instruction:\n{content}\n\n### Response:",
        user_with_input="### Instruction:\n{content}\n\n### Input:\n{input}\n\n### Response:",
        between="\n\n",
        stop=["\n\n### Instruction:"],
    ),
    # Phi-3's chat format (Abdin et al., 2024), its markers as ordinary text.
    "phi3": Template(
        user="<|user|>\n{content}<|end|>\n<|assistant|>\n",
        system="<|system|>\n{content}<|end|>\n",
        answer_end="<|end|>",
        between="\n",
        stop=["<|end|>", "<|user|>"],
    ),
}


def get_template(name_or_path: str | Path) -> Template:
    """A template by name, alpaca or phi3; a text with {content} in it, which is the template's `user`; or a file: .json
    with the fields of `Template`, any other with such a text."""
    if str(name_or_path) in TEMPLATES:
        return TEMPLATES[str(name_or_path)]
    if "{content}" in str(name_or_path):
        return Template(user=str(name_or_path))
    path = Path(name_or_path)
    if not path.is_file():
        raise MissingFileError(
            f"no template '{name_or_path}': take one of {', '.join(TEMPLATES)}, a text with {{content}} in it, or a file"
        )
    if path.suffix.lower() != ".json":
        return Template(user=_read(path))
    try:
        settings = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not JSON ({error})") from error
    known = {f.name: list if f.name == "stop" else str for f in fields(Template)}
    if not isinstance(settings, dict) or "user" not in settings or settings.keys() - known.keys():
        raise InputError(f"'{path}' must be a JSON object with user and perhaps {', '.join(set(known) - {'user'})}")
    for name, value in settings.items():
        if not isinstance(value, known[name]) or (name == "stop" and not all(isinstance(v, str) and v for v in value)):
            raise InputError(
                f"'{path}': {name} must be {'a list of texts' if name == 'stop' else 'text'}, got {value!r}"
            )
    return Template(**settings)


def load_template(folder: str | Path) -> Template:
    """The template that the model in `folder` was finetuned with."""
    path = Path(folder) / TEMPLATE_FILE
    if not path.is_file():
        raise MissingFileError(
            f"the model in '{folder}' was not finetuned on instructions: it has no {TEMPLATE_FILE} "
            f"(pygpt finetune instruct makes one)"
        )
    return get_template(path)


# --- tokens --------------------------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """idx: (T,) int64, targets: (T,) int64, the token that follows each, -1 where it does not count in the loss."""

    idx: IDS
    targets: IDS


def encode_conversation(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer, all_tokens: bool = False
) -> Example:
    """A conversation as tokens, of which the answers and the end-of-text after each count in the loss; or all tokens.

    Prompts and answers are encoded apart, as they are in generation, where the prompt comes first. Special tokens' text in
    a message is ordinary text. Raises InputError for a tokenizer without end-of-text.
    """
    if tokenizer.eot_id is None:
        raise InputError("the tokenizer has no end-of-text token, with which answers end; train a base that has one")
    pieces = list(_encode(messages, template, tokenizer))
    tokens = np.array([token for piece, _ in pieces for token in piece], np.int64)
    counts = np.repeat([is_answer or all_tokens for _, is_answer in pieces], [len(piece) for piece, _ in pieces])
    return Example(tokens[:-1], np.where(counts[1:], tokens[1:], IGNORED))


def encode_messages(messages: Sequence[Message], template: Template, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt for an answer to the last message, the same that training on the conversation has there."""
    return [token for piece, _ in _encode(messages, template, tokenizer) for token in piece]


def _encode(messages: Sequence[Message], template: Template, tokenizer: Tokenizer) -> Iterator[tuple[list[int], bool]]:
    """(token ids, is it an answer?) of each piece. What a message says is ordinary text: no special token is read in it."""
    end = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    for text, is_answer in template.pieces(messages):
        yield tokenizer.encode_ordinary(text + template.answer_end * is_answer) + end * is_answer, is_answer


class PaddedBatches:
    """Batches of examples, one a row, filled up on the right; similar lengths together (see `LengthBuckets`)."""

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int = 0) -> None:
        self._examples = examples
        self._buckets = LengthBuckets([e.idx for e in examples], range(len(examples)), batch_size, seed)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._buckets)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and targets, (B, T) int64, T the longest of the batch; steps go on from one epoch into the next."""
        idx, _, rows = self._buckets.batch(step)
        targets = torch.full_like(idx, IGNORED)
        for row, example in zip(targets, rows.tolist(), strict=True):
            row[: len(self._examples[example].targets)] = torch.from_numpy(self._examples[example].targets)
        return idx, targets


class PackedBatches:
    """Batches of rows of up to block_size tokens, each packed with as many examples as fit, which do not see each other.

    Examples go, in random order, into the first row that has room (first fit); the rows come in another order in every
    epoch. A pure function of (seed, step).
    """

    def __init__(self, examples: Sequence[Example], block_size: int, batch_size: int, seed: int = 0) -> None:
        self.batch_size, self._seed = _positive("batch_size", batch_size), _seed(seed)
        longest = max((len(example.idx) for example in examples), default=0)
        if not 0 < longest <= block_size:
            raise InputError(
                f"an example has {longest} tokens; a row of block_size {block_size} holds 1 to {block_size}"
            )
        room = np.full(len(examples), block_size)  # in each row, of which there are at most as many as examples
        self.rows: list[list[Example]] = []
        for i in _order(self._seed, 0, len(examples)):
            size = len(examples[i].idx)
            row = int(np.argmax(room[: len(self.rows) + 1] >= size))
            room[row] -= size
            if row == len(self.rows):
                self.rows.append([])
            self.rows[row].append(examples[i])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (B, T) int64, where each one's example starts in its row, (B, T) int32, and targets (B, T) int64."""
        epoch, index = divmod(_step(step), len(self))
        order = _order(self._seed, epoch + 1, len(self.rows))
        chosen = [self.rows[i] for i in order[index * self.batch_size : (index + 1) * self.batch_size]]
        T = max(sum(len(example.idx) for example in row) for row in chosen)
        idx, targets = np.zeros((len(chosen), T), np.int64), np.full((len(chosen), T), IGNORED, np.int64)
        document_start = np.zeros((len(chosen), T), np.int32)
        for b, row in enumerate(chosen):
            at = 0
            for example in row:
                end = at + len(example.idx)
                idx[b, at:end], targets[b, at:end], document_start[b, at:end] = example.idx, example.targets, at
                at = end
            document_start[b, at:] = at
        return torch.from_numpy(idx), torch.from_numpy(document_start), torch.from_numpy(targets)


def _order(seed: int, index: int, size: int) -> npt.NDArray[np.int64]:
    return np.argsort(_random_bits(seed, index, size), kind="stable")
