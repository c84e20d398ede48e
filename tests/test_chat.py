"""`pygpt generate` and `pygpt chat` with a tiny model that has learned a few conversations by heart."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pygpt import GPT, GPTConfig
from pygpt.chat import Conversation
from pygpt.cli import main
from pygpt.data.instructions import Message, PaddedBatches, Template, encode_conversation, encode_messages, get_template
from pygpt.text import generate_text
from pygpt.tokenizer import CharTokenizer, get_tokenizer

BLOCK_SIZE = 64
TEMPLATE = Template(
    opening="#", user="Q:{content}\nA:", user_with_input="Q:{content}|{input}\nA:", between="\n", stop=["\nQ:"]
)
TOKENIZER = CharTokenizer("\n #:ABQ|?<>_abcdefghijklmnopqrstuvwxyzé", end_of_text=True)


def said(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [
    said("hi", "hello"),
    said("more", "of what?"),
    said("hi", "hello", "more", "hello and hello"),
    [{"role": "user", "content": "up", "input": "ab"}, {"role": "assistant", "content": "AB"}],
    said("name", "zoé"),
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose answers are those of CONVERSATIONS."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=BLOCK_SIZE, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=48))
    batches = PaddedBatches(
        [encode_conversation(messages, TEMPLATE, TOKENIZER) for messages in CONVERSATIONS], batch_size=5
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        loss = model(*batches.batch(step))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save_pretrained(folder)
    TOKENIZER.save(folder)
    TEMPLATE.save(folder)
    return folder


@pytest.fixture
def talk(
    learned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[str], str]]:
    """Pipes lines into `pygpt chat`; returns the answers and what stands on stderr."""

    def run(lines: str, *options: str, folder: Path = learned) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        capsys.readouterr()
        assert main(["chat", str(folder), "--temperature", "0", "--device", "cpu", *options]) == 0
        out, err = capsys.readouterr()
        return out.removesuffix("\n").split("\n"), " ".join(err.split())

    return run


def test_generate_follows_instructions(learned, capsys):
    def generate(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["generate", str(learned), "--device", "cpu", "--temperature", "0", *arguments]) == 0
        return capsys.readouterr().out

    assert generate("--instruct", "--prompt", "hi") == "hello\n"
    assert generate("--instruct", "--prompt", " more\n") == "of what?\n"  # as in training, where blanks are dropped
    assert generate("--instruct", "--prompt", "up", "--input", "ab") == "AB\n"
    assert generate("--prompt", "#Q:hi\nA:") == "#Q:hi\nA:hello\n"  # the same by hand
    several = generate("--instruct", "--prompt", "name", "--prompt", "hi", "--num-samples", "2")
    assert several == (
        "=== prompt 1, sample 1\nzoé\n=== prompt 1, sample 2\nzoé\n"
        "=== prompt 2, sample 1\nhello\n=== prompt 2, sample 2\nhello\n"
    )
    assert generate("--instruct", "--prompt", "hi", "--stop", "lo", "--stop", "zz") == "hel\n"
    assert generate("--instruct", "--prompt", "hi", "--max-new-tokens", "2") == "he\n"


def test_settings_of_generate_reach_the_model(learned, capsys):
    arguments = ["--prompt", "#Q:a", "--prompt", "n", "--num-samples", "3", "--temperature", "2", "--top-k", "30"]
    rest = ["--top-p", "0.95", "--repetition-penalty", "1.5", "--max-new-tokens", "20", "--seed", "4", "--stop", "zz"]
    assert main(["generate", str(learned), *arguments, *rest, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    texts = generate_text(
        GPT.from_pretrained(learned), TOKENIZER, ["#Q:a", "n"], 20, ["zz"], num_samples=3, temperature=2.0, top_k=30,
        top_p=0.95, repetition_penalty=1.5, seed=4,
    )  # fmt: skip
    assert out == "".join(
        f"=== prompt {i // 3 + 1}, sample {i % 3 + 1}\n{('#Q:a', 'n')[i // 3]}{text}\n" for i, text in enumerate(texts)
    )
    assert len(set(texts)) == 6


def test_generate_with_weights_of_8_bits(learned, capsys, monkeypatch):
    built = []
    monkeypatch.setattr(GPT, "to_int8", lambda self, made=GPT.to_int8: built.append(made(self)) or built[0])
    arguments = ["generate", str(learned), "--prompt", "#Q:a", "--temperature", "0", "--max-new-tokens", "8"]
    assert main([*arguments, "--int8", "--device", "cpu"]) == 0
    text = generate_text(built[0], TOKENIZER, ["#Q:a"], 8, temperature=0)[0]
    assert capsys.readouterr().out == f"#Q:a{text}\n"


def test_chat_remembers_and_forgets(talk):
    answers, err = talk("hi\nmore\n\n  \n/reset\nmore\nname\n/quit\nhi\n")
    assert answers[:3] == [
        "hello",
        "hello and hello",
        "of what?",
    ]  # to "more": with the greeting before it, and without
    assert len(answers) == 4  # blank lines are no messages; nothing is read after /quit
    assert err == "(the conversation is forgotten)"
    assert talk("name")[0] == ["zoé"]  # no line break at the end
    assert talk("")[0] == [""]
    assert talk("hi\n", "--stop", "l")[0] == ["he"]


def test_a_full_context_leaves_out_the_oldest(talk):
    """Three short exchanges fill 64 tokens but the room for an answer."""
    answers, err = talk("hi\nmore\nhi\nname\n", "--max-new-tokens", "20")
    assert answers[:2] == ["hello", "hello and hello"]
    assert "the oldest 2 messages are left out" in err
    answers, err = talk(f"{'a' * BLOCK_SIZE}\nhi\n")  # a message that cannot be answered is not remembered
    assert answers == ["hello"]
    assert f"a prompt of {BLOCK_SIZE + 6} tokens" in err
    assert f"holds {BLOCK_SIZE}" in err
    answers, err = talk("Ω\nhi\n")
    assert answers == ["hello"]
    assert "not among" in err


def test_conversation_keeps_what_fits():
    gpt2, alpaca = get_tokenizer("gpt2"), get_template("alpaca")
    system: Message = {"role": "system", "content": "Be brief."}
    conversation = Conversation(alpaca, gpt2, block_size=100, room=30, system="Be brief.")
    kept: list[Message] = []
    sizes = []
    for i in range(12):
        question, answer = f"Question number {i}?", f" Answer {i}. " * (i % 4)
        ids, forgotten = conversation.ask(question)
        kept = [*kept, {"role": "user", "content": question}]
        before = len(encode_messages([system, *kept], alpaca, gpt2))
        assert (forgotten > 0) == (before > 70)
        if forgotten:
            assert len(encode_messages([system, *kept[forgotten - 2 :]], alpaca, gpt2)) > 70  # no more than needed
        kept = kept[forgotten:]
        assert conversation.messages == kept
        assert ids == encode_messages([system, *kept], alpaca, gpt2)
        sizes.append(len(ids))
        conversation.answered(answer)
        kept = [*kept, {"role": "assistant", "content": answer.strip()}]
    assert 50 < max(sizes) <= 70
    ids, _ = conversation.ask("word " * 60)  # fits by itself, if not beside the room
    assert len(conversation.messages) == 1
    assert 70 < len(ids) <= 100
    conversation.answered("Yes.")
    with pytest.raises(ValueError, match="shorten it"):
        conversation.ask("word " * 100)
    assert len(conversation.messages) == 2  # as it was
    conversation.reset()
    assert conversation.messages == []
    assert gpt2.decode(conversation.ask("x")[0]).startswith("Be brief.\n\n### Instruction:\nx")


@pytest.mark.parametrize("name", ["alpaca", "phi3"])
def test_prompts_are_those_of_training(name):
    """The tokens before an answer are the same in training on the whole conversation and in a prompt for the answer."""
    tokenizer, template = get_tokenizer("gpt2"), get_template(name)
    conversation = said("What is <|endoftext|>?", "A mark.", "  Really? ", "Yes.\n", "naïve 🙂", "No")
    conversation[2]["input"] = "of texts"
    idx, targets = encode_conversation(conversation, template, tokenizer)
    whole = [*idx.tolist(), int(targets[-1])]
    for end in (1, 3, 5):
        prompt = encode_messages(conversation[:end], template, tokenizer)
        assert whole[: len(prompt)] == prompt
        assert targets[len(prompt) - 1] >= 0  # the answer begins here
        assert targets[len(prompt) - 2] == -1
        if end == 1:
            assert prompt.count(tokenizer.eot_id) == 0  # what a user types does not end a document
    assert template.format(said("a", "b", "c")) == tokenizer.decode(
        encode_messages(said("a", "b", "c"), template, tokenizer)
    )


def test_the_terminal(learned, tmp_path):
    """Ctrl-C stops an answer, and at the prompt explains itself; Ctrl-D leaves."""
    endless = CharTokenizer(TOKENIZER.to_dict()["characters"])  # without end-of-text, as the model is: it never ends
    torch.manual_seed(0)
    GPT(GPTConfig(block_size=32, vocab_size=endless.vocab_size, n_layer=1, n_head=1, n_embd=8)).save_pretrained(
        tmp_path
    )
    endless.save(tmp_path)
    TEMPLATE.save(tmp_path)
    terminal, stdin = pty.openpty()
    command = [sys.executable, "-m", "pygpt", "chat", str(tmp_path), "--max-new-tokens", "1000000", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command, env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    shown = {process.stdout: b"", process.stderr: b""}

    def wait_for(pattern: bytes, stream, interrupt: bool = False) -> None:
        """With `interrupt`, press Ctrl-C every two seconds meanwhile: one that comes just before a read waits for its end."""
        deadline, pressed = time.monotonic() + 120, 0.0
        while not re.search(pattern, shown[stream], re.DOTALL):
            assert time.monotonic() < deadline, (pattern, shown)
            if interrupt and time.monotonic() > pressed + 2:
                process.send_signal(signal.SIGINT)
                pressed = time.monotonic()
            for ready in select.select(list(shown), [], [], 1)[0]:
                shown[ready] += os.read(ready.fileno(), 4096)

    try:
        wait_for(b"> ", process.stdout)
        os.write(terminal, b"hi\n")
        wait_for(b"> .{50}", process.stdout)
        process.send_signal(signal.SIGINT)
        wait_for(b"> .*\n> ", process.stdout)
        wait_for(rb"\(Ctrl-D leaves\)", process.stderr, interrupt=True)
        wait_for(b"> .*\n> .*> ", process.stdout)
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
        os.close(terminal)
        os.close(stdin)


def test_bad_settings(learned, tmp_path, capsys):
    def fails(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        message = capsys.readouterr().err
        assert len(message.strip().splitlines()) <= 2
        return message

    for command in ("generate", "chat"):
        for name, value in [
            ("temperature", "-1"), ("top-k", "0"), ("top-p", "2"), ("max-new-tokens", "-1"),
            ("repetition-penalty", "0"), ("stop", ""),
        ]:  # fmt: skip
            assert name.replace("-", "_") + " must" in fails(command, "run", f"--{name}", value)
    assert "num_samples" in fails("generate", "run", "--num-samples", "0")
    assert "instruct needs a prompt" in fails("generate", "run", "--instruct")
    assert "instruct needs a prompt" in fails("generate", "run", "--instruct", "--prompt", " ")
    assert "needs instruct" in fails("generate", "run", "--prompt", "a", "--input", "b")
    model = GPT.from_pretrained(learned)
    model.save_pretrained(tmp_path)
    assert "which tokenizer" in fails("chat", str(tmp_path))
    TOKENIZER.save(tmp_path)
    for command in (["chat", str(tmp_path)], ["generate", str(tmp_path), "--instruct", "--prompt", "hi"]):
        assert "not finetuned on instructions" in fails(*command)
    long = fails("generate", str(learned), "--instruct", "--prompt", "a" * BLOCK_SIZE)
    assert f"block_size ({BLOCK_SIZE})" in long
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    assert "not finite" in fails("generate", str(tmp_path))
