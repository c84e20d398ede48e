"""Instructions: what is read, how it is written, which tokens count, and that packed rows compute what single ones do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pygpt import GPT, GPTConfig, get_tokenizer
from pygpt.data.instructions import (
    END_OF_TEXT,
    TEMPLATES,
    Example,
    PackedBatches,
    PaddedBatches,
    Template,
    encode_conversation,
    encode_messages,
    get_template,
    load_template,
    read_instructions,
)
from pygpt.tokenizer import CharTokenizer
from pygpt.train.instruct import packed_loss, padded_loss

GPT2 = get_tokenizer("gpt2")
EAT = [
    {"role": "user", "content": "Rewrite in the past tense.", "input": "I eat {content}."},
    {"role": "assistant", "content": "I ate {content}. Вкусно 🍲"},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_both_forms_are_read(tmp_path):
    entries = [
        {
            "instruction": " Rewrite in the past tense. ",
            "input": "I eat {content}.",
            "output": "I ate {content}. Вкусно 🍲\n",
        },
        {"instruction": "Say hi.", "output": "Hi!"},
        {"instruction": "Say hi.", "input": None, "output": "Hi!"},
        {"messages": [*CHAT[:-1], {"role": "assistant", "content": " 6"}]},
        {"messages": [{"role": "system", "content": ""}, *CHAT[1:3]]},
        {"instruction": "half a pair: \ud83d", "output": "\ud83d\ude42"},
        {"instruction": "Say nothing.", "input": "", "output": "  "},
        {"instruction": "", "output": "What?"},
    ]
    as_list = read_instructions(write(tmp_path / "a.json", json.dumps(entries)))
    lines = "\n\n".join(json.dumps(entry, ensure_ascii=i == 5) for i, entry in enumerate(entries))
    as_lines = read_instructions(write(tmp_path / "a.jsonl", "\ufeff" + lines.replace("\n", "\r\n")))
    half = [{"role": "user", "content": "half a pair: \ufffd"}, {"role": "assistant", "content": "🙂"}]
    hi = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi!"}]
    assert as_list.conversations == as_lines.conversations == [EAT, hi, hi, CHAT, CHAT[1:3], half]
    assert as_list.skipped == as_lines.skipped == {"empty answer": 1, "empty question": 1}
    assert (as_list.places[-1], as_lines.places[-1]) == ("entry 6", "line 11")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a",', r"line 2: broken JSON"),
        ("a.json", '[{"instruction": "a", "output": "b"},\n\n{"instruction" "a"}]', r"line 3: broken JSON"),
        ("a.json", "[" * 100_000, r"line 1: broken JSON"),
        ("a.json", '{"instruction": "a", "output": "b"}', r"must hold a list of entries"),
        ("a.json", '[{"instruction": "a"}]', r"entry 1: 'output' is missing; an entry has instruction, output"),
        ("a.json", '[{"instruction": "a", "output": 3}]', r"entry 1: 'output' is 3, which is not text"),
        ("a.json", '["a"]', r"entry 1: not a JSON object but a"),
        ("a.json", "[]", r"has no instruction with an answer"),
        ("a.json", '[{"instruction": "a", "output": " "}]', r"has no instruction with an answer"),
        ("a.json", '[{"messages": []}]', r"entry 1: .* the roles are none"),
        ("a.json", '[{"messages": [{"role": "assistant", "content": "a"}]}]', r"must take turns, the user's first"),
        ("a.json", '[{"messages": [{"role": "user", "content": "a"}]}]', r"no answer to learn from"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', r"message 1 needs a role and a content"),
        ("a.json", '[{"messages": {"role": "user"}}]', r"'messages' must be a list of objects"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_instructions(write(tmp_path / name, text))


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of instructions at"):
        read_instructions(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin1"))
    with pytest.raises(ValueError, match=r"is not UTF-8 text .* at byte 2"):
        read_instructions(tmp_path / "latin.json")


def test_alpaca_is_written_as_stanford_published_it():
    with_input, without = (TEMPLATES["alpaca"].format(messages) for messages in (EAT[:1], CHAT[1:2]))
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nRewrite in the past tense.\n\n### Input:\nI eat {content}.\n\n### Response:"
    )
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n2 + 2?\n\n### Response:"
    )


def test_phi3_is_written_as_microsoft_published_it():
    text = TEMPLATES["phi3"].format(CHAT[:-1]).replace(END_OF_TEXT, "")
    assert text == (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n2 + 2?<|end|>\n<|assistant|>\n4<|end|>\n"
        "<|user|>\nAnd 3 + 3?<|end|>\n<|assistant|>\n"
    )
    assert TEMPLATES["phi3"].format(EAT[:1]) == (
        "<|user|>\nRewrite in the past tense.\nI eat {content}.<|end|>\n<|assistant|>\n"
    )


def test_a_prompt_ends_with_a_question():
    with pytest.raises(ValueError, match="a prompt ends with the user's message"):
        TEMPLATES["alpaca"].format(CHAT)
    with pytest.raises(ValueError, match="must take turns"):
        TEMPLATES["alpaca"].format(CHAT[2:4])


WRITTEN = {  # «what counts in the loss», ¶ for end-of-text
    "alpaca": [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nRewrite in the past tense.\n\n### Input:\n"
        "I eat {content}.\n\n### Response:«I ate {content}. Вкусно 🍲¶»",
        "Be brief.\n\n### Instruction:\n2 + 2?\n\n### Response:«4¶»\n\n### Instruction:\nAnd 3 + 3?\n\n### Response:«6¶»",
    ],
    "phi3": [
        "<|user|>\nRewrite in the past tense.\nI eat {content}.<|end|>\n<|assistant|>\n«I ate {content}. Вкусно 🍲<|end|>¶»",
        "<|system|>\nBe brief.<|end|>\n<|user|>\n2 + 2?<|end|>\n<|assistant|>\n«4<|end|>¶»\n"
        "<|user|>\nAnd 3 + 3?<|end|>\n<|assistant|>\n«6<|end|>¶»",
    ],
    "[{content}~{input}]": [
        "[Rewrite in the past tense.~I eat {content}.]«I ate {content}. Вкусно 🍲¶»",
        "Be brief.\n\n[2 + 2?~]«4¶»[And 3 + 3?~]«6¶»",
    ],
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("which", [0, 1], ids=["input", "turns"])
def test_the_mask_character_by_character(name, which):
    written = WRITTEN[name][which]
    characters = "".join(sorted(set(written) - set("«»¶")))
    tokenizer = CharTokenizer(characters, end_of_text=True)
    ids, counts, inside = [], [], False
    for character in written:
        if character in "«»":
            inside = character == "«"
        else:
            ids.append(tokenizer.eot_id if character == "¶" else characters.index(character))
            counts.append(inside)
    example = encode_conversation((EAT, CHAT)[which], get_template(name), tokenizer)
    assert example.idx.tolist() == ids[:-1]
    assert example.targets.tolist() == [ids[i] if counts[i] else -1 for i in range(1, len(ids))]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", [EAT, CHAT], ids=["input", "turns"])
def test_answers_and_the_end_of_text_after_each_count_and_nothing_else(name, conversation):
    template = TEMPLATES[name]
    example = encode_conversation(conversation, template, GPT2)
    # Written out: what the model reads, and of which tokens it learns the next one.
    text, learned = "", []
    for turn, message in enumerate(conversation):
        if message["role"] == "assistant":
            prompt = template.format(conversation[:turn])
            answer = message["content"] + template.answer_end + END_OF_TEXT
            learned.append(answer)
            text = prompt + answer
    tokens = [*example.idx.tolist(), example.targets[-1]]
    assert GPT2.decode(tokens) == text
    assert tokens[-1] == GPT2.eot_id
    counted = example.targets >= 0
    np.testing.assert_array_equal(example.targets[counted], np.array(tokens[1:])[counted])
    assert GPT2.decode(example.targets[counted]) == "".join(learned)
    starts = np.flatnonzero(counted & ~np.r_[False, counted[:-1]])  # one stretch of counted targets for each answer
    assert [GPT2.decode(tokens[: start + 1]) for start in starts] == [
        template.format(conversation[:turn]) for turn, m in enumerate(conversation) if m["role"] == "assistant"
    ]
    everything = encode_conversation(conversation, template, GPT2, all_tokens=True)
    assert everything.targets.tolist() == tokens[1:]
    assert everything.idx.tolist() == tokens[:-1]


def test_a_prompt_is_what_training_showed_before_the_answer():
    """Else a model would be asked in other tokens than those it learned from."""
    for template in TEMPLATES.values():
        for conversation in (EAT, CHAT[:3]):
            example = encode_conversation(conversation, template, GPT2)
            prompt = encode_messages(conversation[:-1], template, GPT2)
            assert prompt == GPT2.encode(template.format(conversation[:-1]), allowed_special="all")
            assert example.idx[: len(prompt)].tolist() == prompt
            assert (example.targets[: len(prompt) - 1] == -1).all()
            assert example.targets[len(prompt) - 1] >= 0


def test_special_tokens_in_a_message_are_text():
    messages = [{"role": "user", "content": "Say " + END_OF_TEXT}, {"role": "assistant", "content": END_OF_TEXT}]
    assert GPT2.eot_id not in encode_messages(messages[:1], TEMPLATES["alpaca"], GPT2)
    example = encode_conversation(messages, TEMPLATES["alpaca"], GPT2)
    assert [*example.idx, example.targets[-1]].count(GPT2.eot_id) == 1


def test_templates_are_saved_loaded_and_checked(tmp_path):
    for template in TEMPLATES.values():
        template.save(tmp_path)
        assert load_template(tmp_path) == template
    own = write(tmp_path / "own.json", '{"user": "Q: {content} ({input})\\nA: ", "stop": ["Q:"]}')
    assert get_template(own).format(EAT[:1]) == "Q: Rewrite in the past tense. (I eat {content}.)\nA: "
    text = "Q: {content} ({input})\nA: "
    assert get_template(text) == get_template(write(tmp_path / "own.txt", text)) == Template(user=text)
    assert get_template("{content}?\n").format(EAT[:1]) == "Rewrite in the past tense.\nI eat {content}.?\n"
    with pytest.raises(ValueError, match=r"needs \{content\}"):
        get_template(write(tmp_path / "empty.txt", ""))
    with pytest.raises(FileNotFoundError, match="no template 'vicuna': take one of alpaca, phi3, a text with"):
        get_template("vicuna")
    with pytest.raises(FileNotFoundError, match="was not finetuned on instructions"):
        load_template(tmp_path / "nowhere")
    for text, message in (
        ("{", "is not JSON"),
        ('{"stop": []}', "must be a JSON object with user"),
        ('{"user": "{content}", "ending": ""}', "must be a JSON object with user"),
        ('{"user": "{question}"}', r"needs \{content\}"),
        ('{"user": "{content}", "stop": "Q:"}', "stop must be a list of texts"),
        ('{"user": "{content}", "between": 3}', "between must be text, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            get_template(write(tmp_path / "bad.json", text))


def test_a_tokenizer_without_end_of_text_is_refused():
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_conversation(EAT, Template(user="{content}"), CharTokenizer("abc", unknown=True))


# --- batches -------------------------------------------------------------------------------------------------------------


def examples(lengths, vocab=50, seed=0):
    """Examples of random tokens, of which a random half counts, the last always."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        targets = np.where(rng.random(length) < 0.5, rng.integers(0, vocab, length), -1)
        targets[-1] = rng.integers(0, vocab)
        made.append(Example(rng.integers(0, vocab, length), targets))
    return made


