"""LoRA: what trains, that the merged model computes the same, and that a run goes on bit for bit."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from pygpt import GPT, GPTConfig
from pygpt.data import RandomOffsets
from pygpt.errors import InputError
from pygpt.train import TrainConfig, Trainer, resolve_checkpoint
from pygpt.train.lora import TARGETS, add_lora, has_lora, merge_lora, merged

VOCABULARY, BLOCK = 17, 16
TOKENS = torch.arange(512) * 3 % VOCABULARY
SETTINGS = TrainConfig(steps=12, learning_rate=1e-2, warmup=2, checkpoint_every=4, device="cpu", keep=5)


def make_model(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=VOCABULARY, **changes))


def adapted(**options: float) -> GPT:
    """A model whose adapters already do something."""
    model = make_model()
    add_lora(model, **({"rank": 3, "alpha": 6.0} | options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def trainer(run: Path, model: GPT, config: TrainConfig = SETTINGS) -> Trainer:
    batch = RandomOffsets(TOKENS, BLOCK, 4, seed=3).batch
    return Trainer(model, batch, config, run, console=Console(file=io.StringIO()))


def test_adapters_start_as_no_change_and_only_they_train():
    plain, model = make_model(), make_model()
    add_lora(model, rank=3, alpha=6.0)
    idx = torch.arange(BLOCK)[None]
    assert torch.equal(model(idx)[0], plain(idx)[0])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        f"transformer.h.{layer}.{part}.lora_{matrix}.default.weight"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for matrix in "AB"
    }


def test_the_update_is_alpha_over_rank_b_a():
    """The formula of the paper, written out."""
    model, plain = adapted(), make_model()
    layer, base = model.transformer.h[1].mlp.c_fc, plain.transformer.h[1].mlp.c_fc
    x = torch.randn(5, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = F.linear(x, base.weight, base.bias) + 6.0 / 3 * (x @ a.t() @ b.t())
    torch.testing.assert_close(layer(x), expected)


def test_merged_equals_unmerged_and_the_adapters_come_back():
    model, idx = adapted(), torch.arange(BLOCK)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(idx)[0]
    assert (logits - make_model()(idx)[0]).abs().max() > 0.05  # the adapters matter
    with merged(model):
        assert not has_lora(model)
        torch.testing.assert_close(model(idx)[0], logits, rtol=1e-5, atol=1e-6)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merge_lora(model)
    assert list(model.state_dict()) == list(make_model().state_dict())
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-5, atol=1e-6)
    merge_lora(model)  # nothing left to merge
    torch.testing.assert_close(model(idx)[0], logits, rtol=1e-5, atol=1e-6)


def test_a_model_without_biases_and_in_bfloat16_merges():
    model = make_model(bias=False).bfloat16()
    add_lora(model, rank=2)
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    idx = torch.arange(BLOCK)[None]
    logits = model(idx)[0]
    merge_lora(model)
    assert model.transformer.h[0].attn.c_attn.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(idx)[0], logits, rtol=0.02, atol=0.02)


def test_training_leaves_the_base_alone_and_saves_the_merged_model(tmp_path):
    model = make_model()
    add_lora(model, rank=3, dropout=0.1)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    trainer(tmp_path, model).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name
    loaded, idx = GPT.from_pretrained(resolve_checkpoint(tmp_path)), torch.arange(BLOCK)[None]
    torch.testing.assert_close(loaded(idx)[0], model.eval()(idx)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, dtype):
    config = replace(SETTINGS, dtype=dtype)

    def start() -> GPT:
        model = make_model()
        add_lora(model, rank=3, dropout=0.1)
        return model

    whole = trainer(tmp_path / "whole", start(), config)
    whole.train()
    trainer(tmp_path / "parts", start(), config).train()
    checkpoint = tmp_path / "parts" / "checkpoints" / "step_00000004"
    model = GPT.from_pretrained(checkpoint)
    add_lora(model, rank=3, dropout=0.1)
    resumed = trainer(tmp_path / "parts", model, config)
    resumed.resume(checkpoint)
    assert resumed.step == 4
    resumed.train()
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad


def test_resuming_with_other_adapters_is_an_error(tmp_path):
    trainer(tmp_path, make_model(), replace(SETTINGS, steps=4)).train()
    model = GPT.from_pretrained(resolve_checkpoint(tmp_path))
    add_lora(model, rank=3)
    with pytest.raises(InputError, match="not written with the LoRA adapters"):
        trainer(tmp_path, model).resume(resolve_checkpoint(tmp_path))


def test_what_was_saved_needs_no_peft(tmp_path):
    model = adapted()
    with merged(model):
        model.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import torch; from pygpt import GPT\n"
        f"torch.save(GPT.from_pretrained({str(tmp_path)!r})(torch.arange({BLOCK})[None])[0], {str(tmp_path / 'out')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    logits = torch.load(tmp_path / "out", weights_only=True)
    torch.testing.assert_close(logits, model(torch.arange(BLOCK)[None])[0], rtol=1e-5, atol=1e-6)


def test_saving_unmerged_is_an_error(tmp_path):
    with pytest.raises(InputError, match="merge"):
        adapted().save_pretrained(tmp_path)


def test_settings_out_of_range(monkeypatch):
    for options in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"alpha": float("nan")}):
        with pytest.raises(InputError, match="LoRA needs"):
            add_lora(make_model(), **options)
    with pytest.raises(InputError, match="already"):
        add_lora(adapted())
    with pytest.raises(InputError, match=", ".join(TARGETS)):
        add_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'pygpt-kernels\[lora\]'"):
        add_lora(make_model())
