"""Models on disk, in Hugging Face's GPT-2 layout: config.json + model.safetensors, readable by `transformers`.

On disk the four linear layers of a block are stored transposed, as GPT-2's Conv1D has them. A model without biases is
stored with zero biases, so that `transformers`, which always has them, computes the same.
"""

from __future__ import annotations

import json
import math
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
from pygpt.nn import Int8Linear
from pygpt.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pygpt.classifier import Classifier
    from pygpt.model import GPT, GPTConfig

NAME = re.compile(r"step_(\d{8,})")
# Fields of config.json that change what is computed, and the only value of each that is implemented.
IMPLEMENTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older files hold
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def save(model: GPT | Classifier, path: str | Path, **settings: Any) -> None:
    """Write config.json and model.safetensors into the folder `path`, each to a temporary name and then renamed.
    settings: what config.json says beyond a language model's, or instead."""
    folder = Path(path)
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise InputError("the model has LoRA adapters: merge them before it is saved (pygpt.train.lora.merge_lora)")
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InputError("the model has weights of 8 bits (GPT.to_int8): save the one it was made from")
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
    """Build the model that the folder `path` describes, of a run its best checkpoint, and load its weights. No code runs from
    the files. dropout: another probability than the folder's."""
    from pygpt.model import GPT

    folder = Path(path)
    if not folder.is_dir():
        raise MissingFileError(
            f"no model folder at '{path}': it must hold config.json and model.safetensors (a checkpoint of pygpt, or a "
            f"GPT-2 model downloaded from Hugging Face)"
        )
    if (folder / "checkpoints").is_dir():
        folder = resolve_checkpoint(folder)
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
        if not tensor.is_floating_point():
            raise InputError(f"'{folder}': {name} is {tensor.dtype}; quantized models are not supported")
        weights[name] = tensor.contiguous()
    _check_rest(folder, config, {name: tensor for name, tensor in state.items() if name not in weights}, weights)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def _check_rest(folder: Path, config: GPTConfig, rest: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Raise InputError for a tensor that a model without it would compute something else than was meant."""
    head, wte = rest.pop("lm_head.weight", None), weights["transformer.wte.weight"]
    if head is not None and not (head.shape == wte.shape and (head == wte).all()):
        raise InputError(
            f"'{folder}': lm_head.weight differs from wte.weight; only models that share them are supported"
        )
    unknown = [
        name
        for name, tensor in rest.items()
        if name != "score.weight"  # a classification head
        and not name.endswith(BUFFERS)
        and not (not config.bias and name.endswith(".bias") and name[:-4] + "weight" in weights and not tensor.any())
    ]
    if unknown:
        raise InputError(
            f"'{folder}': {len(unknown)} tensors are not part of the GPT-2 that config.json describes, the first is "
            f"{unknown[0]}"
        )


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
    """The GPTConfig of a model folder. Raises for a missing or broken file, for models that are not GPT-2, and for variants
    of it that compute something else."""
    from pygpt.model import GPTConfig

    file = folder / "config.json"
    if not file.is_file():
        raise MissingFileError(f"'{folder}' has no config.json: not a model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{file}' is not valid JSON ({error}); the file may be truncated") from error
    if not isinstance(raw, dict):
        raise InputError(f"'{file}' holds no JSON object; it is not a GPT-2 config.json")
    if "model_type" not in raw:
        raise InputError(f"'{file}' lacks model_type; it is not a GPT-2 config.json")
    for name, only in IMPLEMENTED.items():
        value = raw.get(name, only)
        value = "gelu_new" if value == "gelu_pytorch_tanh" else value  # another name of it
        same = math.isclose(value, only, rel_tol=1e-3) if type(value) is type(only) is float else value == only
        if not same:
            raise InputError(
                f"'{file}': {name} is {json.dumps(value)}; only GPT-2 models with {json.dumps(only)} are supported"
            )
    sizes: dict[str, Any] = {
        name: raw.get(name) for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    }
    for name, value in sizes.items():
        if type(value) is not int:
            what = f"says {name} is {json.dumps(value)}, not a whole number" if name in raw else f"lacks '{name}'"
            raise InputError(f"'{file}' {what}; it is not a GPT-2 config.json")
    if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
        raise InputError(f"'{file}': n_inner is {json.dumps(raw['n_inner'])}; only 4 times n_embd is supported")
    dropout, bias = raw.get("resid_pdrop", 0.0), raw.get("pygpt_bias", True)
    if not isinstance(dropout, (int, float)) or not isinstance(bias, bool):
        raise InputError(f"'{file}': resid_pdrop must be a number and pygpt_bias true or false")
    try:
        return GPTConfig(block_size=sizes.pop("n_positions"), **sizes, dropout=dropout, bias=bias)
    except InputError as error:
        raise InputError(f"'{file}': {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return _read_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"  # of a large model, which lies in several files
    if index.is_file():
        try:
            names = sorted({Path(file).name for file in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"'{index}' is damaged: it names no files of weights") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise MissingFileError(f"'{folder}' lacks {', '.join(missing)}, which '{index.name}' names")
        return {key: tensor for name in names for key, tensor in _read_safetensors(folder / name).items()}
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file():
        try:
            state = torch.load(pickled, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling damaged bytes comes to
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"'{pickled}' is damaged, or holds more than weights ({reason})") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise InputError(f"'{pickled}' holds something else than a model's weights")
        return state
    raise MissingFileError(f"'{folder}' has no model.safetensors: the model's weights are missing")


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"'{file}' cannot be read ({error}); the file is truncated or damaged") from error


def _our_name(name: str) -> str:
    """Hugging Face also stores the bare GPT2Model, whose names have no `transformer.` in front."""
    return name if name.startswith(("transformer.", "lm_head.", "score.")) else f"transformer.{name}"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = {path: NAME.fullmatch(path.name) for path in (run / "checkpoints").glob("step_*") if path.is_dir()}
    return sorted(
        (path for path, match in found.items() if match), key=lambda path: int(path.name.removeprefix("step_"))
    )


def resolve_checkpoint(path: str | Path) -> Path:
    """The model folder that a user means: the folder itself, or a run's best checkpoint (RUN/checkpoints/best, the lowest
    validation loss); of a run that was never evaluated, its latest."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    best = folder / "checkpoints" / "best"
    if (best / "config.json").is_file():
        return best
    found = checkpoints(folder)
    if found:
        return found[-1]
    if not folder.exists():
        raise MissingFileError(f"no run or model at '{path}'")
    raise MissingFileError(f"'{path}' holds neither a model (config.json) nor a checkpoint (checkpoints/step_*)")


def is_classifier(folder: Path) -> bool:
    """Whether a model folder says that it holds a classifier."""
    read_config(folder)  # raises for a file that is broken
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return "GPT2ForSequenceClassification" in (config.get("architectures") or [])


def refuse_classifier(folder: Path, instead: str) -> None:
    """Raise InputError for a classifier, whose transformer no longer predicts the next token. instead: what to do."""
    if is_classifier(folder):
        raise InputError(f"'{folder}' is a classifier, which predicts labels and not the next token: {instead}")


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
