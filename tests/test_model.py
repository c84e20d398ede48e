"""The model: sizes, initialisation, tying, disk format, and the errors a user can cause."""

from __future__ import annotations

import json
import math

import pytest
import torch
from common import assert_close
from safetensors.torch import load_file, save_file

from pygpt import GPT, GPTConfig
from pygpt.errors import InputError, MissingFileError
from pygpt.ops import backends

TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)

# Exact counts of GPT-2's four sizes as published with its weights; GPT-3's as its paper rounds them.
PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}
ROUNDED = {
    "gpt3-125m": 125e6,
    "gpt3-350m": 350e6,
    "gpt3-760m": 760e6,
    "gpt3-1.3b": 1.3e9,
    "gpt3-2.7b": 2.7e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13e9,
    "gpt3-175b": 175e9,
}


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**TINY.__dict__, **changes}))


def test_parameter_counts_of_published_sizes():
    for name, count in PARAMETERS.items():
        with torch.device("meta"):
            assert GPT(GPTConfig.preset(name)).get_num_params(non_embedding=False) == count, name
    for name, count in ROUNDED.items():
        with torch.device("meta"):
            found = GPT(GPTConfig.preset(name)).get_num_params(non_embedding=False)
        assert abs(found - count) <= 0.025 * count, (name, found)


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=4, n_head=4, n_embd=128))
    residual = 0.02 / math.sqrt(2 * 4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            expected = residual if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    idx = torch.randint(512, (4, 64))
    assert model(idx, idx.roll(-1, 1))[1].item() == pytest.approx(math.log(512), rel=0.03)


def test_head_is_tied_and_stays_tied():
    model = tiny()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.to(torch.float64)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert "transformer.h.0.attn.c_attn.weight" in model.state_dict()


def test_loss_is_the_cross_entropy_of_the_logits():
    model = tiny()
    idx = torch.randint(50, (3, 16))
    targets = torch.randint(50, (3, 16))
    targets[0, :5], targets[2, 3] = -1, -100
    logits, none = model(idx)
    assert none is None
    both, loss = model(idx, targets, return_logits=True)
    assert model(idx, targets)[0] is None
    flat = targets.flatten()
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1)[flat >= 0], flat[flat >= 0])
    assert_close(loss, expected)
    assert torch.equal(both, logits)


def test_causality():
    # Changing token t must not change logits before t: exact, since those rows never read it.
    model = tiny(n_layer=3)
    idx = torch.randint(50, (2, 16))
    changed = idx.clone()
    changed[:, 9] = (idx[:, 9] + 1) % 50
    a, b = model(idx)[0], model(changed)[0]
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.allclose(a[:, 9:], b[:, 9:])


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5)
    idx = torch.randint(50, (2, 16))
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    torch.manual_seed(1)
    a = model(idx)[0]
    torch.manual_seed(1)
    assert torch.equal(model(idx)[0], a)
    assert not torch.allclose(model(idx)[0], a)


