"""Export: a folder that Hugging Face's libraries, and what is built on them, load without any code of ours.

    pygpt export runs/mine exported
    lm_eval --model hf --model_args pretrained=exported --tasks hellaswag

    AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")

Every checkpoint's weights are in Hugging Face's layout already. What is added here is the tokenizer, in the format of the
`tokenizers` library, and the ids of its special tokens. The exported tokenizer gives the ids that ours gives with
`allowed_special="all"`. pygpt reads the folder, too.

The harness wants a token to begin a text with. Where a character vocabulary has no end-of-text, which is so when it was
made from a single file, name one: `--model_args pretrained=exported,prefix_token_id=0`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from pygpt import pretrained
from pygpt.classifier import Classifier
from pygpt.data.instructions import TEMPLATE_FILE, Template, load_template
from pygpt.errors import InputError
from pygpt.model import GPT
from pygpt.tokenizer import END_OF_TEXT, REPLACEMENT, Tokenizer, gpt2_file


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model and its tokenizer for Hugging Face's libraries and lm-evaluation-harness."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best checkpoint), a checkpoint or a model folder."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write: a new or an empty one."""


def export(config: ExportConfig, console: Console | None = None) -> Path:
    """Write model and tokenizer into `config.out`, and return it. A classifier is exported as one.

    Raises InputError, before anything is written, for a folder that holds something and a tokenizer that has no
    counterpart in the `tokenizers` library.
    """
    out = config.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"'{out}' exists already: choose a new folder")
    folder = pretrained.resolve_checkpoint(config.run)
    classifies = pretrained.is_classifier(folder)
    model = Classifier.from_pretrained(folder) if classifies else GPT.from_pretrained(folder)
    tokenizer = pretrained.checkpoint_tokenizer(folder, model.config.vocab_size)
    if tokenizer is None:
        raise InputError(f"'{folder}' does not say which tokenizer it uses; its weights load as they are, without one")
    template = load_template(folder) if (folder / TEMPLATE_FILE).is_file() else None
    files = _tokenizer_files(tokenizer, model.config.block_size, template, pads=classifies)
    end = tokenizer.eot_id
    if not classifies:
        files["generation_config.json"] = _json({"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})

    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    if isinstance(model, Classifier):
        model.save_pretrained(out)
    else:
        tokenizer.save(out)
        if template is not None:
            template.save(out)
        pretrained.save(model, out, bos_token_id=end, eos_token_id=end)
    if console is not None:
        auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
        console.print(f"{auto}.from_pretrained('{out}') and AutoTokenizer.from_pretrained('{out}') load '{folder}' now")
    return out


def _tokenizer_files(tokenizer: Tokenizer, block_size: int, template: Template | None, pads: bool) -> dict[str, bytes]:
    """Name and content of each file of a tokenizer. pads: whether end-of-text is the padding token, too."""
    state = tokenizer.to_dict()
    settings: dict[str, Any] = {"model_max_length": block_size, "clean_up_tokenization_spaces": False}
    if tokenizer.eot_id is not None:
        settings |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | ({"pad_token": END_OF_TEXT} if pads else {})
    if template is not None:
        settings["chat_template"] = _chat_template(template)
    if state["kind"] == "char":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {"tokenizer.json": _json(_characters(tokenizer, state["unknown"]))}
    elif tokenizer.name == "gpt2":
        settings |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": END_OF_TEXT, "add_prefix_space": False}
        vocabulary, merges = gpt2_file("encoder.json"), gpt2_file("vocab.bpe")
        files = {"vocab.json": vocabulary, "merges.txt": merges, "tokenizer.json": _json(_gpt2(vocabulary, merges))}
    else:
        raise InputError(
            f"the tokenizer '{tokenizer.name}' cannot be exported, only gpt2 and character tokenizers can; the model's "
            f"weights load as they are, without one"
        )
    return files | {"tokenizer_config.json": _json(settings)}


def _chat_template(template: Template) -> str:
    """The template as Jinja source for `apply_chat_template`, where a message may have an `input`, too."""

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    def filled(pattern: str) -> str:
        parts = enumerate(re.split(r"\{(content|input)\}", pattern))  # text, name, text, name, ..., text
        return " ~ ".join(f"(message['{part}'] or '')" if i % 2 else quoted(part) for i, part in parts)

    opening, opening_with_input = quoted(template.opening), quoted(template.opening_with_input or template.opening)
    question, question_with_input = filled(template.user), filled(template.question({"input": "any"}))
    lines = (
        "{%- set first = messages | selectattr('role', 'equalto', 'user') | first -%}",
        f"{{%- set now = namespace(text={opening_with_input} if first['input'] else {opening}) -%}}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        f"{{%- set now.text = {filled(template.system)} -%}}",
        "{%- elif message['role'] == 'user' -%}",
        f"{{%- set now.text = now.text ~ (({question_with_input}) if message['input'] else ({question})) -%}}",
        "{%- else -%}",
        f"{{{{- now.text ~ message['content'] ~ {quoted(template.answer_end)} ~ eos_token -}}}}",
        f"{{%- set now.text = {quoted(template.between)} -%}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if messages[-1]['role'] == 'user' -%}{{- now.text -}}{%- endif -%}",
    )
    return "\n".join(lines)


def _gpt2(vocabulary: bytes, merges: bytes) -> dict[str, Any]:
    """tokenizer.json from OpenAI's two files."""
    ids = json.loads(vocabulary)
    model = {"type": "BPE", "vocab": ids, "merges": merges.decode("utf-8").splitlines()[1:]}  # after its version
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _tokenizer_json(model, byte_level, byte_level, {END_OF_TEXT: ids[END_OF_TEXT]})


def _characters(tokenizer: Tokenizer, unknown: bool) -> dict[str, Any]:
    """tokenizer.json in which every character is a word. One outside the vocabulary is an error if not `unknown`, as the
    name of the unknown token, which is longer than a character, is not in the vocabulary either."""
    ids = {tokenizer.decode([i]): i for i in range(tokenizer.vocab_size)}
    model = {"type": "WordLevel", "vocab": ids, "unk_token": REPLACEMENT if unknown else "<unknown>"}
    split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return _tokenizer_json(model, split, {"type": "Fuse"}, tokenizer.special_tokens)


def _tokenizer_json(
    model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any], special_tokens: Mapping[str, int]
) -> dict[str, Any]:
    whole = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": token} | whole for token, index in special_tokens.items()],
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": model,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
