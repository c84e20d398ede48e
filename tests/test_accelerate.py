"""pygpt.accelerate: somebody else's model computes the same before and after, through pygpt's ops."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from common import assert_close
from torch import nn

import pygpt
from pygpt import ops


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of pygpt's ops in the order they were called."""
    seen: list[str] = []

    def record(name):
        original = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, **k: (seen.append(name), original(*a, **k))[1])

    for name in ("embedding", "layer_norm", "causal_attention", "causal_attention_qkvpacked", "linear"):
        record(name)
    return seen


def hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=32)).eval()


def test_hugging_face_model(calls):
    model = hugging_face()
    idx = torch.randint(60, (2, 20))

    def run():
        model.zero_grad()
        out = model(idx, labels=idx)
        out.loss.backward()
        return out.logits.detach(), model.transformer.wte.weight.grad.clone()

    logits, grad = run()
    assert not calls
    assert pygpt.accelerate(model) is model
    new_logits, new_grad = run()
    assert calls.count("layer_norm") == 5
    assert calls.count("causal_attention") == 2
    assert calls.count("embedding") == 2
    assert calls.count("linear") == 2 * 4 + 1
    assert_close(new_logits, logits.double(), torch.float32)
    assert_close(new_grad, grad.double(), torch.float32)


def test_hugging_face_generate_and_padding(calls):
    plain, fast = hugging_face(), pygpt.accelerate(hugging_face())
    idx = torch.randint(60, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(idx, **options), plain.generate(idx, **options))
    assert "causal_attention" in calls
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # left padding: transformers' own SDPA answers
    a, b = fast(idx, attention_mask=mask).logits, plain(idx, attention_mask=mask).logits
    assert_close(a[0, 2:], b[0, 2:].double(), torch.float32)
    assert_close(a[1], b[1].double(), torch.float32)


SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
MODELS = {
    "T5Model": ("T5Config", T5),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        SIZES | {"num_key_value_heads": 2, "head_dim": 8, "attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 1},
    ),
    "GptOssForCausalLM": (
        "GptOssConfig",
        SIZES | {"num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "LlamaForCausalLM": ("LlamaConfig", SIZES),
    "MistralForCausalLM": ("MistralConfig", SIZES | {"num_key_value_heads": 4}),
}


def tiny(name):
    import transformers

    config, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_attention_with_further_terms(name, calls):
    """T5's position bias, Gemma 2's soft cap and GPT-OSS' sinks are kept; what has none of them runs on pygpt."""
    plain = tiny(name)
    fast = pygpt.accelerate(copy.deepcopy(plain))
    idx = torch.randint(60, (2, 12))
    inputs = (
        {"decoder_input_ids": idx} if name == "T5Model" else {"num_items_in_batch": 3, "output_hidden_states": True}
    )
    with torch.no_grad():
        assert_close(fast(idx, **inputs)[0], plain(idx, **inputs)[0].double(), torch.float32)
    assert "linear" in calls
    assert ("causal_attention" in calls) == (name in ("LlamaForCausalLM", "MistralForCausalLM"))


def test_attention_of_each_model_inside_another(calls):
    both = nn.ModuleList([tiny("GptOssForCausalLM"), tiny("LlamaForCausalLM")])
    pygpt.accelerate(both)
    assert [m.config._attn_implementation for m in both] == ["eager", "pygpt"]


def test_static_cache_with_room_left():
    """The cache is longer than the prompt, and comes without a mask: only the first keys are the prompt's."""
    from transformers import StaticCache

    plain = tiny("LlamaForCausalLM")
    fast = pygpt.accelerate(copy.deepcopy(plain))
    idx = torch.randint(60, (2, 12))
    with torch.no_grad():
        expected, got = (m(idx, past_key_values=StaticCache(m.config, max_cache_len=20)).logits for m in (plain, fast))
    assert_close(got, expected.double(), torch.float32)


class CausalSelfAttention(nn.Module):
    """The attributes of nanoGPT's module, with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head, self.n_embd, self.dropout = 2, 16, 0.0
        self.c_attn, self.c_proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, 2, 8).transpose(1, 2) for t in self.c_attn(x).split(16, dim=2))
        scores = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        return self.resid_dropout(self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)))


def test_nanogpt_style_model(calls):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.LayerNorm(16), CausalSelfAttention(), nn.LayerNorm(16, bias=False))
    idx = torch.randint(11, (3, 9))
    before, state = model(idx).detach(), model.state_dict()
    pygpt.accelerate(model)
    calls.clear()  # those of the comparison with the module's own attention
    assert_close(model(idx), before.double(), torch.float32)
    assert calls == ["embedding", "layer_norm", "linear", "causal_attention_qkvpacked", "linear", "layer_norm"]
    assert model.state_dict().keys() == state.keys()
    assert isinstance(model[2], CausalSelfAttention)


def fork(name, forward):
    """A module of nanoGPT's names whose forward is another one."""
    return type("CausalSelfAttention", (CausalSelfAttention,), {"forward": forward, "__qualname__": name})()


def rotary(self, x):
    q, k, v = self.c_attn(x).split(16, dim=2)
    angle = torch.arange(x.shape[1])[:, None] / torch.tensor([1.0, 10.0])

    def rotate(t):
        a, b = (h.view(*x.shape[:2], 2, 4) for h in t.chunk(2, dim=2))
        a, b = a.transpose(1, 2), b.transpose(1, 2)
        cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    v = v.view(*x.shape[:2], 2, 8).transpose(1, 2)
    y = nn.functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


def not_causal(self, x):
    q, k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.c_attn(x).split(16, dim=2))
    return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_mask(self, x, mask=None):
    y = CausalSelfAttention.forward(self, x)
    return y if mask is None else y * mask


@pytest.mark.parametrize("forward", [rotary, not_causal, with_mask])
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forks_of_nanogpt_keep_their_attention(forward, zeroed, dtype):
    attention = fork("Fork", forward).to(dtype)
    if zeroed:  # as some initialise it: its output tells nothing then
        nn.init.zeros_(attention.c_proj.weight)
    model = nn.ModuleDict({"attention": attention})
    pygpt.accelerate(model)
    assert type(model.attention).forward is forward
    assert type(model.attention.c_attn) is not nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_comparing_attention_leaves_no_trace(dtype):
    attention = CausalSelfAttention().to(dtype)
    attention.resid_dropout.eval()
    model, state, rng = nn.Sequential(attention), copy.deepcopy(attention.state_dict()), torch.get_rng_state()
    pygpt.accelerate(model)
    assert type(attention).forward is not CausalSelfAttention.forward
    assert torch.equal(torch.get_rng_state(), rng)
    assert attention.training
    assert not attention.resid_dropout.training
    assert all(torch.equal(value, state[name]) for name, value in attention.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in attention.parameters())


def test_swapped_models_can_be_saved_and_copied():
    idx = torch.randint(60, (2, 9))
    gpt2 = pygpt.accelerate(hugging_face())
    nano = pygpt.accelerate(nn.Sequential(nn.Embedding(60, 16), CausalSelfAttention()))
    file = io.BytesIO()
    torch.save(gpt2, file)
    file.seek(0)
    with torch.no_grad():
        for copied in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(gpt2)), copy.deepcopy(gpt2)):
            assert torch.equal(copied(idx).logits, gpt2(idx).logits)
            assert type(copied.transformer.h[0].attn.c_attn) is type(gpt2.transformer.h[0].attn.c_attn)
        for copied in (pickle.loads(pickle.dumps(nano)), copy.deepcopy(nano)):
            assert torch.equal(copied(idx), nano(idx))
            assert type(copied[1]) is type(nano[1])


def test_keyword_of_torch():
    for module, x in (
        (nn.Linear(4, 3), torch.randn(2, 4)),
        (nn.LayerNorm(4), torch.randn(2, 4)),
        (nn.Embedding(5, 4), torch.randint(5, (2, 3))),
    ):
        expected = module(input=x).detach()
        assert_close(pygpt.accelerate(module)(input=x), expected.double(), torch.float32)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Sequential(nn.Embedding(11, 16), CausalSelfAttention()),
        hugging_face,
    ],
    ids=["Linear", "nanoGPT", "GPT-2"],
)
def test_second_call_changes_nothing(build):
    model = pygpt.accelerate(build())
    types = [type(m) for m in model.modules()]
    assert pygpt.accelerate(model) is model
    assert [type(m) for m in model.modules()] == types


def test_own_model_is_fast_already():
    model = pygpt.GPT(pygpt.GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16))
    types = [type(m) for m in model.modules()]
    assert pygpt.accelerate(model) is model
    assert [type(m) for m in model.modules()] == types


def test_nothing_to_swap():
    with pytest.raises(ValueError, match="nothing in Conv2d"):
        pygpt.accelerate(nn.Conv2d(2, 2, 1))


def test_modules_it_does_not_understand_are_left_alone(calls):
    model = nn.ModuleList([nn.LayerNorm((2, 4)), nn.Embedding(5, 4, max_norm=1.0), nn.LayerNorm(4)])
    pygpt.accelerate(model)
    assert [type(m) is c for m, c in zip(model, (nn.LayerNorm, nn.Embedding, nn.LayerNorm), strict=True)] == [
        True,
        True,
        False,
    ]