def test_crop_block_size():
    model = tiny()
    idx = torch.randint(50, (1, 8))
    before = model(idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx)[0], before)
    with pytest.raises(InputError, match="block_size"):
        model(torch.randint(50, (1, 9)))
    with pytest.raises(InputError, match="cannot crop"):
        model.crop_block_size(9)
    assert model.transformer.wpe.weight.requires_grad
    model.requires_grad_(False)
    model.crop_block_size(4)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_save_and_load(tmp_path, bias):
    model = tiny(bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.lm_head.weight is again.transformer.wte.weight
    again(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()  # trainable


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_reads_our_files_and_we_read_theirs(tmp_path, bias):
    from transformers import GPT2LMHeadModel

    model = tiny(bias=bias)
    model.save_pretrained(tmp_path / "ours")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    idx = torch.randint(50, (2, 16))
    assert_close(model(idx)[0], theirs(idx).logits.double(), torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(GPT.from_pretrained(tmp_path / "theirs")(idx)[0], theirs(idx).logits.double(), torch.float32)
    theirs.transformer.save_pretrained(tmp_path / "bare")  # GPT2Model: names without `transformer.`
    assert_close(GPT.from_pretrained(tmp_path / "bare")(idx)[0], theirs(idx).logits.double(), torch.float32)


def test_a_checkpoint_in_several_files(tmp_path):
    from transformers import GPT2LMHeadModel

    model = tiny()
    model.save_pretrained(tmp_path / "ours")
    GPT2LMHeadModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 1
    again = GPT.from_pretrained(tmp_path / "parts")
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(MissingFileError, match=parts[1].name):
        GPT.from_pretrained(tmp_path / "parts")
    parts[1].write_bytes(content[:-5])
    with pytest.raises(InputError, match=f"{parts[1].name}.*truncated or damaged"):
        GPT.from_pretrained(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json' is damaged"):
        GPT.from_pretrained(tmp_path / "parts")


def test_another_name_of_the_activation(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert '"gelu_new"' in config
    (tmp_path / "config.json").write_text(config.replace("gelu_new", "gelu_pytorch_tanh"))
    idx = torch.randint(50, (1, 8))
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


def test_loading_broken_folders(tmp_path):
    with pytest.raises(MissingFileError, match="no model folder"):
        GPT.from_pretrained(tmp_path / "nothing")
    with pytest.raises(MissingFileError, match=r"no config\.json"):
        GPT.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        GPT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        GPT.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"n_embd": 32}, "implies"),
        ({"n_layer": 3}, "lack"),
        ({"model_type": "llama"}, "llama"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            GPT.from_pretrained(tmp_path)
    for change, message in [
        ({"n_head": "x"}, 'config.json. says n_head is "x", not a whole number'),
        ({"n_layer": 2.0}, "n_layer is 2.0"),
        ({"n_head": 0}, "config.json': n_head must be a whole number of at least 1"),
        ({"resid_pdrop": "x"}, "resid_pdrop must be a number"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="no JSON object"):
        GPT.from_pretrained(tmp_path)
    del config["n_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="n_head"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"n_emb')
    with pytest.raises(InputError, match="not valid JSON"):
        GPT.from_pretrained(tmp_path)


VARIANTS = {
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-3,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "add_cross_attention": True,
    "tie_word_embeddings": False,
    "n_inner": 48,
}


@pytest.mark.parametrize("field", VARIANTS)
def test_variants_of_gpt2_are_refused(tmp_path, field):
    """As `transformers` writes and computes them, with the same tensors: they would be loaded, and be something else."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    GPT2LMHeadModel(GPT2Config(**sizes, **plain)).save_pretrained(tmp_path)
    GPT.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "reorder_and_upcast_attn": True, "n_inner": 128, "scale_attn_weights": True}))
    GPT.from_pretrained(tmp_path)  # the same computation
    file.write_text(json.dumps({**config, field: VARIANTS[field]}))
    with pytest.raises(InputError, match=rf"config\.json': {field} is"):
        GPT.from_pretrained(tmp_path)


def test_tensors_that_the_model_lacks_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    wte = state["transformer.wte.weight"]
    mask = torch.ones(1, 1, 16, 16)

    def load(**tensors: torch.Tensor) -> GPT:
        save_file(state | {name.replace("__", "."): t.clone() for name, t in tensors.items()}, weights)
        return GPT.from_pretrained(tmp_path)

    load(lm_head__weight=wte, transformer__h__0__attn__bias=mask, h__1__attn__masked_bias=torch.tensor(-1e4))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from wte"):
        load(lm_head__weight=wte + 1)
    with pytest.raises(
        InputError, match=r"1 tensors .* the first is transformer\.h\.0\.crossattention\.c_attn\.weight"
    ):
        load(transformer__h__0__crossattention__c_attn__weight=wte)
    with pytest.raises(InputError, match="quantized"):
        load(transformer__wte__weight=wte.to(torch.int8))
    tiny(bias=False).save_pretrained(tmp_path)
    state = load_file(weights)
    load()
    with pytest.raises(InputError, match=r"the first is transformer\.ln_f\.bias"):
        load(transformer__ln_f__bias=state["transformer.ln_f.bias"] + 1)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_truncated_pickle(tmp_path, legacy):
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "pytorch_model.bin"
    state = load_file(tmp_path / "model.safetensors")
    torch.save(state, weights, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "model.safetensors").unlink()
    GPT.from_pretrained(tmp_path)
    whole = weights.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"pytorch_model\.bin' is damaged") as caught:
            GPT.from_pretrained(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
    torch.save([1, 2], weights)
    with pytest.raises(InputError, match="something else"):
        GPT.from_pretrained(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="more than weights"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_bad_input():
    model = tiny()
    with pytest.raises(ValueError, match=r"17 tokens is longer than block_size \(16\)"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises((ValueError, IndexError), match="50"):
        model(torch.full((1, 4), 50))
    with pytest.raises(ValueError, match="shape"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(TypeError, match="int64"):
        model(torch.zeros(1, 4))
    for start in ([[0, 1, 3, 3]], [[-1, 0, 0, 0]]):
        with pytest.raises(ValueError, match="document_start: a token's document must begin"):
            model(torch.zeros(1, 4, dtype=torch.long), document_start=torch.tensor(start, dtype=torch.int32))
    with pytest.raises(ValueError, match="target 50 at position 2"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 50, 2]]))
    for changes, message in [
        ({"n_head": 3}, "multiple of n_head"),
        ({"n_layer": 0}, "n_layer"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"n_embd": 64.0}, "n_embd must be a whole number of at least 1, got 64.0"),
        ({"dropout": {"dropout": 0.1}}, "dropout must be a number"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny(**changes)
    with pytest.raises(ValueError, match="unknown preset 'gpt5'"):
        GPTConfig.preset("gpt5")


def test_sizes_zero_and_one():
    model = tiny()
    assert model(torch.zeros(0, 4, dtype=torch.long))[0].shape == (0, 4, 50)
    one = torch.zeros(1, 1, dtype=torch.long)
    assert torch.isfinite(model(one, one)[1])


def test_float16_and_float64_run_through_the_reference():
    idx = torch.randint(50, (2, 16))
    model = tiny().double()
    exact = model(idx)[0]
    assert exact.dtype == torch.float64
    assert_close(tiny()(idx)[0], exact, torch.float32)
    assert_close(tiny().half()(idx)[0], exact, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "vocab_size"), [(torch.float32, 50), (torch.bfloat16, 2050)], ids=str)
def test_compiles_as_one_graph(dtype, vocab_size):
    model = tiny(n_layer=1, vocab_size=vocab_size).to(dtype)  # from 2,048 on the loss of AMX is one operator
    idx = torch.randint(50, (2, 16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(idx, idx)[1]
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(idx, idx)[1]
    expected.backward()
    assert_close(loss, expected, dtype)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert_close(grad, p.grad, dtype)


@pytest.mark.skipif(backends.extension is None, reason="pygpt._C is not built")
def test_compiles_once_for_every_length():
    model, graphs = tiny(n_layer=1), []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count, dynamic=True)
    for T in (16, 12, 7):
        idx = torch.randint(50, (2, T))
        assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
    assert len(graphs) == 1