def model(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32, dropout=dropout)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_packed_padded_and_single_examples_have_the_same_loss_and_gradients(dtype, tolerance):
    gpt, data = model(dtype), examples([1, 2, 3, 5, 7, 11, 13, 17, 19, 23, 31, 32])
    total = sum(int((example.targets >= 0).sum()) for example in data)

    def accumulated(batches, loss_fn):
        """Sum of the losses of all tokens over their number, and its gradients."""
        gpt.zero_grad()
        loss = 0.0
        for index in range(len(batches)):
            batch = batches.batch(index)
            share = loss_fn(gpt, batch) * int((batch[-1] >= 0).sum()) / total
            share.backward()
            loss += share.item()
        return loss, [parameter.grad.clone() for parameter in gpt.parameters()]

    gpt.zero_grad()
    expected = 0.0
    for idx, targets in data:  # each alone, through torch's own cross-entropy
        logits, _ = gpt(torch.from_numpy(idx)[None])
        share = F.cross_entropy(logits[0], torch.from_numpy(targets), ignore_index=-1, reduction="sum") / total
        share.backward()
        expected += share.item()
    gradients = [parameter.grad.clone() for parameter in gpt.parameters()]

    packed = PackedBatches(data, 32, 2, seed=3)
    assert len(packed.rows) <= len(data) / 2
    for batches, loss_fn in ((packed, packed_loss), (PaddedBatches(data, 3, seed=3), padded_loss)):
        loss, found = accumulated(batches, loss_fn)
        assert abs(loss - expected) < tolerance
        for a, b in zip(found, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", [PaddedBatches, lambda data, size, seed: PackedBatches(data, 40, size, seed)])
def test_every_epoch_has_each_example_once_in_an_order_of_its_own(kind):
    data = examples(range(1, 38))

    def seen(batches, epoch):
        rows = []
        for step in range(epoch * len(batches), (epoch + 1) * len(batches)):
            batch = batches.batch(step)
            idx, targets = batch[0], batch[-1]
            start = batch[1] if len(batch) == 3 else torch.zeros_like(idx)
            for row in range(len(idx)):
                for first in start[row].unique().tolist():
                    inside = start[row] == first
                    rows.append((idx[row][inside].tolist(), targets[row][inside].tolist()))
        return rows

    batches = kind(data, 4, 7)
    epochs = [seen(batches, epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[1] == seen(kind(data, 4, 7), 1)  # a pure function of (seed, step)
    assert epochs[0] != seen(kind(data, 4, 8), 0)
    wanted = sorted((example.idx.tolist(), example.targets.tolist()) for example in data)
    for rows in epochs:
        stripped = []
        for idx, targets in rows:  # padding: token 0, target -1, at the end
            while targets and targets[-1] == -1:
                idx, targets = idx[:-1], targets[:-1]
            if targets:
                stripped.append((idx, targets))
        assert sorted(stripped) == wanted


def test_an_example_that_fits_no_row():
    with pytest.raises(ValueError, match="an example has 9 tokens; a row of block_size 8 holds 1 to 8"):
        PackedBatches(examples([3, 9]), 8, 2)
