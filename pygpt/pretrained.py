"""Models on disk, in Hugging Face's GPT-2 layout: config.json + model.safetensors, readable by `transformers`.

On disk the four linear layers of a block are stored transposed, as GPT-2's Conv1D has them. A model without biases is
stored with zero biases, so that `transformers`, which always has them, computes the same.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pygpt.errors import InputError, MissingFileError
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pygpt.classifier import Classifier
    from pygpt.model import GPT, GPTConfig

NAME = re.compile(r"step_(\d{8,})")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def save(model: GPT | Classifier, path: str | Path, **settings: Any) -> None:
    """Write config.json and model.safetensors into the folder `path`, each to a temporary name and then renamed.
    settings: what config.json says beyond a language model's, or instead."""
    folder = Path(path)
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise InputError("the model has LoRA adapters: merge them before it is saved (pygpt.train.lora.merge_lora)")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if not model.config.bias:
        for name in list(state):
            if name.endswith(".weight") and ".wte." not in name and ".wpe." not in name and name != "score.weight":
                state[name.removesuffix("weight") + "bias"] = state[name].new_zeros(state[name].shape[0])
    state = {name: (t.t() if name.endswith(TRANSPOSED) else t).contiguous() for name, t in state.items()}
    save_file(state, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")
    text = json.dumps(to_hugging_face(model.config, dtype) | settings, indent=2)
    (folder / "config.json.tmp").write_text(text + "\n", encoding="utf-8")
    os.replace(folder / "config.json.tmp", folder / "config.json")


def load(path: str | Path, dropout: float | None = None) -> GPT:
    """Build the model that the folder `path` describes and load its weights. No code runs from the files. dropout: another
    probability than the folder's."""
    from pygpt.model import GPT

    folder = Path(path)
    if not folder.is_dir():
        raise MissingFileError(
            f"no model folder at '{path}': it must hold config.json and model.safetensors (a checkpoint of pygpt, or a "
            f"GPT-2 model downloaded from Hugging Face)"
        )
    config = read_config(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    with torch.device("meta"):
        model = GPT(config)
    state = {_our_name(name): tensor for name, tensor in _read_weights(folder).items()}
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    missing = [name for name in expected if name not in state]
    if missing:
        raise InputError(
            f"'{folder}': the weights lack {len(missing)} tensors, the first is {missing[0]}; not a GPT-2 model?"
        )
    weights: dict[str, Tensor] = {}
    for name, wanted in expected.items():
        tensor = state[name].t() if name.endswith(TRANSPOSED) else state[name]
        if tensor.shape != wanted.shape:
            raise InputError(f"'{folder}': {name} is {tuple(tensor.shape)}, config.json implies {tuple(wanted.shape)}")
        weights[name] = tensor.contiguous()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def to_hugging_face(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """config.json as `transformers` writes it for GPT-2, and pygpt's `bias` flag."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": True,
        "bos_token_id": 50256 if config.vocab_size > 50256 else None,
        "eos_token_id": 50256 if config.vocab_size > 50256 else None,
        "dtype": dtype,
        "pygpt_bias": config.bias,
    }


def read_config(folder: Path) -> GPTConfig:
    """The GPTConfig of a model folder. Raises for a missing or broken file and for models that are not GPT-2."""
    from pygpt.model import GPTConfig

    file = folder / "config.json"
    if not file.is_file():
        raise MissingFileError(f"'{folder}' has no config.json: not a model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw.get("model_type") != "gpt2" or raw.get("activation_function", "gelu_new") != "gelu_new":
            raise InputError(
                f"'{file}': model_type '{raw.get('model_type')}' with activation '{raw.get('activation_function')}' "
                f"is not supported; only GPT-2 models are"
            )
        return GPTConfig(
            block_size=raw["n_positions"],
            vocab_size=raw["vocab_size"],
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            dropout=raw.get("resid_pdrop", 0.0),
            bias=raw.get("pygpt_bias", True),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise InputError(f"'{file}' is not valid JSON ({error}); the file may be truncated") from error
    except KeyError as error:
        raise InputError(f"'{file}' lacks {error}; it is not a GPT-2 config.json") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / "model.safetensors"
    if file.is_file():
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"'{file}' cannot be read ({error}); the file is truncated or damaged") from error
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file():
        return torch.load(pickled, map_location="cpu", weights_only=True)
    raise MissingFileError(f"'{folder}' has no model.safetensors: the model's weights are missing")


def _our_name(name: str) -> str:
    """Hugging Face also stores the bare GPT2Model, whose names have no `transformer.` in front."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {path: NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*") if path.is_dir()}
    return sorted(
        (path for path, match in found.items() if match), key=lambda path: int(path.name.removeprefix("step_"))
    )


def resolve_checkpoint(path: str | Path, prefer_best: bool = False) -> Path:
    """The model folder that a user means: the folder itself, or a run's latest checkpoint; with prefer_best, the run's
    best one (RUN/checkpoints/best) where it has one."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    best = folder / "checkpoints" / "best"
    if prefer_best and (best / "config.json").is_file():
        return best
    found = checkpoints(folder)
    if found:
        return found[-1]
    if not folder.exists():
        raise MissingFileError(f"no run or model at '{path}'")
    raise MissingFileError(f"'{path}' holds neither a model (config.json) nor a checkpoint (checkpoints/step_*)")


def checkpoint_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a model folder. One without its file that has GPT-2's vocabulary, padded or not, is taken for
    GPT-2's, as downloaded from Hugging Face; for any other None is returned."""
    if (folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(folder)
    return get_tokenizer("gpt2") if vocab_size in (50257, 50304) else None


def load_with_tokenizer(folder: Path, dropout: float | None = None) -> tuple[GPT, Tokenizer]:
    """The model in a folder and its tokenizer. Raises InputError where that is not known."""
    model = load(folder, dropout)
    tokenizer = checkpoint_tokenizer(folder, model.config.vocab_size)
    if tokenizer is None:
        raise InputError(f"'{folder}' does not say which tokenizer it uses: it holds no {TOKENIZER_FILE}")
    return model, tokenizer
